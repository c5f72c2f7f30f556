"""The rows of a step as tensors, whole or cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data_pipelines.batches import Batch

Rows = tuple[Tensor, Tensor, Tensor | None]
"""(tokens, targets, starts or None), each [rows, T]."""


def on_device(batch: Batch, device: torch.device, rows: slice = slice(None)) -> Rows:
    """Some rows of a batch."""
    return (
        torch.from_numpy(batch.tokens[rows]).to(device),
        torch.from_numpy(batch.targets[rows]).to(device),
        None if batch.starts is None else torch.from_numpy(batch.starts[rows]).to(device),
    )


def split_rows(batch: Batch, rows_each: int, device: torch.device) -> Iterator[Rows]:
    """Micro-batches of `rows_each` rows, in order."""
    for first in range(0, len(batch.tokens), rows_each):
        yield on_device(batch, device, slice(first, first + rows_each))
