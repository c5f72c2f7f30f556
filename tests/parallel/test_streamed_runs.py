"""Streamed text on several ranks: one process's figures, and one place of the data that any layout goes on from."""

from __future__ import annotations

import json

import pytest

from tests.parallel.harness import Gang
from tests.parallel.test_runs import ALL, assert_same_figures, continue_elsewhere
from tests.train.tiny import STEPS, Tiny

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]

STREAM = [
    *("data.mode=streaming", "data.stream.lanes=2", "data.stream.shuffle_documents=8", "data.stream.workers=0"),
    *("data.stream.packing=best_fit", "data.stream.pack_rows=4", "data.stream.validation_tokens=300"),
]


GROWING = [
    *("train.batch_tokens=256", "train.tokens=1200", "train.batch_ramp.start_tokens=64"),
    *("train.batch_ramp.increment_tokens=64", "train.batch_ramp.over_tokens=600"),
]
"""Tokens of the batches: 64 four times, 128 twice, 192, 256 twice."""


@pytest.mark.parametrize("growing", [[], GROWING], ids=["equal batches", "growing batches"])
def test_two_ranks_one_process_two_ranks_on_a_stream(gang: Gang, tiny: Tiny, growing: list[str]) -> None:
    options = [*STREAM, *growing]
    assert tiny.train("one", *ALL, *options) == 0
    workers = "data.stream.workers=1"
    legs = [(2, [*options, workers], 3), (1, options, 6), (2, options, 0)]
    continue_elsewhere(gang, tiny, "moved", legs)
    assert_same_figures(tiny, "moved", "one")
    assert [row["data"] for row in tiny.metrics("moved")] == [row["data"] for row in tiny.metrics("one")]
    for name in ("one", "moved"):
        trainer = json.loads((tiny.checkpoint(name, STEPS) / "trainer.json").read_text(encoding="utf-8"))
        assert set(trainer["data"]["lanes"]) == {"0", "1"}
