"""What a person sees of a run: a progress bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Time between two lines where there is no terminal."""


class Lasting(io.TextIOBase):
    """A stream that may lose its reader (`| head`, a closed terminal) or its disk: silent from then on, never an error.

    What a run prints is not worth the run.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: None where there is none, as for a process that was started without."""
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Raises OSError where the stream is no file."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write; a character that the stream's encoding lacks becomes a question mark."""
        try:
            if self._stream is not None:
                self._stream.write(text.encode(self.encoding, errors="replace").decode(self.encoding))
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):  # a slow reader
            return
        stream, self._stream = self._stream, None
        # What the stream still holds is written when the process ends: it must find something that takes it.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)


class Display:
    """Prints to stdout, or to stderr where stdout is for JSON. May be called from any thread; never raises."""

    def __init__(self, bar: bool, to_stderr: bool = False, silent: bool = False) -> None:
        """`silent`: print nothing at all (one process of a run speaks for all)."""
        self._stdout = Lasting(sys.stdout)
        stream = Lasting(sys.stderr) if to_stderr else self._stdout
        self._console = Console(
            file=cast(TextIO, stream), highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=silent
        )
        self._wants_bar = bar and self._console.is_terminal and not silent
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._printed = -LINE_SECONDS

    def start(self, step: int, total: int) -> None:
        """Training begins, or goes on, after `step` of `total` steps."""
        if self._wants_bar:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=step)
            self._bar.start()

    def step(self, row: dict[str, Any], total: int) -> None:
        """A step is done; `row` is its line of metrics.jsonl."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row["step"], description=figures(row))
            return
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS or row["step"] == total:
            self._printed = now
            self.say(f"step {row['step']}/{total}  {figures(row)}")

    def say(self, line: str) -> None:
        """One line."""
        self._console.print(line)

    def result(self, text: str) -> None:
        """What the command is asked for, on stdout wherever the rest goes."""
        print(text, file=self._stdout, flush=True)

    def stop(self) -> None:
        """No bar any more; lines can still be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def figures(row: dict[str, Any]) -> str:
    """Loss, learning rate and speed of a step."""
    loss = row["loss"]
    shown = f"loss {loss:.4f}" if loss is not None else "loss not finite"
    return f"{shown}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s"


def evaluation_line(row: dict[str, Any]) -> str:
    """One evaluation: `step 50: validation wikitext-2-raw-v1 word_ppl 812.40 bits_per_byte 1.8123`."""
    names = [key for key in row if key.endswith(("_ppl", "bits_per_byte", "validation_loss"))]
    shown = "  ".join(f"{name} {row[name]:.4f}" for name in names if row[name] is not None)
    partial = " (partial)" if row.get("partial") else ""
    return f"step {row['step']}: {row['split']}, {row['source']}{partial}: {shown}"
