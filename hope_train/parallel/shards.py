"""Rows of parameters dealt out over the ranks of a sharding group, as FSDP2 deals them: equal shares of the first
dimension, the last ranks with fewer where it does not divide, padded to equal shares where they travel.

A *unit* is a list of tensors that travel together: one collective for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hope_train.parallel import collectives
from hope_train.parallel.plan import part_of


def rows_of(shape: Sequence[int], rank: int, ranks: int) -> range:
    """The rows of a tensor of this shape that a rank holds."""
    return part_of(shape[0], rank, ranks)


@dataclass(frozen=True)
class Unit:
    """Tensors of one type, whole shapes in order, sharded over `ranks` of which this is `rank`."""

    shapes: tuple[tuple[int, ...], ...]
    rank: int
    ranks: int

    @property
    def sizes(self) -> list[int]:
        """Numbers of one rank's share of each tensor, padding included."""
        return [-(-shape[0] // self.ranks) * math.prod(shape[1:]) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Numbers that a collective over the unit handles on each rank, padding included."""
        return self.ranks * sum(self.sizes)

    def shard_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of this rank's rows."""
        return (len(rows_of(shape, self.rank, self.ranks)), *shape[1:])

    def start_sum(self, wholes: Sequence[Tensor], group: ProcessGroup) -> Pending:
        """Begin to sum whole tensors over the ranks; each keeps its rows."""
        buffer = wholes[0].new_zeros((self.ranks, sum(self.sizes)))
        for place, tensor, size in zip(self._places(), wholes, self.sizes, strict=True):
            flat = tensor.reshape(-1)
            full = flat.numel() // size if size else 0  # ranks whose share is not padded
            target = buffer[:, place : place + size]
            target[:full] = flat[: full * size].view(full, size)
            if rest := flat.numel() - full * size:
                target[full, :rest] = flat[full * size :]
        own = buffer.new_empty(sum(self.sizes))
        return Pending(self, own, collectives.reduce_scatter(own, buffer.view(-1), group=group, async_op=True), buffer)

    def shards(self, own: Tensor) -> list[Tensor]:
        """This rank's rows of each tensor as views of its share, padding left out."""
        found = []
        for place, shape in zip(self._places(), self.shapes, strict=True):
            mine = self.shard_shape(shape)
            found.append(own[place : place + math.prod(mine)].view(mine))
        return found

    def gather(self, shards: Sequence[Tensor], wholes: Sequence[Tensor], group: ProcessGroup) -> None:
        """Fill the whole tensors from every rank's rows."""
        own = shards[0].new_zeros(sum(self.sizes))
        for place, shard in zip(self._places(), shards, strict=True):
            own[place : place + shard.numel()] = shard.reshape(-1)
        everything = own.new_empty(self.numel)
        collectives.all_gather(everything, own, group=group)
        by_rank = everything.view(self.ranks, -1)
        for place, tensor, size in zip(self._places(), wholes, self.sizes, strict=True):
            tensor.copy_(by_rank[:, place : place + size].reshape(-1)[: tensor.numel()].view_as(tensor))

    def _places(self) -> list[int]:
        """Where each tensor's share begins in a rank's."""
        return [sum(self.sizes[:number]) for number in range(len(self.shapes))]


@dataclass
class Pending:
    """A sum under way; `own` is this rank's share once it has been waited for."""

    unit: Unit
    own: Tensor
    work: Any
    buffer: Tensor
    """Kept until the sum is done."""

    def finish(self) -> list[Tensor]:
        """Wait; this rank's rows of the sums."""
        self.work.wait()
        return self.unit.shards(self.own)


def finish_sums(pending: Sequence[Pending], replicas: ProcessGroup | None) -> list[list[Tensor]]:
    """Wait for sums over the sharding group and, where there are copies of it, sum these as well. Rows by unit."""
    found = [entry.finish() for entry in pending]
    if replicas is not None:
        works = [dist.all_reduce(entry.own, group=replicas, async_op=True) for entry in pending]
        for work in works:
            work.wait()
    return found


@torch.no_grad()
def cut(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's rows of a whole tensor, as a view."""
    rows = rows_of(whole.shape, rank, ranks)
    return whole[rows.start : rows.stop]
