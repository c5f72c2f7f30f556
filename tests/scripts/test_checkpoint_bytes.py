"""The script that measures what is written, and for how long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.checkpoint_bytes import Sizes, main, measure_blocking, predicted_share, steps_of_a_cycle

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TOY = Sizes({"core": 100, "level_0": 100, "level_1": 100}, {"core": 1, "level_0": 1, "level_1": 2})


def test_the_prediction_by_hand() -> None:
    # Step 1 writes core, level 0 and level 1's accumulator (and level 1 itself); step 2 writes the three sets.
    assert predicted_share(1, TOY) == (1200 + 1200 + 400 + 3600) / (3600 + 400 + 3600)
    assert predicted_share(2, TOY) == 1.0
    # Steps 3 and 6: both levels have changed at both, level 1 is in mid-period at the first.
    assert predicted_share(3, TOY) == 1.0


def test_a_cycle_ends_where_interval_and_periods_meet() -> None:
    assert list(steps_of_a_cycle(6, {"core": 1, "level_0": 4})) == [6, 12]
    assert list(steps_of_a_cycle(4, {"core": 1, "level_0": 16})) == [4, 8, 12, 16]


def test_files_are_as_large_as_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "configs/hope_1b3.yaml --every 8 64 --mib 4 --json --dir"
    assert main([*line.split(), str(tmp_path)]) == 0
    eight, full = json.loads(capsys.readouterr().out)
    assert (eight["saves"], full["saves"]) == (8, 1)
    assert eight["share"] == pytest.approx(eight["predicted"], rel=0.01)
    assert eight["predicted"] < 0.8
    assert 0 < eight["accumulator_bytes"] < eight["own_bytes"] < eight["all_bytes"]
    assert (full["share"], full["accumulator_bytes"]) == (1.0, 0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_in_the_background_is_of_its_own_moment(tmp_path: Path) -> None:
    found = measure_blocking(TOY, tmp_path, repeats=2)  # raises if it is not
    assert found.state_bytes == 12 * 300 + 4 * 100 + 2 * 3 * 8
    assert found.waiting > 0
    assert found.background > 0
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
