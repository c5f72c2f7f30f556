"""What a run is busy with, for a launcher that watches it from outside: one small file, written by rank 0."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HEARTBEAT = "HOPE_HEARTBEAT"
"""Environment: the file to write. Without it nothing is written."""

EVERY = 1.0
"""Seconds between two writes while the phase stays the same."""

_last: tuple[str, float] = ("", 0.0)


def beat(phase: str, step: int) -> None:
    """Say that the run is in `phase` (`opening`, `step`, `save`, `evaluate`, `closing`) at `step`: `phase step time`.

    It costs nothing worth naming, and a file that cannot be written is no reason to stop.
    """
    global _last
    path, now = os.environ.get(HEARTBEAT), time.time()
    if path is None or (phase == _last[0] and now - _last[1] < EVERY):
        return
    _last = (phase, now)
    with suppress(OSError), open(path, "w", encoding="ascii") as file:
        file.write(f"{phase} {step} {now:.3f}\n")


@contextmanager
def phase(name: str, step: int) -> Iterator[None]:
    """A block of work between steps."""
    beat(name, step)
    try:
        yield
    finally:
        beat("step", step)
