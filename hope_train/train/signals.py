"""Asking a run to stop: signals, and a file called STOP in the run directory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hope_train.parallel.team import Team

STOP_FILE = "STOP"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ANSWERS = (f"{STOP_FILE} file", *(number.name for number in SIGNALS))
"""Who may ask."""


class Interrupted(BaseException):
    """A stop was asked for during work that may be dropped and done again. No error: no `except Exception` is meant."""


class StopRequest:
    """Remembers that a stop was asked for; the loop looks at it between steps. Use as a context manager.

    A first signal lets the step finish and the run save. A second SIGINT aborts at once (KeyboardInterrupt): whoever
    presses Ctrl-C twice does not want to wait. SIGHUP stays ignored where it was (nohup). Outside the main thread only
    the file is looked at.
    """

    def __init__(self, run_dir: Path, alone: bool = True) -> None:
        """`alone`: this process is the whole run. Work shared with others is never cut short."""
        self.file = run_dir / STOP_FILE
        self.alone = alone
        self.signal: str | None = None
        self._interrupts = 0
        self._droppable = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Signals are treated as before again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number).name
        if self._droppable:
            self._droppable = False
            raise Interrupted

    def asked(self) -> str | None:
        """Who asked for a stop: `SIGTERM`, `STOP file`, … None: nobody."""
        if self.signal is None and self.file.exists():
            return f"{STOP_FILE} file"
        return self.signal

    def asked_by_any(self, team: Team) -> str | None:
        """As `asked`, the same answer on all ranks: a signal may reach only one of them, or each at another step."""
        if team.ranks == 1:
            return self.asked()
        mine = self.asked()
        (found,) = team.largest([0 if mine is None else ANSWERS.index(mine) + 1])
        return ANSWERS[found - 1] if found else None

    def obeyed(self) -> None:
        """Remove the STOP file: it has been obeyed, and is no order to the next start."""
        with contextlib.suppress(OSError):
            self.file.unlink()

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """A block that a signal cuts short, up to `opened`: nothing has been begun that would have to be ended.

        A STOP file is left for the loop. With several processes the signal waits for the loop, as in `droppable`.
        """
        self._droppable = self.alone
        try:
            if self.alone and self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._droppable = False

    def opened(self) -> None:
        """From here on a signal waits for the loop."""
        self._droppable = False

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """A block that a signal cuts short, by raising Interrupted, instead of waiting for its end.

        For work without a trace in the run's state, such as an evaluation that takes minutes. With several processes
        it waits: one that leaves the work would leave the others waiting for it.
        """
        if not self.alone:
            yield
            return
        self._droppable = True
        try:
            if self.asked() is not None:
                raise Interrupted
            yield
        finally:
            self._droppable = False
