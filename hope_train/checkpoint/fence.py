"""Who may write into a run directory: the newest incarnation of the run, and nobody else.

Every start of a run takes the directory over by writing a new id into `incarnation.json`. A writer asks for its own id
before it publishes or deletes anything; a process that was taken for dead and is not (a partitioned node, a forgotten
terminal) thereby stops instead of mixing its files with its successor's.

A launcher claims the directory first (`claim`), in the name of one start of a job: from that moment on no process of an
earlier start may write, nor take the directory over, even one that was only about to.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_train.errors import UserError

INCARNATION = "incarnation.json"
CLAIM = "HOPE_CLAIM"
"""Environment: the start of a job (`<job>.<restart>`) that this process belongs to."""

CLAIMED = "claim"
_LOCK = "incarnation.lock"


class FencedError(Exception):
    """This process no longer owns the run directory. The message is one line."""


@dataclass(frozen=True)
class Fence:
    """The right to write into `run_dir`, for as long as `id` is the current incarnation."""

    run_dir: Path
    id: str

    @classmethod
    def take(cls, run_dir: Path) -> Fence:
        """Make this process the current incarnation.

        Raises UserError while another process here is training in it, and FencedError where this process belongs to a
        start of a job (`CLAIM`) that is not the one which claimed the directory last.
        """
        start = os.environ.get(CLAIM)
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        fence = cls(run_dir, name if start is None else f"{name}-{start}")
        entry = {"id": fence.id, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        with fence._locked():
            refuse_if_in_use(run_dir)
            claimed = (_read(run_dir) or {}).get(CLAIMED)
            if start is not None and claimed != start:
                raise FencedError(f"{run_dir} was claimed by start {claimed} of its job: this one, {start}, is over")
            write_atomically(
                run_dir / INCARNATION, json.dumps(entry | ({} if start is None else {CLAIMED: start})) + "\n"
            )
        return fence

    def check(self) -> None:
        """Raises FencedError when another incarnation has taken over (or the file is gone)."""
        current = _read(self.run_dir)
        if current is None:
            raise FencedError(f"{self.run_dir / INCARNATION} is gone: this process no longer owns the run, and stops")
        if current.get("id") != self.id:
            who = str(current.get("id"))
            if "pid" in current:
                who += f" (process {current['pid']} on {current.get('host')})"
            raise FencedError(f"{self.run_dir} was taken over by {who}: this process writes nothing more, and stops")

    def release(self) -> None:
        """This process is done with the directory: the next start need not wait for it to end."""
        with contextlib.suppress(OSError, FencedError), self.held():
            claimed = {key: value for key, value in (_read(self.run_dir) or {}).items() if key == CLAIMED}
            write_atomically(self.run_dir / INCARNATION, json.dumps({"id": self.id, **claimed}) + "\n")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the length of a block nobody takes over (on file systems with locks). Raises FencedError."""
        with self._locked():
            self.check()
            yield

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return _lock(self.run_dir)


def claim(run_dir: Path, start: str) -> None:
    """Give the directory to a start of a job: writers of before are fenced off at once, and only processes with this
    start in their environment may take it over from here on (or one that a person starts by hand, which has none).

    Raises UserError while a process that no earlier start of the same job brought about trains in it on this machine.
    """
    with _lock(run_dir):
        before = (_read(run_dir) or {}).get(CLAIMED)
        if before is None or _job(str(before)) != _job(start):
            refuse_if_in_use(run_dir)
        write_atomically(run_dir / INCARNATION, json.dumps({"id": f"start {start}", CLAIMED: start}) + "\n")


def claimed_by(run_dir: Path) -> str | None:
    """The start that claimed the directory last, if a launcher ever did and nobody took it by hand since."""
    start = (_read(run_dir) or {}).get(CLAIMED)
    return None if start is None else str(start)


def _job(start: str) -> str:
    return start.rpartition(".")[0]


@contextlib.contextmanager
def unowned(run_dir: Path, force: bool = False) -> Iterator[None]:
    """For work on a run from outside: for the length of a block nobody takes it over (on file systems with locks).

    Raises UserError while a process trains in it. Of a process on another machine that did not say that it was done
    one cannot know whether it lives: that is refused too, unless `force` says that it does not.
    """
    with _lock(run_dir):
        refuse_if_in_use(run_dir)
        current = _read(run_dir) or {}
        host = current.get("host")
        if host is not None and host != socket.gethostname() and not force:
            raise UserError(
                f"run directory {run_dir} belongs to process {current.get('pid')} on {host}, which may still be at "
                "work: run this there, or say --force if you know that it has ended"
            )
        yield


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    handle = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Some network file systems have no locks: what remains there is the check itself.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def refuse_if_in_use(run_dir: Path) -> None:
    """Raises UserError when the current incarnation is a living process on this machine, other than this one."""
    current = _read(run_dir) or {}
    pid = current.get("pid")
    if current.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return
    # A process of the same number that was born at another time is another process.
    if current.get("born") is not None and _born(pid) == current.get("born"):
        raise UserError(f"run directory {run_dir} is in use by process {pid}: stop it first (kill {pid})")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by another, whole or not at all, also across a loss of power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(run_dir: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads((run_dir / INCARNATION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _born(pid: int) -> str | None:
    """When a process was started: this boot's id and the clock ticks since then. None if there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended; it only waits to be collected.
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
