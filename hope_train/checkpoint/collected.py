"""What levels have collected of an unfinished period by several data-parallel ranks, in a checkpoint: two forms.

*Folded*: summed over the ranks before it is written, 4 bytes per parameter. *Stacked*: a row per rank, which the same
number of ranks reads back as it was, to the bit; any other number sums the rows that each of its ranks is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_train.checkpoint.tensors import OPTIMIZER, TOKENS, State, counter, load_set
from hope_train.config.model import ModelConfig
from hope_train.parallel.rows import Rows
from hope_train.plan.parameters import level_counts

ACCUMULATOR = f"{OPTIMIZER}accumulator."


@dataclass(frozen=True)
class Apart:
    """What is needed to read stacked accumulators."""

    live: State
    """This rank's tensors, not wrapped."""

    rows: Rows
    """How rows are divided among the ranks."""


def stacked_bytes(sets: Iterable[str], model: ModelConfig, ranks: int) -> int:
    """What the accumulators (fp32) of these levels take in a checkpoint, a row per data-parallel rank."""
    counts = {f"level_{level}": count for level, count in level_counts(model).items()}
    return 4 * ranks * sum(counts.get(name, 0) for name in sets)


def stacked(wrapped: State, live: State, rows: Rows) -> State:
    """The state for a checkpoint, `wrapped` as parts of whole tensors, with each rank's own accumulators as rows.

    live: the same state, not wrapped.
    """
    found = dict(wrapped)
    for name, part in live.items():
        if not counter(part, TOKENS):
            continue
        found[name] = {
            key: rows.wrap(key.removeprefix(ACCUMULATOR), part[key].unsqueeze(0), rows.mesh.sizes.dp)
            if key.startswith(ACCUMULATOR)
            else tensor
            for key, tensor in wrapped[name].items()
        }
    return found


@torch.no_grad()
def load_stacked(folder: Path, live: Mapping[str, Tensor], count: int, rows: Rows, group: Any = None) -> None:
    """Read a set of stacked accumulators into the live tensors: the sum of the rows that are this rank's.

    Args:
        live: this rank's accumulators, and the counter beside them.
        count: rows in the set.
    """
    mine = rows.mine(count)
    held = {
        key: tensor.new_empty((len(mine), *tensor.shape)) for key, tensor in live.items() if key.startswith(ACCUMULATOR)
    }
    wrapped = {
        key: rows.wrap(key.removeprefix(ACCUMULATOR), held[key], count) if key in held else tensor
        for key, tensor in live.items()
    }
    load_set(folder, wrapped, group)
    for key, own_rX in held.items():
        # One row is taken as it is: a sum would lose the sign of a zero.
        live[key].copy_(own_rX[0] if len(mine) == 1 else own_rX.sum(0))
