"""metrics.jsonl and eval.jsonl: lines appended whole, cut back to the checkpoint at a resume; clocks and memory."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hope_train.checkpoint.fence import write_atomically

Row = dict[str, Any]


class JsonLines:
    """Appends rows to a file, each whole or not at all.

    A full disk loses no line: what could not be written is kept and tried again with the next.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[bytes] = []

    def write(self, row: Row) -> None:
        """Append a row; numbers that are not finite become null. Raises OSError, the row is then kept for later."""
        self._waiting.append((json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n").encode())
        self.flush()

    def flush(self) -> None:
        """Write what is waiting. Raises OSError."""
        while self._waiting:
            size = os.fstat(self._file).st_size
            line = self._waiting[0]
            try:
                written = os.write(self._file, line)
                if written != len(line):
                    raise OSError(28, "No space left on device", str(self.path))
            except OSError:
                os.ftruncate(self._file, size)
                raise
            self._waiting.pop(0)

    def sync(self) -> None:
        """Write what is waiting and flush it to the disk. Raises OSError."""
        self.flush()
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file. What is waiting is given a last try."""
        try:
            self.flush()
        finally:
            os.close(self._file)


class NoLines(JsonLines):
    """In the place of a file that another process of the run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Row) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def cut_back(path: Path, step: int, suffix: str) -> int:
    """Leave in a file only whole rows of steps up to `step`; the rest is kept beside it, under a name with `suffix`.

    A last line that was torn by a kill goes the same way. Returns the number of lines taken out. Raises OSError.
    """
    if not path.exists():
        return 0
    kept: list[bytes] = []
    cut: list[bytes] = []
    for line in path.read_bytes().split(b"\n"):
        if line.strip(b"\x00 \r\t"):
            (kept if _step(line, step) <= step else cut).append(line)
    whole = b"".join(line + b"\n" for line in kept)
    if whole == path.read_bytes():
        return 0
    if cut:
        with path.with_name(f"{path.stem}.{suffix}{path.suffix}").open("ab") as copy:
            copy.writelines(line + b"\n" for line in cut)
            copy.flush()
            os.fsync(copy.fileno())
    write_atomically(path, whole.decode("utf-8"))
    return len(cut)


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file; lines that are no JSON object are left out."""
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _step(line: bytes, limit: int) -> float:
    """A line's step; infinite for what is no row."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def strict(value: Any) -> Any:
    """`value` with null for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Wall time of training alone."""

    def __init__(self) -> None:
        self._running_since = time.perf_counter()
        self._collected = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that is not training: an evaluation, a save."""
        self._collected += time.perf_counter() - self._running_since
        try:
            yield
        finally:
            self._running_since = time.perf_counter()

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        seconds = self._collected + now - self._running_since
        self._collected, self._running_since = 0.0, now
        return seconds


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has had: torch's on a GPU, the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
