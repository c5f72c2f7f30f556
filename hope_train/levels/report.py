"""What one step of the level optimizer did: plain numbers for the log."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SetReport:
    """One set (the core or a level) at one step."""

    period: int
    """Steps per update."""

    due: bool
    """Whether this step ended the set's period: it took an update, unless the step was not applied."""

    updates: int
    """Updates made so far, this step's included."""

    lr: float
    """Learning rate of this step's update, or where none is due of the update that this step accumulates for."""

    grad_norm: float | None
    """L2 norm of this step's gradient (not of the period's mean), before clipping. None for a slow set where ranks see
    different samples: its gradient is summed over them once per period only."""

    update_ratio: float | None = None
    """Norm of the change that the update rule made over the norm of the weights before it, this set taken as one
    vector. None when no update was made, when not measured, or when the weights were all zero."""

    reset_ratio: float | None = None
    """Nested variant: how far the initial state moved at this step's reset, over its norm. None as above."""


@dataclass(frozen=True)
class ClipReport:
    """One group of equal period at a step where it is due."""

    norm: float
    """Norm before clipping of the gradients that are applied: the means over the period."""

    scale: float
    """What they were multiplied by: min(1, clip_norm / (norm + 1e-6)), or 1 without clipping."""


@dataclass(frozen=True)
class StepReport:
    """One call of `LevelOptimizer.step`."""

    step: int
    """Steps applied so far, this one included if it was."""

    applied: bool
    """False when the loss or a gradient was not finite (or nothing was scored): nothing changed but `skipped`."""

    skipped: int
    """Steps refused so far."""

    lr: float
    """Learning rate of the core."""

    grad_norm: float
    """L2 norm of this step's gradient over the sets of period 1, before clipping: the same number however the run is
    spread. Not finite when a gradient, of any set, is the reason why the step was refused."""

    sets: dict[str, SetReport]
    """By set name: `core`, `level_0`, …"""

    clips: dict[int, ClipReport] = field(default_factory=dict)
    """By period, for the groups due at this step."""

    def metrics(self) -> dict[str, Any]:
        """For a line of metrics.jsonl: `lr`, `grad_norm`, and `levels` keyed `core`, `0`, `1`, … What is not finite
        becomes None, since JSON has no word for it."""
        levels = {}
        for name, part in self.sets.items():
            record = {key: _plain(value) for key, value in asdict(part).items()}
            if record["reset_ratio"] is None:
                del record["reset_ratio"]
            levels[name.removeprefix("level_")] = record
        clips = {
            str(period): {key: _plain(v) for key, v in asdict(clip).items()} for period, clip in self.clips.items()
        }
        return {"lr": self.lr, "grad_norm": _plain(self.grad_norm), "levels": levels, "clip": clips}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
