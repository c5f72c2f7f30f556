"""What has to be written at a save, given what the last one left: pure functions of counters. No torch, no ranks.

A level changes only when it takes an update: in between, all that moves is what it has collected of its period. So a
checkpoint consists of `core`, one set per level (weights, moments, initial states, the count of updates), and, for a
level in mid-period, a small set `level_<l>_accumulator` beside it. A level that has taken no update since it was last
written is referred to, not written again. At common multiples of the periods no level is in mid-period and all of
them have just changed: such a save is full and has no accumulators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CORE = "core"
_ACCUMULATOR = "_accumulator"

Contents = dict[str, int | None]
"""The sets of a checkpoint, each with the updates that its level has taken; None: it counts as changed at any time."""


def accumulator_set(level: str) -> str:
    """`level_2` -> `level_2_accumulator`: the set of what the level has collected of its period."""
    return level + _ACCUMULATOR


def is_accumulator_set(name: str) -> bool:
    """Whether a set holds what a level has collected, and no more."""
    return name.endswith(_ACCUMULATOR)


def contents(updates: Mapping[str, int | None], collected: Mapping[str, int]) -> Contents:
    """The sets of a checkpoint now, in the order of `updates`.

    Args:
        updates: by set (`core`, `level_0`, …) the updates it has taken; None where that does not tell if it changed.
        collected: by level the tokens in its accumulator; 0, or not named: it is not in mid-period.
    """
    found: Contents = {}
    for name, count in updates.items():
        found[name] = None if name == CORE else count
        if collected.get(name):
            found[accumulator_set(name)] = None
    return found


def contents_at(step: int, periods: Mapping[str, int]) -> Contents:
    """`contents` after `step` applied steps of a run with these periods: {"core": 1, "level_0": 1, "level_1": 4, …}."""
    return contents(
        {name: step // period for name, period in periods.items()},
        {name: step % period for name, period in periods.items()},
    )


@dataclass(frozen=True)
class SavePlan:
    """One save."""

    write: tuple[str, ...]
    """Sets to be written."""

    refer: tuple[str, ...]
    """Sets that lie where the last save has them."""


def plan_save(now: Mapping[str, int | None], last: Mapping[str, int | None]) -> SavePlan:
    """What to write of `now`, given the sets that the last save holds or refers to (empty: none is to be relied on)."""
    refer = tuple(name for name, count in now.items() if count is not None and last.get(name) == count)
    return SavePlan(tuple(name for name in now if name not in refer), refer)
