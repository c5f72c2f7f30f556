"""Exact resume: whatever happened in between, the run ends as if nothing had."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.train.tiny import STEPS, Tiny, assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ALL = ("checkpoint.every=1", "checkpoint.keep_last=99")


@pytest.mark.parametrize("arch", ["hope", "transformer_pp"])
def test_a_run_resumed_at_every_step_ends_as_the_uninterrupted_one(tiny: Tiny, arch: str) -> None:
    # Periods 1, 2 and 4: most steps are in the middle of a level's period.
    model = tiny.model(arch)
    assert tiny.train("whole", *model, *ALL) == 0
    losses = {row["step"]: row["loss"] for row in tiny.metrics("whole")}
    assert len(losses) == STEPS
    assert len(set(losses.values())) == STEPS
    for step in range(1, STEPS):
        # As a kill right after the save of this step leaves it: logs may be ahead of the checkpoint.
        killed = f"killed-{step}"
        shutil.copytree(tiny.dir("whole"), tiny.dir(killed))
        (tiny.dir(killed) / "STOPPED.json").unlink()
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(tiny.checkpoint(killed, later))
        assert tiny.train(killed, *model, *ALL) == 0
        assert_same_run(tiny, killed, "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_in_deterministic_mode(tiny: Tiny, precision: str) -> None:
    options = ("train.device=cuda", "train.deterministic=true", f"train.precision={precision}", *ALL)
    try:
        assert tiny.train("whole", *options) == 0
        for step in (1, 5, 6):
            killed = f"killed-{step}"
            shutil.copytree(tiny.dir("whole"), tiny.dir(killed))
            (tiny.dir(killed) / "STOPPED.json").unlink()
            for later in range(step + 1, STEPS + 1):
                shutil.rmtree(tiny.checkpoint(killed, later))
            assert tiny.train(killed, *options, "checkpoint.async_save=true") == 0
            assert_same_run(tiny, killed, "whole")
    finally:
        torch.use_deterministic_algorithms(False)
