"""What a person sees of a run: a progress bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Time between two lines where there is no terminal."""


class Display:
    """Prints to stdout, or to stderr where stdout is for JSON. May be called from any thread."""

    def __init__(self, bar: bool, to_stderr: bool = False, silent: bool = False) -> None:
        """`silent`: print nothing at all (one process of a run speaks for all)."""
        self._console = Console(
            stderr=to_stderr, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=silent
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
