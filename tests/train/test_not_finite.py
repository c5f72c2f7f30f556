"""NaN and infinity: the step is not applied, the batch is named, and a run that stays so is stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hope_train.model.hope import HopeModel
from tests.train.tiny import STEPS, Tiny, assert_same_run, lines, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Spoil:
    """Makes the loss of chosen micro-batches (counted from 0, over the process) not finite, or only its gradient."""

    def __init__(self) -> None:
        self._patch = pytest.MonkeyPatch()  # of its own: undoing the tests' would bring the real WikiText back

    def __call__(self, chosen: set[int], value: float = math.nan, gradient_only: bool = False) -> None:
        calls = iter(range(10**9))
        plain = HopeModel.loss

        def loss(model: HopeModel, *arguments: Any, **more: Any) -> Any:
            total, count = plain(model, *arguments, **more)
            if model.training and next(calls) in chosen:
                total = total + (total * 0).sqrt() if gradient_only else total * value
            return total, count

        self._patch.setattr(HopeModel, "loss", loss)

    def undo(self) -> None:
        """From here on the loss is what it is."""
        self._patch.undo()


@pytest.fixture
def spoil() -> Iterator[Spoil]:
    """Puts the loss back at the end."""
    spoil = Spoil()
    yield spoil
    spoil.undo()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_is_left_out_and_its_samples_named(
    tiny: Tiny, spoil: Spoil, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil({7}, value)  # two micro-batches a step: the second one of batch 3
    assert tiny.train("a", "train.log_every=9") == 0
    row = next(row for row in lines(tiny.dir("a") / "metrics.jsonl") if "refused" in row)
    assert (row["step"], row["tokens"], row["loss"], row["refused"]["batch"]) == (4, 512, None, 3)
    assert len(row["refused"]["windows"]) == 2
    out = capsys.readouterr().out
    assert f"batch 3, windows {', '.join(map(str, row['refused']['windows']))} of the training text" in out
    assert "1 steps were not finite and not applied" in out
    final = read_checkpoint(tiny.checkpoint("a", STEPS))
    assert int(final["core/optimizer.steps"]) == STEPS - 1
    assert int(final["core/optimizer.skipped"]) == 1
    assert all(torch.isfinite(tensor).all() for tensor in final.values() if tensor.is_floating_point())


def test_a_gradient_alone(tiny: Tiny, spoil: Spoil) -> None:
    spoil({6}, gradient_only=True)
    assert tiny.train("a") == 0
    row = tiny.metrics("a")[3]
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] is None
    assert len(row["refused"]["windows"]) == 4, "any of the batch's samples may be it"
    assert "refused" not in tiny.metrics("a")[4]


def test_enough_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tiny: Tiny, spoil: Spoil) -> None:
    options = ("train.nan_patience=3", "checkpoint.every=1", "checkpoint.keep_last=1")
    spoil({2, 8, 10, 12})  # step 2, and from step 5 on
    assert tiny.train("a", *options) == 3
    marker = tiny.stopped("a")
    assert (marker["reason"], marker["step"]) == ("nan", 7)
    assert marker["detail"] == "3 steps in a row were not finite: batches 4 to 6"
    assert marker["checkpoint"] == "checkpoints/step_00000004"
    assert tiny.checkpoints("a") == ["step_00000004"]
    spoil.undo()
    # The text is innocent here, so that the run goes on when it is started again.
    assert tiny.train("a", *options) == 0
    assert [("refused" in row) for row in tiny.metrics("a")] == [False, True] + [False] * 7


def test_a_run_that_ends_so_is_not_completed(tiny: Tiny, spoil: Spoil) -> None:
    options = ("checkpoint.every=4", "checkpoint.keep_last=1")
    spoil({14, 16})  # the last two steps of nine
    assert tiny.train("a", *options) == 3
    marker = tiny.stopped("a")
    assert (marker["reason"], marker["step"]) == ("nan", STEPS)
    assert marker["detail"] == "the last 2 steps were not finite: batches 7 to 8"
    # What was learnt is saved, beside the last good checkpoint; and to start again changes nothing.
    assert tiny.checkpoints("a") == ["step_00000004", f"step_{STEPS:08d}"]
    assert not [row for row in tiny.evaluations("a") if row["step"] == STEPS]
    spoil.undo()
    assert tiny.train("a", *options) == 3
    # Longer training may get over it.
    assert tiny.train("a", *options, f"train.tokens={(STEPS + 1) * 128}", force=True) == 0
    assert tiny.stopped("a")["reason"] == "completed"


def test_a_run_that_never_made_a_step(tiny: Tiny) -> None:
    assert tiny.train("a", "model.init_std=1e38", "train.tokens=256") == 3
    assert tiny.stopped("a")["reason"] == "nan"


def test_a_resume_counts_on(tiny: Tiny, spoil: Spoil) -> None:
    # A stop in the middle of such a row: patience is not new at each start, and no older checkpoint is pruned for it.
    spoil({4, 6, 8, 10})
    options = ("train.nan_patience=3", "checkpoint.every=1", "checkpoint.keep_last=1")
    (tiny.dir("a")).mkdir()
    from hope_train.train import loop

    step = loop.take_step

    def stop_after(run: Any, index: int, measure: bool) -> Any:
        if index == 3:
            (run.run_dir / "STOP").touch()
        return step(run, index, measure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stop_after)
        assert tiny.train("a", *options) == 0
    names = tiny.checkpoints("a")
    assert names == ["step_00000002", "step_00000004"]
    assert tiny.train("a", *options) == 3
    assert tiny.stopped("a")["step"] == 5


def test_a_resumed_run_with_a_refused_step_equals_the_uninterrupted_one(tiny: Tiny, spoil: Spoil) -> None:
    spoil({5})
    assert tiny.train("whole", "checkpoint.every=4", "checkpoint.keep_last=9") == 0
    spoil.undo()
    assert tiny.train("b", "checkpoint.keep_last=9", resume=str(tiny.checkpoint("whole", 4))) == 0
    assert tiny.metrics("b") == tiny.metrics("whole")[4:]
    assert_same_run(tiny, "whole", "whole")
    mine, theirs = (read_checkpoint(tiny.checkpoint(name, STEPS)) for name in ("b", "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
