"""DeepSpeed's loader reads what `to-universal` writes, and `from-universal` what DeepSpeed's converter writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.store import find_checkpoint
from hope_train.checkpoint.universal.export import to_universal
from hope_train.checkpoint.universal.load import from_universal
from hope_train.parallel.plan import split_of_parameter
from hope_train.parallel.tensor import Layout
from tests.parallel import jobs, universal_jobs
from tests.parallel.harness import Gang
from tests.parallel.zero_jobs import run
from tests.train.tiny import Tiny, assert_same_tensors, read_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]

STATE = {"fp32": "", "exp_avg": "optimizer.exp_avg.", "exp_avg_sq": "optimizer.exp_avg_sq."}


def export(tiny: Tiny, step: int) -> tuple[Path, Path]:
    """A checkpoint of a run, and the same in DeepSpeed's format."""
    assert tiny.train("run", f"checkpoint.every={step}", "checkpoint.keep_last=9", f"train.tokens={128 * step}") == 0
    folder, out = tiny.checkpoint("run", step), tiny.folder / "universal"
    to_universal(*find_checkpoint(folder), out)
    return folder, out


def assert_holds(found: dict[str, dict[str, torch.Tensor]], checkpoint: Path) -> None:
    """Weights and moments of an engine are those of a checkpoint, to the bit."""
    flat = {name.partition("/")[2]: tensor for name, tensor in read_checkpoint(checkpoint).items()}
    assert set(found) == {name for name in flat if not name.startswith("optimizer.")}
    for name, parts in found.items():
        for key, prefix in STATE.items():
            assert torch.equal(parts[key], flat[prefix + name]), f"{name}: {key}"


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deepspeed_goes_on_from_a_checkpoint_and_back(gang: Gang, tiny: Tiny, stage: int) -> None:
    checkpoint, out = export(tiny, 3)  # levels 1 and 2 are in mid-period
    save = tiny.folder / "deepspeed"
    ranks: list[Any] = run(
        gang, universal_jobs.go_on, 2, folder=str(out), stage=stage, steps=2, groups=True, save=str(save)
    )
    for found in ranks:
        assert_holds(found["loaded"], checkpoint)
        assert (found["client"], found["global_steps"]) == ({"step": 3, "tokens": 384}, 5)
        assert all(rate < 0.02 for rate, _ in found["rates"]), "the file's groups, not the 1.0 it was made with"
        assert {decay for _, decay in found["rates"]} == {0.0, 0.1}

    made = from_universal(save / "universal", tiny.folder / "back", find_checkpoint(checkpoint))
    assert (made["exact"], made["step"], made["tokens"], made["collected"]) == (False, 5, 640, [])
    verify(tiny.folder / "back")
    assert_holds(ranks[0]["final"], tiny.folder / "back")
    assert not torch.equal(ranks[0]["final"]["head.weight"]["fp32"], ranks[0]["loaded"]["head.weight"]["fp32"])
    state = read_checkpoint(tiny.folder / "back")
    # This engine has stepped every level twice: Adam's own count is DeepSpeed's, the level's is its period's.
    names = [f"level_{level}/optimizer.step.blocks.0.cms.levels.{level}.up.weight" for level in range(3)]
    assert [int(state[name]) for name in names] == [5, 3, 2]
    assert [int(state[f"level_{level}/optimizer.updates"]) for level in range(3)] == [5, 2, 1]
    assert tiny.train("went_on", resume=str(tiny.folder / "back")) == 0

    # The same, with what to-universal had left put beside it.
    shutil.copytree(out / "hope_train", save / "universal" / "hope_train")
    assert not from_universal(save / "universal", tiny.folder / "again")["exact"]
    assert_holds(ranks[0]["final"], tiny.folder / "again")


@pytest.mark.slow
def test_stage_3_takes_it_in_one_group(gang: Gang, tiny: Tiny) -> None:
    # Stage 3 reads one count of updates for everything, and gives all groups one tensor of it, which each advances.
    checkpoint, out = export(tiny, 3)
    save = tiny.folder / "deepspeed"
    ranks: list[Any] = run(
        gang, universal_jobs.go_on, 2, folder=str(out), stage=3, steps=1, groups=False, save=str(save)
    )
    for found in ranks:
        assert_holds(found["loaded"], checkpoint)
    made = from_universal(save / "universal", tiny.folder / "back", find_checkpoint(checkpoint))
    assert made["step"] == 4
    assert_holds(ranks[0]["final"], tiny.folder / "back")


def test_parts_for_tensor_parallelism_are_those_of_the_plan(gang: Gang, tiny: Tiny) -> None:
    checkpoint, out = export(tiny, 3)
    flat = {name.partition("/")[2]: tensor for name, tensor in read_checkpoint(checkpoint).items()}
    (parts,) = run(gang, universal_jobs.tensor_parallel_parts, 1, folder=str(out), parts=2)
    assert set(parts) == {name for name in flat if not name.startswith("optimizer.")}
    for name, (weights, moments) in parts.items():
        layout = Layout(tuple(flat[name].shape), split_of_parameter(name).dim)
        for rank in range(2):
            assert torch.equal(weights[rank], layout.part(flat[name], rank, 2).flatten()), name
            whole = flat[f"optimizer.exp_avg.{name}"]
            assert torch.equal(moments[rank], layout.part(whole, rank, 2).flatten()), name


@pytest.mark.slow
def test_stacked_accumulators_come_back(gang: Gang, tiny: Tiny) -> None:
    arguments: dict[str, Any] = {"config": str(tiny.config), "overrides": ["name=stacked", "train.micro_batch_size=1"]}
    assert run(gang, jobs.interrupted_run, 2, **arguments, rank=1, at=3) == [(0, "")] * 2
    checkpoint, out = tiny.checkpoint("stacked", 3), tiny.folder / "universal"
    to_universal(*find_checkpoint(checkpoint), out)
    assert from_universal(out, tiny.folder / "back")["exact"]
    assert verify(tiny.folder / "back").stacked == verify(checkpoint).stacked == 2
    assert_same_tensors(tiny.folder / "back", checkpoint)
