"""Whole runs under DeepSpeed: the native engine's figures, and checkpoints that either engine goes on from."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel import jobs
from tests.parallel.harness import Gang
from tests.parallel.test_runs import assert_same_figures
from tests.parallel.zero_jobs import run
from tests.train.tiny import STEPS, Tiny, assert_same_run, assert_same_tensors, read_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]

ALL = ("checkpoint.every=1", "checkpoint.keep_last=99", "train.micro_batch_size=1")


def zero(stage: int, *more: str) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.deepspeed.stage={stage}", *more]


def train(gang: Gang, tiny: Tiny, ranks: int, name: str, overrides: list[str], at: int = 0) -> None:
    """To the end, or stopped by a signal to the last rank before step `at`."""
    arguments: dict[str, Any] = {"config": str(tiny.config), "overrides": [f"name={name}", *ALL, *overrides]}
    if at:
        found = run(gang, jobs.interrupted_run, ranks, **arguments, rank=ranks - 1, at=at)
    else:
        found = run(gang, jobs.train_run, ranks, **arguments)
    assert found == [(0, "")] * ranks
    if at:
        assert (tiny.stopped(name)["reason"], tiny.stopped(name)["step"]) == ("signal", at)


def test_a_run_moves_between_the_engines(gang: Gang, tiny: Tiny) -> None:
    # Steps 3 and 6 are in mid-period of the levels of period 2 and 4; evaluations are at 0, 4 and 8.
    assert tiny.train("one", *ALL) == 0
    train(gang, tiny, 2, "moved", zero(3), at=3)
    train(gang, tiny, 2, "moved", [], at=6)
    train(gang, tiny, 2, "moved", zero(1, "parallel.tp=2"))
    assert_same_figures(tiny, "moved", "one")
    mine = read_checkpoint(tiny.checkpoint("moved", STEPS))
    for name, tensor in read_checkpoint(tiny.checkpoint("one", STEPS)).items():
        assert mine[name].shape == tensor.shape
        assert float((mine[name].double() - tensor.double()).norm()) <= 1e-4 * float(tensor.double().norm()), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("save", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
def test_a_resume_is_exact_in_mid_period_too(gang: Gang, tiny: Tiny, stage: int, save: str) -> None:
    train(gang, tiny, 2, "whole", zero(stage, save))
    for at in (3, 7, 0):
        train(gang, tiny, 2, "halves", zero(stage, save), at)
    assert_same_run(tiny, "halves", "whole")
    assert_same_tensors(tiny.checkpoint("halves", 3), tiny.checkpoint("whole", 3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_in_bf16_with_tensor_parallelism(gang: Gang, tiny: Tiny, stage: int) -> None:
    assert tiny.train("one", *ALL, "train.precision=bf16") == 0
    train(gang, tiny, 2, "mine", zero(stage, "parallel.tp=2", "train.precision=bf16"))
    for mine, theirs in zip(tiny.metrics("mine"), tiny.metrics("one"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)
    for mine, theirs in zip(tiny.evaluations("mine"), tiny.evaluations("one"), strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                assert mine[key] == pytest.approx(value, rel=2e-3), key
