"""The script on runs of both architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.horizon import main
from tests.scripts.refusal import assert_refused
from tests.scripts.test_living_memory import runs

__all__ = ["runs"]  # the fixture: runs of 9 steps, `hope` and `transformer_pp`


def test_both_architectures_on_the_same_windows(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(runs / "hope"), str(runs / "transformer_pp")]
    assert main([*paths, "--windows", "6", "--horizons", "4", "32", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["windows"], found["text"]) == (6, "held-out training text")
    assert [row["arch"] for row in found["runs"]] == ["hope", "transformer_pp"]
    for row in found["runs"]:
        assert list(row["loss"]) == ["whole", "32", "4"]
        # A cut where the window begins takes nothing away; one every 4 tokens does.
        assert row["loss"]["32"] == pytest.approx(row["loss"]["whole"], abs=1e-6)
        assert abs(row["loss"]["4"] - row["loss"]["whole"]) > 1e-5


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "hope"), "--windows", "2", "--horizons", "4", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "never" in shown
    assert "4 tokens" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is neither a run directory nor a checkpoint"),
        (["hope", "--windows", "1"], "--windows=1: at least 2"),
        (["hope", "--horizons", "0"], "tokens between cuts are at least 1"),
    ],
)
def test_mistakes(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert_refused(main, [*arguments, "--device", "cpu"], message, capsys)
