"""All ranks of a run deciding together, over a group of its own that never waits for a device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from hope_train.errors import UserError

T = TypeVar("T")


ENDING_S = 30.0
"""How long a rank waits under torchrun for rank 0 to report a mistake."""


class SharedError(UserError):
    """A mistake of the user's that rank 0 reports: this rank only has to stop."""


def leave_to_first(error: SharedError) -> int:
    """End a rank that has nothing to say; returns the exit code.

    torchrun ends all ranks of a node as soon as one has ended: rank 0, which may still be starting, would be cut short
    before it has said what is wrong. So the ranks of its node wait for that end; one that it does not come to says what
    is wrong itself. On other nodes, where a file may be missing that is there on rank 0's, the first rank says it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        beside_first = os.environ.get("GROUP_RANK") == "0"
        if beside_first:
            time.sleep(ENDING_S)
        if beside_first or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: rank {os.environ.get('RANK')}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


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
        """What `action` gives on rank 0, on every rank (as a pickled copy). If it fails there, it fails on all."""
        if self.group is None:
            return action()
        found: list[T] = []
        self.together(lambda: found.append(action()) if self.leads else None)
        box: list[Any] = [found[0] if found else None]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        value: T = box[0]
        return value

    def of_first(self, value: int) -> int:
        """The value that rank 0 has."""
        if self.group is None:
            return value
        number = torch.tensor(value, dtype=torch.int64)
        dist.broadcast(number, group=self.group, group_src=0)
        return int(number)

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every rank; what this one got. If it fails on one, it fails on all.

        Raises UserError where a rank did (the first such rank's), the rank's own exception for anything else, and
        RuntimeError on the others.
        """
        if self.group is None:
            return action()
        value: Any = None
        failure: Exception | None = None
        try:
            value = action()
        except Exception as error:
            failure = error
        mine = None if failure is None else (str(failure) or type(failure).__name__, isinstance(failure, UserError))
        messages: list[tuple[str, bool] | None] = [None] * self.ranks
        dist.all_gather_object(messages, mine, group=self.group)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        for rank, entry in enumerate(messages):
            if entry is not None:
                message, users = entry
                if users:
                    raise UserError(message) if self.leads else SharedError(message)
                raise RuntimeError(f"rank {rank} failed: {message}")
        result: T = value
        return result

    def alike(self, action: Callable[[], T]) -> T:
        """Something that fails on every rank or on none: rank 0 reports it."""
        try:
            return action()
        except UserError as error:
            if self.leads:
                raise
            raise SharedError(str(error)) from None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank (as pickled copies)."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

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
