"""Small states and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hope_train.checkpoint.fence import Fence
from hope_train.checkpoint.tensors import State
from hope_train.checkpoint.writer import CheckpointWriter, Facts

CONFIG = {"name": "toy", "model": {"cms": {"levels": [{"width": 8}]}}}


def make_state(seed: int = 0) -> State:
    """Two sets with the kinds of tensors there are: matrices, vectors, scalars, integers, wide and narrow floats."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "core": {
            "embed.weight": torch.randn(7, 5, generator=generator),
            "norm.weight": torch.randn(5, generator=generator, dtype=torch.float64),
            "optimizer.step.embed.weight": torch.tensor(float(seed)),
            "optimizer.updates": torch.tensor(seed, dtype=torch.int64),
        },
        "level_0": {"blocks.0.cms.levels.0.up.weight": torch.randn(300, 70, generator=generator).bfloat16()},
    }


def blank(state: State) -> State:
    """Tensors of the same kinds to load into."""
    return {name: {key: torch.zeros_like(tensor) for key, tensor in part.items()} for name, part in state.items()}


def facts(step: int, **more: Any) -> Facts:
    """Of a run of 10 tokens a step."""
    known = {"config": CONFIG, "tokenizer": "f" * 64, "data": {"seed": 1}, "trainer": {"refused": 0}}
    return Facts(**{"step": step, "tokens": 10 * step, **known, **more})


def make_writer(run_dir: Path, keep_last: int = 99, **more: Any) -> tuple[CheckpointWriter, list[str]]:
    """A writer of a new incarnation, and the lines it says."""
    run_dir.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    return CheckpointWriter(Fence.take(run_dir), keep_last, tell=said.append, **more), said


def save_steps(run_dir: Path, steps: list[int], **more: Any) -> CheckpointWriter:
    """Checkpoints of these steps, each with the state of that seed."""
    writer, _ = make_writer(run_dir, **more)
    for step in steps:
        writer.save(make_state(step), facts(step))
    return writer


def names(run_dir: Path) -> list[str]:
    """What lies in the folder of checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_equal(found: State, expected: State) -> None:
    """Bit for bit."""
    assert {name: set(part) for name, part in found.items()} == {name: set(part) for name, part in expected.items()}
    for name, part in expected.items():
        for key, tensor in part.items():
            assert found[name][key].dtype == tensor.dtype, key
            assert torch.equal(found[name][key], tensor), key
