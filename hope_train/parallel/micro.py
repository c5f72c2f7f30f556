"""The rows of a step, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data_pipelines.batches import Batch

MicroBatch = tuple[Tensor, Tensor, Tensor | None]
"""(tokens, targets, starts or None), each [rows, T]."""


def micro_batches(batch: Batch, rows_each: int, device: torch.device) -> Iterator[MicroBatch]:
    """Parts of `rows_each` rows, in order, on `device`."""
    for first in range(0, len(batch.tokens), rows_each):
        part = slice(first, first + rows_each)
        starts_BT = None if batch.starts is None else torch.from_numpy(batch.starts[part]).to(device)
        yield (
            torch.from_numpy(batch.tokens[part]).to(device),
            torch.from_numpy(batch.targets[part]).to(device),
            starts_BT,
        )
