"""Who owns a run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hope_train.checkpoint.fence import INCARNATION, Fence, FencedError, refuse_if_in_use, write_atomically
from hope_train.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from hope_train.checkpoint.fence import Fence
Fence.take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_the_newest_one_owns_it(tmp_path: Path) -> None:
    first = Fence.take(tmp_path)
    first.check()
    second = Fence.take(tmp_path)
    assert second.id != first.id
    second.check()
    with pytest.raises(FencedError, match=f"taken over by {second.id}"):
        first.check()
    with pytest.raises(FencedError), first.held():
        raise AssertionError("not entered")


@pytest.mark.parametrize("spoilt", [None, "", "[]", "{}", '{"id": "other"}'])
def test_without_a_readable_id_nobody_owns_it(tmp_path: Path, spoilt: str | None) -> None:
    fence = Fence.take(tmp_path)
    if spoilt is None:
        (tmp_path / INCARNATION).unlink()
    else:
        (tmp_path / INCARNATION).write_text(spoilt, encoding="utf-8")
    with pytest.raises(FencedError):
        fence.check()
    Fence.take(tmp_path).check()


def test_a_directory_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            Fence.take(tmp_path)
    finally:
        process.kill()
        process.wait(30)
    Fence.take(tmp_path).check()


def test_a_process_that_is_done_lets_go(tmp_path: Path) -> None:
    program = HOLDER.replace("Fence.take(Path(sys.argv[1]))", "fence = Fence.take(Path(sys.argv[1])); fence.release()")
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        new = Fence.take(tmp_path)
    finally:
        process.kill()
        process.wait(30)
    new.check()


def test_letting_go_takes_nothing_from_a_successor(tmp_path: Path) -> None:
    old, new = Fence.take(tmp_path), Fence.take(tmp_path)
    old.release()
    new.check()


@pytest.mark.parametrize("change", [{"host": "another-machine"}, {"born": "another-boot/1"}, {"pid": "x"}])
def test_another_machine_or_a_number_used_again_does_not_block(tmp_path: Path, change: dict[str, object]) -> None:
    # The parent is alive and not this process: only what is changed says that it is not the owner.
    Fence.take(tmp_path)
    entry = json.loads((tmp_path / INCARNATION).read_text(encoding="utf-8"))
    (tmp_path / INCARNATION).write_text(json.dumps({**entry, "pid": 1, **change}), encoding="utf-8")
    refuse_if_in_use(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert file.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
