"""Levels of toy size: states made from counters alone, and a tiny model that is really trained."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.store import load_state, newest_whole
from hope_train.checkpoint.tensors import Staging, State, training_state
from hope_train.checkpoint.writer import CheckpointWriter
from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from tests.checkpoint.toy import blank, facts


def level_state(step: int, periods: tuple[int, ...] = (1, 2, 4), seed: int = 0) -> State:
    """What a run with these periods holds after `step` steps; every value tells the update, or the step, it is of."""
    state: State = {"core": {"embed.weight": _values(seed, 0, step), **_counters(updates=step, steps=step)}}
    for level, period in enumerate(periods):
        name = f"blocks.0.cms.levels.{level}.up.weight"
        state[f"level_{level}"] = {
            name: _values(seed, level + 1, step // period),
            f"optimizer.exp_avg.{name}": _values(seed, level + 101, step // period),
            **_counters(updates=step // period, period=period, tokens=10 * (step % period)),
        }
        if period > 1:
            collected = _values(seed, level + 201, step) if step % period else torch.zeros(4, 3)
            state[f"level_{level}"][f"optimizer.accumulator.{name}"] = collected
    return state


def _values(*seeds: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(hash(seeds) % 2**40))


def _counters(**values: int) -> dict[str, torch.Tensor]:
    return {f"optimizer.{name}": torch.tensor(value, dtype=torch.int64) for name, value in values.items()}


def save_levels(writer: CheckpointWriter, steps: list[int], seed: int = 0) -> None:
    """Checkpoints of these steps of a run."""
    for step in steps:
        writer.save(level_state(step, seed=seed), facts(step))


def load_levels(folder: Path, step: int) -> State:
    """What is in a checkpoint, verified, read into tensors that held something else."""
    state = blank(level_state(step))
    for part in state.values():
        for tensor in part.values():
            tensor.fill_(77)
    load_state(folder, verify(folder), state)
    return state


class Levels(nn.Module):
    """Parameters under the names that the levels go by."""

    def __init__(self, count: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def leaf(*shape: int) -> nn.Module:
            module = nn.Module()
            module.weight = nn.Parameter(torch.randn(*shape, generator=generator))
            return module

        self.embed = leaf(5, 3)
        block, cms = nn.Module(), nn.Module()
        cms.levels = nn.ModuleList()
        for _ in range(count):
            level = nn.Module()
            level.up, level.gain = leaf(4, 3), leaf(3)
            cms.levels.append(level)
        block.cms = cms
        self.blocks = nn.ModuleList([block])


class Training:
    """A run without text. Each step's gradients depend on its number and on the weights: nothing is forgiven."""

    def __init__(self, periods: tuple[int, ...], variant: str = "sequential", refused: tuple[int, ...] = ()) -> None:
        """`refused`: batches whose loss is not finite."""
        config = RunConfig.model_validate(
            {
                "name": "toy",
                "model": {
                    "d_model": 32,
                    "n_layers": 1,
                    "n_heads": 2,
                    "vocab_size": 50,
                    "cms": {
                        "variant": variant,
                        "nested_rate": 0.3,
                        "levels": [{"width": 8, "period": period} for period in periods],
                    },
                },
                "optimizer": {"lr": 0.01},
                "train": {"context_length": 8, "batch_tokens": 16, "micro_batch_size": 2, "tokens": 16 * 64},
            }
        )
        self.model = Levels(len(periods))
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.refused = refused
        self.batches = 0

    def train(self, until: int) -> Training:
        """Take batches up to number `until`."""
        while self.batches < until:
            generator = torch.Generator().manual_seed(self.batches)
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = 0.3 * parameter.detach() + noise
            loss = math.nan if self.batches in self.refused else 1.0
            self.optimizer.step(tokens=7 + self.batches % 3, loss=loss)
            self.batches += 1
        return self

    def save(self, writer: CheckpointWriter, wait: bool = True) -> None:
        """A checkpoint of this moment."""
        writer.save(training_state(self.model, self.optimizer), facts(self.batches), wait=wait)

    def resume(self, run_dir: Path, writer: CheckpointWriter | None = None) -> Training:
        """Go on from the newest whole checkpoint of a run."""
        found = newest_whole(run_dir, print)
        assert found is not None
        state = training_state(self.model, self.optimizer)
        load_state(*found, state)
        self.optimizer.load_named_state(
            {
                name: {key: tensor for key, tensor in part.items() if key.startswith("optimizer.")}
                for name, part in state.items()
            }
        )
        self.batches = found[1].step
        if writer is not None:
            writer.go_on_from(*found)
        return self

    def state(self) -> State:
        """All of it, copied."""
        return Staging().copy(training_state(self.model, self.optimizer))
