"""All ranks of a run deciding together, over a group of its own that never waits for a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from hope_train.errors import UserError

T = TypeVar("T")


class SharedError(UserError):
    """A mistake of the user's that rank 0 reports: this rank only has to stop."""


class Team:
    """The ranks of a run. One process alone is a team too, and asks nobody."""

    def __init__(self, rank: int = 0, ranks: int = 1, group: ProcessGroup | None = None) -> None:
        """`group` carries CPU tensors and Python objects between all ranks; None for one process."""
        self.rank, self.ranks, self.group = rank, ranks, group

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which speaks, logs and owns the run directory."""
        return self.rank == 0

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on every rank (as a pickled copy). Its UserError is raised on all of them."""
        return self.together(lambda: action() if self.leads else None)[0]  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank; what each of them got. If it fails on one, it fails on all.

        Raises UserError where a rank did (the first such rank's), the rank's own exception for anything else, and
        RuntimeError on the others.
        """
        if self.group is None:
            return [action()]
        outcome: tuple[Any, str | None, bool]
        failure: Exception | None = None
        try:
            outcome = (action(), None, False)
        except Exception as error:
            failure = error
            outcome = (None, str(error) or type(error).__name__, isinstance(error, UserError))
        outcomes: list[Any] = [None] * self.ranks
        dist.all_gather_object(outcomes, outcome, group=self.group)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        for rank, (_, message, users) in enumerate(outcomes):
            if message is not None and users:
                raise UserError(message) if self.leads else SharedError(message)
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")
        return [value for value, _, _ in outcomes]

    def largest(self, values: Sequence[int]) -> list[int]:
        """Entry by entry the largest value that any rank has."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, value: int) -> int:
        """The sum of all ranks' values."""
        return self._reduced([value], dist.ReduceOp.SUM)[0]

    def _reduced(self, values: Sequence[int], operation: Any) -> list[int]:
        if self.group is None:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, operation, group=self.group)
        return [int(number) for number in numbers]
