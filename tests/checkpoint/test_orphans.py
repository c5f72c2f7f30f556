"""A writer that was taken for dead, overtaken at every single file operation of its save.

At the k-th file operation of an orphan's save its successor claims the directory, saves the same step, and only then
may the orphan go on: for every k the successor's checkpoints stay what they were.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hope_train.checkpoint.fence import CLAIM, FencedError, claim
from hope_train.checkpoint.manifest import list_checkpoints, step_name, verify
from hope_train.checkpoint.store import load_state
from hope_train.checkpoint.writer import CheckpointWriter, SaveError
from hope_train.errors import UserError
from tests.checkpoint.toy import assert_equal, blank, facts, make_state, make_writer

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir")
_listener: list[Callable[[], None]] = []
_folder: list[str] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _listener and event in WATCHED and arguments and str(arguments[0]).startswith(_folder[0]):
        _listener[0]()


sys.addaudithook(_hear)  # there is no taking it back: it is silent outside `operations`


@contextmanager
def operations(folder: Path, listener: Callable[[], None]) -> Iterator[None]:
    """Call `listener` before every file operation below `folder`, except those that it makes itself."""

    def once() -> None:
        _listener.clear()
        try:
            listener()
        finally:
            _listener.append(once)

    _folder[:] = [str(folder)]
    _listener.append(once)
    try:
        yield
    finally:
        _listener.clear()


def locked(run_dir: Path) -> bool:
    """Whether somebody holds the lock: nobody else can claim the directory then."""
    handle = os.open(run_dir / "incarnation.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def begin(run_dir: Path, start: str) -> CheckpointWriter:
    """What a start does before it trains."""
    claim(run_dir, start)
    os.environ[CLAIM] = start
    writer, _ = make_writer(run_dir, keep_last=1)
    writer.remove_unfinished()
    writer.set_aside(after=10)
    return writer


def overtaken_at(run_dir: Path, moment: int) -> tuple[bool, bool]:
    """(whether there was such a moment, whether the orphan was stopped) in an orphan's save of step 20."""
    run_dir.mkdir()
    orphan = begin(run_dir, "7.0")
    orphan.save(make_state(10), facts(10))
    count, successor = 0, None

    def listener() -> None:
        nonlocal count, successor
        count += 1
        if count >= moment and successor is None and not locked(run_dir):
            successor = begin(run_dir, "7.1")
            successor.save(make_state(99), facts(20))

    fenced = False
    try:
        with operations(run_dir, listener):
            orphan.save(make_state(20), facts(20))
    except (FencedError, SaveError, UserError):  # its half-written folder may be gone under its hands
        fenced = True
    if successor is None:
        return False, fenced
    with pytest.raises(FencedError):
        orphan.save(make_state(20), facts(20))
    # Everything that counts is the successor's, whole, and what it says of itself.
    successor.fence.check()
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert newest.name == step_name(20)
    manifest = verify(newest)
    assert manifest.incarnation == successor.fence.id
    state = blank(make_state(99))
    load_state(newest, manifest, state)
    assert_equal(state, make_state(99))
    successor.save(make_state(30), facts(30))
    assert verify(run_dir / "checkpoints" / step_name(30)).incarnation == successor.fence.id
    return True, fenced


def test_an_orphan_writes_nothing_into_its_successor_s_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CLAIM, "")  # put back as it was afterwards
    outcomes = []
    for moment in range(1, 1000):
        there, fenced = overtaken_at(tmp_path / str(moment), moment)
        if not there:
            break
        outcomes.append(fenced)
    assert len(outcomes) > 20  # a save has many file operations
    assert outcomes[0]
    # Only what had been published before the claim went through, and that was the end of the save.
    assert outcomes == sorted(outcomes, reverse=True)
