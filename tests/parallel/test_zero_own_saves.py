"""DeepSpeed's own saves beside the checkpoints: its loader and its converter read what the run had, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint.manifest import step_name, verify
from hope_train.checkpoint.store import find_checkpoint
from hope_train.checkpoint.universal.load import from_universal
from tests.parallel import jobs, universal_jobs
from tests.parallel.harness import Gang
from tests.parallel.test_zero_universal import assert_holds
from tests.parallel.zero_jobs import run
from tests.train.tiny import Tiny, assert_same_run, read_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]


def train(
    gang: Gang, tiny: Tiny, name: str, stage: int, *more: str, ranks: int = 2, job: Any = None, **how: Any
) -> Path:
    """Steps 1 to 3, of which 3 is in mid-period of two levels; the folder of DeepSpeed's own saves."""
    overrides = [
        f"name={name}",
        "train.micro_batch_size=1",
        "train.tokens=384",
        "checkpoint.every=1",
        "checkpoint.keep_last=2",
        "parallel.engine=deepspeed",
        f"parallel.deepspeed.stage={stage}",
        "parallel.deepspeed.own_saves=true",
        *more,
    ]
    found = run(gang, job or jobs.train_run, ranks, config=str(tiny.config), overrides=overrides, **how)
    assert found == [(0, "")] * ranks
    return tiny.dir(name) / "deepspeed"


def convert(gang: Gang, own: Path, step: int) -> Path:
    """`ds_to_universal` of one of them."""
    target = own.parent / "universal"
    run(gang, universal_jobs.convert, 1, source=str(own / step_name(step)), target=str(target))
    return target


def assert_comes_back(tiny: Tiny, universal: Path, checkpoint: Path) -> None:
    """`from-universal` makes the checkpoint of it, to the bit, but for what levels had collected."""
    made = from_universal(universal, tiny.folder / "back", find_checkpoint(checkpoint))
    assert (made["exact"], made["counted"], made["step"], made["tokens"]) == (False, True, 3, 384)
    manifest = verify(tiny.folder / "back")
    assert (manifest.step, manifest.tokens) == (3, 384)
    mine, theirs = read_checkpoint(tiny.folder / "back"), read_checkpoint(checkpoint)
    gone = {name for name in theirs if "_accumulator/" in name}
    assert gone
    assert mine.keys() == theirs.keys() - gone
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_deepspeed_reads_what_a_run_has_left(gang: Gang, tiny: Tiny, stage: int) -> None:
    own = train(gang, tiny, "run", stage)
    checkpoint = tiny.checkpoint("run", 3)
    assert sorted(path.name for path in own.iterdir()) == [
        "latest",
        step_name(2),
        step_name(3),
        "zero_to_fp32.py",
        "zero_to_torch.py",
    ]
    assert (own / "latest").read_text() == step_name(3)
    state = read_checkpoint(checkpoint)
    flat = {name.partition("/")[2]: tensor for name, tensor in state.items()}
    for found in run(gang, universal_jobs.go_on_from_own, 2, folder=str(own), checkpoint=str(checkpoint), stage=stage):
        assert_holds(found["loaded"], checkpoint)
        collected = 0
        for name, tensor in found["collected"].items():
            wanted = flat.get(f"optimizer.accumulator.{name}", torch.zeros_like(tensor))
            assert torch.equal(tensor, wanted), name
            collected += bool(wanted.any())
        assert collected == sum(name.startswith("optimizer.accumulator.") for name in flat) > 0
        counts = found["client"]
        assert (counts["step"], counts["tokens"], found["global_steps"]) == (3, 384, 3)
        for level in range(3):
            key = f"level_{level}"
            assert counts["sets"][key]["updates"] == int(state[f"{key}/optimizer.updates"])
            up = f"blocks.0.cms.levels.{level}.up.weight"
            assert counts["adam_steps"][up] == int(state[f"{key}/optimizer.step.{up}"])
        assert not torch.equal(found["final"]["head.weight"]["fp32"], found["loaded"]["head.weight"]["fp32"])
    (weights,) = run(gang, universal_jobs.script_weights, 1, folder=str(own))
    assert weights.keys() == {name for name in flat if not name.startswith("optimizer.")}
    assert all(torch.equal(tensor, flat[name]) for name, tensor in weights.items())
    assert_comes_back(tiny, convert(gang, own, 3), checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2])
def test_tensor_parallel_parts_are_put_together(gang: Gang, tiny: Tiny, stage: int, dp: int) -> None:
    own = train(gang, tiny, "run", stage, "parallel.tp=2", ranks=2 * dp)
    assert_comes_back(tiny, convert(gang, own, 3), tiny.checkpoint("run", 3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_offload(gang: Gang, tiny: Tiny, stage: int) -> None:
    own = train(gang, tiny, "run", stage, "parallel.deepspeed.offload_optimizer=true")
    assert_comes_back(tiny, convert(gang, own, 3), tiny.checkpoint("run", 3))


@pytest.mark.slow
def test_stage_0_leaves_one_file(gang: Gang, tiny: Tiny) -> None:
    own = train(gang, tiny, "run", 0)
    (file,) = (own / step_name(3)).iterdir()
    content = torch.load(file, weights_only=True)
    state = {name.partition("/")[2]: tensor for name, tensor in read_checkpoint(tiny.checkpoint("run", 3)).items()}
    (group,) = content["optimizer"]["param_groups"]
    for name, place in zip(content["module"], group["params"], strict=True):
        assert torch.equal(content["module"][name], state[name])
        for key, tensor in content["optimizer"]["state"][place].items():
            assert torch.equal(tensor, state[f"optimizer.{key}.{name}"]), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_run_is_the_same_with_and_without(gang: Gang, tiny: Tiny, stage: int) -> None:
    own = train(gang, tiny, "with", stage, "train.tokens=1152", job=jobs.interrupted_run, rank=1, at=3)
    train(gang, tiny, "with", stage, "train.tokens=1152", "checkpoint.async_save=true")
    train(gang, tiny, "without", stage, "train.tokens=1152", "parallel.deepspeed.own_saves=false")
    assert_same_run(tiny, "with", "without")
    assert not (tiny.dir("without") / "deepspeed").exists()
    assert (own / "latest").read_text() == step_name(9)
    assert tiny.checkpoints("with") == sorted(path.name for path in own.glob("step_*")) == [step_name(8), step_name(9)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "rank", "what"), [(1, 1, "save"), (3, 1, "save"), (3, 0, "save"), (3, 0, "copyfile")]
)
def test_a_save_of_deepspeed_s_that_fails_costs_nothing_else(
    gang: Gang, tiny: Tiny, stage: int, rank: int, what: str
) -> None:
    job = universal_jobs.run_on_a_full_disk
    own = train(gang, tiny, "run", stage, job=job, rank=rank, what=what, step=2)
    assert sorted(path.name for path in own.glob("step_*")) == [step_name(3)]
    assert (own / "latest").read_text() == step_name(3)
    for step in (2, 3):
        verify(tiny.checkpoint("run", step))
