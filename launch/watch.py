"""Is a run getting on? Told from outside, by the files it writes; nothing is asked of its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hope_train.checkpoint.manifest import CHECKPOINTS
from launch.site import Survival

OPENING = "opening"


@dataclass(frozen=True)
class Look:
    """What the files say at one moment."""

    phase: str
    step: int
    marks: tuple[object, ...]
    """Anything that changes when the run gets on."""


class Watch:
    """Remembers when something last moved. One start of a run has one."""

    def __init__(
        self, run_dir: Path, heartbeat: Path, limits: Survival, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`heartbeat`: the file that rank 0 of this start writes. `clock`: seconds."""
        self.run_dir, self.heartbeat, self.limits, self.clock = run_dir, heartbeat, limits, clock
        self.first_step: int | None = None
        self.last = self._look()
        self.moved = clock()

    def hang(self) -> str | None:
        """The phase in which nothing has moved for longer than its limit, or None."""
        now, seen = self.clock(), self._look()
        if seen != self.last:
            self.last, self.moved = seen, now
        return seen.phase if now - self.moved > self._limit(seen.phase) else None

    @property
    def idle_s(self) -> float:
        """Seconds since something was seen to move."""
        return self.clock() - self.moved

    def _limit(self, phase: str) -> float:
        limits = self.limits
        return {
            OPENING: limits.opening_s,
            "save": limits.save_s,
            "evaluate": limits.evaluate_s,
            "closing": limits.save_s,
        }.get(phase, limits.step_s)

    def _look(self) -> Look:
        phase, step = read_heartbeat(self.heartbeat)
        growing = bytes_under(self.run_dir / CHECKPOINTS) if phase in ("save", "closing") else 0
        size = file_size(self.run_dir / "metrics.jsonl") + file_size(self.run_dir / "eval.jsonl")
        if phase == "step":
            if self.first_step is None:
                self.first_step = step
            if step == self.first_step:  # kernels are compiled in it: it may take as long as the opening
                phase = OPENING
        return Look(phase, step, (step, size, growing))


def read_heartbeat(file: Path) -> tuple[str, int]:
    """(phase, step) of a run; (`opening`, 0) before its first word."""
    try:
        phase, step, _ = file.read_text(encoding="ascii").split()
        return phase, int(step)
    except (OSError, ValueError):
        return OPENING, 0


def bytes_under(folder: Path) -> int:
    """Bytes of all files in a folder that may be changing while it is looked at."""
    total = 0
    for place, _, files in os.walk(folder, onerror=lambda error: None):
        total += sum(file_size(Path(place, name)) for name in files)
    return total


def file_size(file: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
