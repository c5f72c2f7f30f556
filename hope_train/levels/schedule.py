"""Who steps when, and how far: pure functions of counters. No torch, no ranks, no update rule.

Nested Learning (arXiv 2512.24695), Eqs. 70-74: level l of the Continuum Memory System is updated every C^(l) steps.
Steps and updates count from 1. A *set* is what steps together: `core` (all parameters outside the levels, period 1)
and `level_0`, `level_1`, … from the fastest level to the slowest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from hope_train.config.train import ScheduleConfig
from hope_train.config.tree import RunConfig

CORE = "core"

REST_AT_A_TIME = 256 * 2**20
"""Bytes of moments that are on the device at once while sets that rest in host memory are stepped (one parameter's at
least); see `resting`."""

_LEVEL = re.compile(r"(?:^|\.)cms\.levels\.(\d+)\.")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


def canonical_name(parameter_name: str) -> str:
    """The parameter's name without the segments that torch.compile and activation checkpointing put in."""
    return _WRAPPERS.sub("", parameter_name)


def level_of(parameter_name: str) -> int | None:
    """The CMS level that owns a parameter: `blocks.3.cms.levels.1.up.weight` -> 1. None: the core."""
    match = _LEVEL.search(parameter_name)
    return int(match.group(1)) if match else None


def set_name(level: int | None) -> str:
    """`core` for None, `level_<l>` for level l: the name of its shard set in a checkpoint."""
    return CORE if level is None else f"level_{level}"


def due(step: int, period: int) -> bool:
    """Whether a set of this period takes an update at this step (counted from 1)."""
    if step < 1 or period < 1:
        raise ValueError(f"step={step}, period={period}: both count from 1")
    return step % period == 0


def lr_at(update: int, total_updates: int, warmup_updates: int, schedule: ScheduleConfig) -> float:
    """Factor on the peak learning rate for the `update`-th update of a set (counted from 1), in [0, 1].

    Linear warm-up: update/warmup_updates, so that the first update moves and update `warmup_updates` has the full
    rate. Then from the full rate to exactly `min_ratio` at update `total_updates`: cosine, or (wsd) constant with a
    linear end over the last `decay_fraction` of all updates. Later updates keep the last factor. A warm-up that is
    longer than the run leaves no room for a decay.

    Raises ValueError for an update below 1.
    """
    if update < 1:
        raise ValueError(f"update={update}: updates count from 1")
    if update < warmup_updates:
        return update / warmup_updates
    peak = max(1, warmup_updates)
    if schedule.kind == "constant":
        return 1.0
    start = float(peak)
    if schedule.kind == "wsd":
        start = max(start, total_updates * (1.0 - schedule.decay_fraction))
    span = total_updates - start
    if span <= 0.0 or update <= start:
        return 1.0
    progress = min(1.0, (update - start) / span)
    if progress == 1.0:
        return schedule.min_ratio
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return min(1.0, schedule.min_ratio + (1.0 - schedule.min_ratio) * remaining)


@dataclass(frozen=True)
class SetPlan:
    """One set's part of the run: the core, or one CMS level over all blocks."""

    name: str
    """`core` or `level_<l>`."""

    level: int | None
    """l, or None for the core."""

    period: int
    """Steps per update."""

    lr: float
    """Peak learning rate: the run's times the level's lr_scale."""

    warmup_updates: int
    """Length of the warm-up in updates of this set."""

    total_updates: int
    """Updates of this set in the whole run; a period that the run leaves unfinished makes none."""


@dataclass(frozen=True)
class LevelPlan:
    """The schedule of a whole run, for every set."""

    sets: tuple[SetPlan, ...]
    """The core first, then the levels from the fastest to the slowest."""

    schedule: ScheduleConfig
    """The shape that every set follows over its own updates."""

    nested_rate: float | None = None
    """None, or for the nested variant (Eq. 72) the share of the way that an initial state moves at a reset."""

    @classmethod
    def from_config(cls, run: RunConfig) -> LevelPlan:
        """The plan of a configured run. Lengths given in tokens are rounded up to whole steps."""
        optimizer, total_steps = run.optimizer, run.train.total_steps
        warmup_steps = run.train.steps_for(optimizer.schedule.warmup_tokens)
        sets = [SetPlan(CORE, None, 1, optimizer.lr, warmup_steps, total_steps)]
        for index, level in enumerate(run.model.cms.levels):
            warmup = level.warmup_updates
            if warmup is None:
                warmup = max(1, warmup_steps // level.period) if warmup_steps else 0
            sets.append(
                SetPlan(
                    name=set_name(index),
                    level=index,
                    period=level.period,
                    lr=optimizer.lr * level.lr_scale,
                    warmup_updates=warmup,
                    total_updates=total_steps // level.period,
                )
            )
        nested = run.model.cms.variant == "nested"
        return cls(tuple(sets), optimizer.schedule, run.model.cms.nested_rate if nested else None)

    def due_sets(self, step: int) -> tuple[str, ...]:
        """Names of the sets that take an update at this step, the core first."""
        return tuple(part.name for part in self.sets if due(step, part.period))

    def lr(self, part: SetPlan, update: int) -> float:
        """Learning rate of a set's `update`-th update (counted from 1)."""
        return part.lr * lr_at(update, part.total_updates, part.warmup_updates, self.schedule)

    def reset_sets(self, step: int) -> tuple[str, ...]:
        """Nested variant: the levels that return to their initial state after the updates of this step.

        Level l resets when level l+1 updates. Periods being multiples of each other, these are all the levels
        faster than the slowest one due.
        """
        if self.nested_rate is None:
            return ()
        levels = [part for part in self.sets if part.level is not None]
        return tuple(fast.name for fast, slow in pairwise(levels) if due(step, slow.period))

    def anchored_sets(self) -> tuple[str, ...]:
        """Nested variant: the levels that keep an initial state, i.e. all but the slowest."""
        if self.nested_rate is None:
            return ()
        return tuple(part.name for part in self.sets if part.level is not None)[:-1]

    def warnings(self) -> list[str]:
        """One line for each level that this run cannot train as configured; empty when all is well."""
        lines = []
        for part in self.sets:
            if part.total_updates == 0:
                lines.append(f"{part.name} (period {part.period}) makes no update: the run is shorter than its period")
            elif part.warmup_updates > part.total_updates:
                lines.append(
                    f"{part.name} (period {part.period}) makes {part.total_updates} updates and its warm-up "
                    f"takes {part.warmup_updates}: it never reaches its learning rate"
                )
        return lines
