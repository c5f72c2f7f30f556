"""A run of consecutive numbers of a tensor that is laid out row after row, as a part of that tensor in a checkpoint.

ZeRO cuts a flat buffer at any number, in the middle of rows too. The checkpoint library knows boxes: such a run is a
few of them, each of which is contiguous in the run, so that everything is written and read where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hope_train.parallel.plan import part_of


@dataclass(frozen=True)
class Box:
    """A box of a tensor, and where it begins in the run of numbers that it is a part of."""

    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: Sequence[int], first: int, last: int) -> list[Box]:
    """Numbers `first` to `last` (not included) of a tensor of this shape, row after row, as boxes in their order.

    At most two for each dimension but the last, and one more.
    """
    return _boxes(tuple(shape), first, last, 0)


def _boxes(shape: tuple[int, ...], first: int, last: int, start: int) -> list[Box]:
    if first >= last:
        return []
    if not shape:
        return [Box(start, (), ())]
    row = math.prod(shape[1:])
    top, bottom = first // row, -(-last // row)
    if first % row == 0 and last % row == 0:
        return [Box(start, (top, *[0] * (len(shape) - 1)), (bottom - top, *shape[1:]))]
    if bottom - top == 1:  # inside of one row
        inner = _boxes(shape[1:], first - top * row, last - top * row, start)
        return [Box(box.start, (top, *box.offsets), (1, *box.sizes)) for box in inner]
    # The rest of the first row, whole rows, the beginning of the last one.
    cuts = sorted({first, -(-first // row) * row, last // row * row, last})
    return [box for a, b in pairwise(cuts) for box in _boxes(shape, a, b, start + a - first)]


@dataclass(frozen=True)
class Run:
    """Which numbers of a parameter a rank holds, one after the other."""

    shape: tuple[int, ...]
    """Of the parameter in the unsharded model."""

    boxes: tuple[Box, ...]
    """In the unsharded model."""

    size: int
    """Numbers."""

    @classmethod
    def of(cls, shape: Sequence[int], dim: int | None, rank: int, ranks: int, first: int, last: int) -> Run:
        """Numbers `first` to `last` of a rank's part of a parameter.

        Args:
            shape: of the parameter in the unsharded model.
            dim: divided over the tensor-parallel ranks, of which this is number `rank`. None: not divided.
        """
        local, shift = list(shape), [0] * len(shape)
        if dim is not None:
            part = part_of(shape[dim], rank, ranks)
            local[dim], shift[dim] = len(part), part.start
        found = tuple(
            Box(box.start, tuple(a + b for a, b in zip(box.offsets, shift, strict=True)), box.sizes)
            for box in boxes(local, first, last)
        )
        return cls(tuple(shape), found, max(0, last - first))


class Fragment(Tensor):
    """A run of numbers, seen as a part of the whole tensor. It shares the storage of what it is made of.

    For checkpoints alone: no other function of torch's takes it.
    """

    _local_tensor: Tensor
    run: Run
    rows: int | None

    @staticmethod
    def __new__(cls, local: Tensor, run: Run, rows: int | None = None) -> Fragment:
        """
        Args:
            local: [n]; with `rows` [r, n].
            rows: there is a leading dimension besides, of so many rows, of which the first r are here.
        """
        shape = run.shape if rows is None else (rows, *run.shape)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        assert isinstance(made, Fragment)
        made._local_tensor, made.run, made.rows = local, run, rows
        return made

    def to_local(self) -> Tensor:
        """What this rank holds, flat."""
        return self._local_tensor

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Without the numbers."""
        return f"Fragment({self.run.size} of {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:  # type: ignore[override]
        """Copies (`detach`, `to`, `clone`), and `zero_`."""
        if function is torch.ops.aten.zero_.default:
            function(arguments[0]._local_tensor)
            return arguments[0]
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            fragment = arguments[0]
            local = function(fragment._local_tensor, *arguments[1:], **(options or {}))
            return cls(local, fragment.run, fragment.rows)
        raise NotImplementedError(f"{function} of a part of a tensor")

    # What torch.distributed.checkpoint asks

    def _chunks(self) -> list[tuple[ChunkStorageMetadata, Box]]:
        lead = () if self.rows is None else (len(self._local_tensor),)
        if lead == (0,):
            return []
        return [
            (ChunkStorageMetadata(torch.Size((*[0] * len(lead), *box.offsets)), torch.Size((*lead, *box.sizes))), box)
            for box in self.run.boxes
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """What this rank has to write."""
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk, _ in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What this rank has to read."""
        return [chunk for chunk, _ in self._chunks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The box that begins at `index.offset`, as a view. Raises ValueError if there is none."""
        for chunk, box in self._chunks():
            if chunk.offsets == index.offset:
                return self._local_tensor.narrow(-1, box.start, math.prod(box.sizes)).view(chunk.sizes)
        raise ValueError(f"{index.fqn}: nothing at {index.offset} is on this rank")
