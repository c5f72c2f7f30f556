"""Who owns a run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hope_train.checkpoint.fence import (
    CLAIM,
    INCARNATION,
    Fence,
    FencedError,
    claim,
    claimed_by,
    refuse_if_in_use,
    write_atomically,
)
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


# Starts of a job


def start(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """This process belongs to a start of a job from here on, or to none."""
    monkeypatch.setenv(CLAIM, name) if name is not None else monkeypatch.delenv(CLAIM, raising=False)


def test_a_claim_fences_off_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, "7.0")
    claim(tmp_path, "7.0")
    old = Fence.take(tmp_path)
    assert old.id.endswith("-7.0")
    claim(tmp_path, "7.1")
    assert claimed_by(tmp_path) == "7.1"
    with pytest.raises(FencedError, match=r"taken over by start 7\.1"):
        old.check()
    old.release()
    assert claimed_by(tmp_path) == "7.1"


def test_a_rank_of_an_earlier_start_that_comes_late_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, "7.1")
    for late in ("7.0", "6.4", "7.10"):
        start(monkeypatch, late)
        with pytest.raises(FencedError, match="is over"):
            Fence.take(tmp_path)
    start(monkeypatch, "7.1")
    new = Fence.take(tmp_path)
    new.check()
    start(monkeypatch, "7.0")
    with pytest.raises(FencedError):
        Fence.take(tmp_path)
    new.check()


def test_a_claim_outlives_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, "7.1")
    claim(tmp_path, "7.1")
    Fence.take(tmp_path).release()
    start(monkeypatch, "7.0")
    with pytest.raises(FencedError):
        Fence.take(tmp_path)


def test_a_person_may_take_over_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, "7.0")
    start(monkeypatch, None)
    Fence.take(tmp_path).check()
    assert claimed_by(tmp_path) is None
    start(monkeypatch, "7.0")
    with pytest.raises(FencedError, match="start None"):
        Fence.take(tmp_path)


def test_only_a_start_of_the_same_job_may_claim_what_a_living_process_here_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own earlier ranks may live on as orphans; anybody else's process is at work."""
    monkeypatch.setenv(CLAIM, "7.0")
    claim(tmp_path, "7.0")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match="in use"):
            claim(tmp_path, "8.0")
        claim(tmp_path, "7.1")
    finally:
        process.kill()
        process.wait(30)
    claim(tmp_path, "8.0")
