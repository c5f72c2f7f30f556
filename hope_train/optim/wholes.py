"""How a rule gets at whole matrices. Here: one process, which holds them.

An engine that spreads matrices over ranks subclasses this; the rules do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.optim.kinds import batch_size

Stacks = list[Tensor]
"""Each [n, O, I]: n matrices of one shape."""

Work = Callable[[Stacks, Stacks], tuple[Stacks, Stacks]]
"""From stacks of matrices in parts, and stacks of states that are whole everywhere, to new ones of both kinds."""


@dataclass(frozen=True)
class Job:
    """One matrix to be worked on."""

    parameter: Tensor
    """It, or this rank's part of it."""

    parts: Callable[[], Sequence[Tensor]]
    """Makes what goes in, each of the parameter's local shape, when the job's turn has come. Called once."""

    wholes: Sequence[Tensor] = ()
    """Goes in besides: the same on every rank."""


@dataclass(frozen=True)
class Done:
    """What came of a job on this rank."""

    job: Job
    parts: Sequence[Tensor]
    """Each of the parameter's local shape."""

    wholes: Sequence[Tensor]
    """The same on every rank."""


class Wholes:
    """One process that holds every matrix whole."""

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The parameter's shape in the unsharded model."""
        return tuple(parameter.shape)

    def each(
        self, jobs: Sequence[Job], work: Work, results: int = 1, dtype: torch.dtype | None = None
    ) -> Iterator[Done]:
        """Do `work` on every job's whole matrices, each on one rank; jobs come back as they are done.

        Over several ranks every one calls it with the jobs of the same parameters in the same order.

        Args:
            results: stacks in parts that `work` returns; besides, as many whole states as it is given.
            dtype: the type in which parts are handed over and worked on. None: the parameters'.
        """
        for batch in batches(jobs, self.shape):
            parts = stacked([[part if dtype is None else part.to(dtype) for part in job.parts()] for job in batch])
            done_parts, done_wholes = work(parts, stacked([job.wholes for job in batch]))
            for number, job in enumerate(batch):
                yield Done(job, [stack[number] for stack in done_parts], [stack[number] for stack in done_wholes])

    def mean_squares(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Mean of the squares of each whole matrix, from the part that each rank holds of it; scalars in float64."""
        return [tensor.double().square().mean() for tensor in tensors]


def batches(jobs: Sequence[Job], shape: Callable[[Tensor], tuple[int, ...]]) -> list[list[Job]]:
    """Jobs whose matrices have one whole shape and type together, below BATCH_BYTES."""
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[Job]] = {}
    for job in jobs:
        groups.setdefault((shape(job.parameter), job.parameter.dtype), []).append(job)
    found = []
    for (size, dtype), members in groups.items():
        each = batch_size(size, dtype.itemsize)
        found += [members[first : first + each] for first in range(0, len(members), each)]
    return found


def stacked(rows: Sequence[Sequence[Tensor]]) -> Stacks:
    """[job][entry] -> per entry one stack over the jobs."""
    return [torch.stack(list(column)) for column in zip(*rows, strict=True)]
