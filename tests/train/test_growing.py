"""Whole runs whose batches grow: what is counted, and exact resume in the middle of it."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from hope_train.errors import UserError
from launch.places import Places
from launch.status import _totals
from tests.train.tiny import STEPS, Tiny, assert_same_run, lines

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ALL = ("checkpoint.every=1", "checkpoint.keep_last=99")
RAMP = (
    *("train.batch_tokens=256", "train.tokens=1200", "train.batch_ramp.start_tokens=64"),
    *("train.batch_ramp.increment_tokens=64", "train.batch_ramp.over_tokens=600"),
)
"""Tokens of the batches: 64 four times, 128 twice, 192, 256 twice."""

TOKENS = [64, 128, 192, 256, 384, 512, 704, 960, 1216]
STREAM = (
    *("data.mode=streaming", "data.stream.lanes=2", "data.stream.shuffle_documents=8", "data.stream.workers=0"),
    *("data.stream.packing=best_fit", "data.stream.pack_rows=4", "data.stream.validation_tokens=300"),
)


@pytest.mark.parametrize("mode", ["cached", "streaming"])
def test_a_run_resumed_in_the_ramp_ends_as_the_uninterrupted_one(tiny: Tiny, mode: str) -> None:
    options = (*ALL, *RAMP, *(STREAM if mode == "streaming" else ()))
    assert tiny.train("whole", *options) == 0
    rows = tiny.metrics("whole")
    assert [row["tokens"] for row in rows] == TOKENS
    assert [row["batch_tokens"] for row in rows] == [64, 64, 64, 64, 128, 128, 192, 256, 256]
    assert [row["step"] for row in tiny.evaluations("whole")] == [0, 4, 8, 9]
    assert (tiny.stopped("whole")["step"], tiny.stopped("whole")["tokens"]) == (STEPS, 1216)
    assert _totals(Places(tiny.dir("whole"))) == (STEPS, 1216)
    for step in (2, 4, 6, 7) if mode == "cached" else (5,):
        killed = f"killed-{step}"
        shutil.copytree(tiny.dir("whole"), tiny.dir(killed))
        (tiny.dir(killed) / "STOPPED.json").unlink()
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(tiny.checkpoint(killed, later))
        assert tiny.train(killed, *options) == 0
        assert_same_run(tiny, killed, "whole")


def test_a_ramp_is_part_of_the_run(tiny: Tiny) -> None:
    assert tiny.train("one", *ALL, *RAMP) == 0
    for folder in (tiny.dir("one") / "checkpoints").iterdir():
        if folder.name > "step_00000005":
            shutil.rmtree(folder)
    (tiny.dir("one") / "STOPPED.json").unlink()
    with pytest.raises(UserError, match=r"train.batch_ramp.over_tokens is 600 there and 700 here"):
        tiny.train("one", *ALL, *RAMP, "train.batch_ramp.over_tokens=700")
    place = str(tiny.checkpoint("one", 5))
    with pytest.raises(UserError, match=r"trained on other data \(batch_ramp.over_tokens differ\)"):
        tiny.train("two", *ALL, *RAMP, "train.batch_ramp.over_tokens=700", resume=place)


def test_without_a_ramp_nothing_speaks_of_it(tiny: Tiny) -> None:
    """A run of before is the same run: neither its place in the data nor its lines have another key."""
    assert tiny.train("plain", *ALL) == 0
    assert all("batch_tokens" not in row for row in lines(tiny.dir("plain") / "metrics.jsonl"))
    manifest = json.loads((tiny.checkpoint("plain", STEPS) / "manifest.json").read_text(encoding="utf-8"))
    assert "batch_ramp" not in manifest["data"]
    config = tiny.dir("plain") / "config.yaml"
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    del tree["train"]["batch_ramp"]  # as an earlier version has written it
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    (tiny.dir("plain") / "STOPPED.json").unlink()
    shutil.rmtree(tiny.checkpoint("plain", STEPS))
    assert tiny.train("plain", *ALL) == 0
