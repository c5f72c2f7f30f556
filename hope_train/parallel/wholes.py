"""Whole matrices for the update rules, where ranks have parts of them: each is worked on by one rank, and only there.

The matrices are dealt out over all ranks that see any of them: those that divide the model, and its copies too. In each
round a rank has at most one batch of matrices whole: their parts come to it, the results go back, in two exchanges that
serve all ranks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hope_train.config.mesh import MeshSizes
from hope_train.optim.kinds import kind_of
from hope_train.optim.wholes import Done, Job, Wholes, Work, batches, stacked
from hope_train.parallel.mesh import DIMENSIONS, Mesh
from hope_train.parallel.plan import part_of


@dataclass(frozen=True)
class Spread:
    """A matrix and its parts."""

    shape: tuple[int, int]
    """In the unsharded model."""

    parts: tuple[tuple[slice, slice], ...]
    """By rank of the group: its rows and its columns of the whole."""

    def local(self, rank: int) -> tuple[int, int]:
        """Shape of a rank's part."""
        rows, columns = self.parts[rank]
        return rows.stop - rows.start, columns.stop - columns.start


class MeshWholes(Wholes):
    """Matrices whose parts are on the ranks of a group."""

    def __init__(
        self, group: ProcessGroup, spreads: Mapping[Tensor, Spread], copies: Sequence[int], device: torch.device
    ) -> None:
        """
        Args:
            group: all ranks that hold parts of the same matrices, of every copy of them.
            spreads: where the parts of each matrix are; the same matrices in the same order on every rank.
            copies: by rank of the group, the copy of the model that it holds a part of. In a copy each number of a
                matrix is on one rank.
            device: where the parameters are.
        """
        self.group, self.spreads, self.copies, self.device = group, spreads, list(copies), device
        self.rank, self.ranks = dist.get_rank(group), len(copies)
        self.mates = [rank for rank, copy in enumerate(copies) if copy == copies[self.rank]]
        """The ranks of this one's copy, itself among them."""
        self.worked_on = 0
        """Matrices that this rank has worked on since the beginning."""

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Of a matrix, in the unsharded model."""
        return self.spreads[parameter].shape

    def each(
        self, jobs: Sequence[Job], work: Work, results: int = 1, dtype: torch.dtype | None = None
    ) -> Iterator[Done]:
        """See Wholes. Jobs come back round by round, in the same order on every rank."""
        dealt = [batches(mine, self.shape) for mine in deal(jobs, self.shape, self.ranks)]
        for number in range(max(map(len, dealt), default=0)):
            turn = [mine[number] if number < len(mine) else [] for mine in dealt]
            own = turn[self.rank]
            kind = dtype or next(job.parameter.dtype for batch in turn for job in batch)
            stacks = self._collect(turn, kind)
            done = work(stacks, stacked([job.wholes for job in own])) if own else ([], [])
            self.worked_on += len(own)
            yield from self._hand_out(turn, done, results, kind)

    def mean_squares(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """See Wholes: one reduction for all."""
        if not tensors:
            return []
        sums = torch.stack([tensor.double().square().sum() for tensor in tensors])
        dist.all_reduce(sums, group=self.group)
        sizes = [math.prod(self.shape(parameter)) for parameter in parameters]
        return list((sums / sums.new_tensor(sizes) / (self.ranks / len(self.mates))).unbind())

    def _collect(self, turn: Sequence[Sequence[Job]], kind: torch.dtype) -> list[Tensor]:
        """The whole matrices this rank works on in a round, [job, O, I] per entry; it sends its parts of others."""
        own = turn[self.rank]
        if len(self.mates) == 1:
            return stacked([[part.to(kind) for part in job.parts()] for job in own])
        leaving: list[list[Tensor]] = [[] for _ in turn]
        for owner in self.mates:
            for job in turn[owner]:
                leaving[owner] += job.parts()
        entries = len(leaving[self.rank]) // max(len(own), 1)
        shapes = [[self._local(job, rank) for job in own for _ in range(entries)] for rank in range(self.ranks)]
        coming = [shapes[rank] if rank in self.mates else [] for rank in range(self.ranks)]
        arrived = self._exchange(leaving, coming, kind)
        if not own:
            return []
        whole = torch.empty((len(own), entries, *self.shape(own[0].parameter)), dtype=kind, device=self.device)
        for rank in self.mates:
            pieces = iter(arrived[rank])
            for number, job in enumerate(own):
                for entry in range(entries):
                    whole[number, entry][self.spreads[job.parameter].parts[rank]] = next(pieces)
        return list(whole.unbind(1))

    def _hand_out(
        self, turn: Sequence[Sequence[Job]], done: tuple[list[Tensor], list[Tensor]], results: int, kind: torch.dtype
    ) -> Iterator[Done]:
        """Give every rank its parts of what this one has made, and take its own parts of what others have."""
        parts, wholes = done
        leaving: list[list[Tensor]] = [[] for _ in turn]
        for number, job in enumerate(turn[self.rank]):
            for rank, place in enumerate(self.spreads[job.parameter].parts):
                leaving[rank] += [stack[number][place] for stack in parts]
                leaving[rank] += [stack[number] for stack in wholes]
        coming = [
            [
                shape
                for job in batch
                for shape in (*[self._local(job, self.rank)] * results, *(tuple(whole.shape) for whole in job.wholes))
            ]
            for batch in turn
        ]
        for batch, arrived in zip(turn, self._exchange(leaving, coming, kind), strict=True):
            pieces = iter(arrived)
            for job in batch:
                yield Done(job, [next(pieces) for _ in range(results)], [next(pieces) for _ in job.wholes])

    def _local(self, job: Job, rank: int) -> tuple[int, ...]:
        return self.spreads[job.parameter].local(rank)

    def _exchange(
        self, leaving: Sequence[Sequence[Tensor]], coming: Sequence[Sequence[tuple[int, ...]]], kind: torch.dtype
    ) -> list[list[Tensor]]:
        """Give each rank the tensors that are for it; what each has for this one, by the shapes of it."""
        nothing = torch.empty(0, dtype=kind, device=self.device)
        flat = [torch.cat([nothing, *(each.to(kind).reshape(-1) for each in some)]) for some in leaving]
        sizes = [[math.prod(shape) for shape in shapes] for shapes in coming]
        totals = [sum(each) for each in sizes]
        arrived = torch.empty(sum(totals), dtype=kind, device=self.device)
        dist.all_to_all_single(arrived, torch.cat(flat), totals, [each.numel() for each in flat], group=self.group)
        return [
            [piece.view(shape) for piece, shape in zip(part.split(size), shapes, strict=True)]
            for part, size, shapes in zip(arrived.split(totals), sizes, coming, strict=True)
        ]


def deal(jobs: Sequence[Job], shape: Callable[[Tensor], tuple[int, ...]], ranks: int) -> list[list[Job]]:
    """The jobs of each rank: the dearest first, each to the rank that has least to do."""
    costs = {id(job): math.prod(shape(job.parameter)) * min(shape(job.parameter)) for job in jobs}
    dealt: list[list[Job]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for job in sorted(jobs, key=lambda job: -costs[id(job)]):  # stable: the same on every rank
        lightest = loads.index(min(loads))
        dealt[lightest].append(job)
        loads[lightest] += costs[id(job)]
    return dealt


def spread_of(
    shape: tuple[int, int], divided: int | None, places: Sequence[Mapping[str, int]], sizes: MeshSizes
) -> Spread:
    """Where the parts of a matrix are: cut by tensor parallelism, and what is left of it into rows by sharding.

    Args:
        shape: in the unsharded model.
        divided: the dimension that tensor parallelism cuts; None: neither.
        places: by rank of the group, its coordinates along the dimensions of the mesh.
    """
    parts = []
    for place in places:
        rows, columns = (
            part_of(size, place["tp"], sizes.tp) if dim == divided else range(size) for dim, size in enumerate(shape)
        )
        rows = rows[slice_of(part_of(len(rows), place["dp_shard"], sizes.dp_shard))]
        parts.append((slice_of(rows), slice_of(columns)))
    return Spread(shape, tuple(parts))


def slice_of(numbers: range) -> slice:
    """The same places."""
    return slice(numbers.start, numbers.stop)


def mesh_wholes(
    held: Mapping[str, Tensor], mesh: Mesh, layout: Callable[[str], tuple[tuple[int, ...], int | None]]
) -> MeshWholes:
    """The seam between the rules and a model on its mesh.

    Args:
        held: what this rank has of each parameter, by name in the unsharded model.
        layout: by name, the whole shape and the dimension that tensor parallelism cuts.
    """
    inside = [dimension for dimension in DIMENSIONS if dimension != "pp"]
    places = [
        dict(zip(inside, place, strict=True))
        for place in product(*(range(getattr(mesh.sizes, dimension)) for dimension in inside))
    ]
    spreads = {}
    for name, parameter in held.items():
        if kind_of(name, parameter.ndim) == "matrices":
            (rows, columns), divided = layout(name)
            spreads[parameter] = spread_of((rows, columns), divided, places, mesh.sizes)
    return MeshWholes(stage_group(mesh), spreads, [place["dp_replicate"] for place in places], mesh.device)


def stage_group(mesh: Mesh) -> ProcessGroup:
    """The ranks of this one's stage of the pipeline. Called by all ranks of the run."""
    if mesh.sizes.pp > 1:
        assert mesh.device_mesh is not None
        groups = [dist.new_group(stage.flatten().tolist()) for stage in mesh.device_mesh.mesh]
        return groups[mesh.coordinate("pp")]
    assert dist.group.WORLD is not None
    return dist.group.WORLD
