"""Who may write into a run directory: the newest incarnation of the run, and nobody else.

Every start of a run takes the directory over by writing a new id into `incarnation.json`. A writer asks for its own id
before it publishes or deletes anything; a process that was taken for dead and is not (a partitioned node, a forgotten
terminal) thereby stops instead of mixing its files with its successor's.
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
        """Make this process the current incarnation. Raises UserError while another process here is training in it."""
        fence = cls(run_dir, f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}")
        refuse_if_in_use(run_dir)
        entry = {"id": fence.id, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        with fence._locked():
            write_atomically(run_dir / INCARNATION, json.dumps(entry) + "\n")
        return fence

    def check(self) -> None:
        """Raises FencedError when another incarnation has taken over (or the file is gone)."""
        current = _read(self.run_dir)
        if current is None:
            raise FencedError(f"{self.run_dir / INCARNATION} is gone: this process no longer owns the run, and stops")
        if current.get("id") != self.id:
            who = f"{current.get('id')} (process {current.get('pid')} on {current.get('host')})"
            raise FencedError(f"{self.run_dir} was taken over by {who}: this process writes nothing more, and stops")

    def release(self) -> None:
        """This process is done with the directory: the next start need not wait for it to end."""
        with contextlib.suppress(OSError, FencedError), self.held():
            write_atomically(self.run_dir / INCARNATION, json.dumps({"id": self.id}) + "\n")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the length of a block nobody takes over (on file systems with locks). Raises FencedError."""
        with self._locked():
            self.check()
            yield

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return _lock(self.run_dir)


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
