"""Saving: whole or not at all, in the background or not, fenced, pruned; and a disk that is full."""

from __future__ import annotations

import errno
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint import writer as writer_module
from hope_train.checkpoint.fence import Fence, FencedError
from hope_train.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from hope_train.checkpoint.store import load_state, newest_whole
from hope_train.checkpoint.writer import SaveError
from tests.checkpoint.toy import assert_equal, blank, facts, make_state, make_writer, names, save_steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def loaded(folder: Path, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    state = blank(make_state(seed))
    load_state(folder, verify(folder), state)
    return state


@pytest.mark.parametrize("async_save", [False, True])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, async_save: bool) -> None:
    writer, said = make_writer(tmp_path, async_save=async_save)
    for step in (1, 2, 3):
        writer.save(make_state(step), facts(step), wait=False)
    writer.finish()
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    for step in (1, 2, 3):
        assert_equal(loaded(tmp_path / "checkpoints" / f"step_{step:08d}", step), make_state(step))
    assert writer.last == tmp_path / "checkpoints" / "step_00000003"
    assert said == []


class TestInTheBackground:
    """`async_save`."""

    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        """Writing waits until it is set."""
        event = threading.Event()
        write = writer_module.save_set

        def slow(*arguments: Any) -> None:
            assert event.wait(60)
            write(*arguments)

        monkeypatch.setattr(writer_module, "save_set", slow)
        yield event
        event.set()

    def test_training_goes_on_and_what_was_is_saved(self, tmp_path: Path, gate: threading.Event) -> None:
        writer, _ = make_writer(tmp_path, async_save=True)
        state = make_state(5)
        writer.save(state, facts(5), wait=False)
        for part in state.values():
            for tensor in part.values():
                tensor.zero_()  # the next steps
        writer.poll()
        assert newest_whole(tmp_path, print) is None, "nothing is there before it is whole"
        gate.set()
        writer.finish()
        assert_equal(loaded(tmp_path / "checkpoints" / "step_00000005", 5), make_state(5))

    def test_a_second_save_waits_for_the_first(self, tmp_path: Path, gate: threading.Event) -> None:
        writer, _ = make_writer(tmp_path, async_save=True)
        writer.save(make_state(1), facts(1), wait=False)
        threading.Timer(0.1, gate.set).start()
        writer.save(make_state(2), facts(2), wait=False)
        assert (tmp_path / "checkpoints" / "step_00000001" / MANIFEST).is_file()
        writer.finish()
        assert names(tmp_path) == ["step_00000001", "step_00000002"]

    @pytest.mark.parametrize("how", ["poll", "finish", "save"])
    def test_an_error_is_raised_in_the_training_thread_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        writer, _ = make_writer(tmp_path, async_save=True)
        with monkeypatch.context() as patch:
            patch.setattr(writer_module, "save_set", raise_full)
            writer.save(make_state(1), facts(1), wait=False)
            assert writer._thread is not None
            writer._thread.join()
        actions = {"poll": writer.poll, "finish": writer.finish}
        with pytest.raises(SaveError, match="step 1 could not be saved"):
            actions.get(how, lambda: writer.save(make_state(2), facts(2)))()
        writer.save(make_state(3), facts(3))
        assert names(tmp_path) == ["step_00000003"]


def raise_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: the kernel itself refuses, wherever in the libraries the write is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    """The checkpoints before are whole, nothing of the failed one is left, and one line says it."""

    @pytest.mark.parametrize("place", ["save_set", "write_synced", "record_files", "sync_folders"])
    def test_at_every_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
        writer = save_steps(tmp_path, [1])
        with monkeypatch.context() as patch:
            patch.setattr(writer_module, place, raise_full)
            with pytest.raises(
                SaveError, match=r"step 2 could not be saved .*No space left.*free some space"
            ) as caught:
                writer.save(make_state(2), facts(2))
        assert "\n" not in str(caught.value)
        assert [name for name in names(tmp_path) if "tmp" in name] == []
        assert_equal(loaded(tmp_path / "checkpoints" / "step_00000001", 1), make_state(1))
        writer.save(make_state(3), facts(3))
        assert_equal(loaded(tmp_path / "checkpoints" / "step_00000003", 3), make_state(3))

    @pytest.mark.parametrize("limit", [0, 100, 3000, 30000])
    def test_refused_by_the_kernel(self, tmp_path: Path, limit: int) -> None:
        writer = save_steps(tmp_path, [1])
        with small_files(limit), pytest.raises(SaveError, match="step 2 could not be saved") as caught:
            writer.save(make_state(2), facts(2))
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["step_00000001"]
        verify(tmp_path / "checkpoints" / "step_00000001")

    def test_an_old_checkpoint_that_cannot_be_deleted_is_only_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer, said = make_writer(tmp_path, keep_last=1)
        writer.save(make_state(1), facts(1))
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: raise_full() if "pruned" in str(path) else None)
        writer.save(make_state(2), facts(2))
        assert writer.last_step == 2
        assert len(said) == 1
        assert "could not be deleted" in said[0]


class TestPruning:
    """What is kept."""

    @pytest.mark.parametrize(
        ("keep_last", "keep_every", "kept"),
        [
            (1, 0, [7]),
            (2, 0, [6, 7]),
            (99, 0, [1, 2, 3, 4, 5, 6, 7]),
            (1, 3, [3, 6, 7]),
            (2, 4, [4, 6, 7]),
            (1, 1, [1, 2, 3, 4, 5, 6, 7]),
        ],
    )
    def test_newest_and_multiples(self, tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
        save_steps(tmp_path, [1, 2, 3, 4, 5, 6, 7], keep_last=keep_last, keep_every=keep_every)
        assert names(tmp_path) == [f"step_{step:08d}" for step in kept]

    def test_what_a_kept_one_refers_to_stays(self, tmp_path: Path) -> None:
        writer = save_steps(tmp_path, [1, 2, 3])
        new = tmp_path / "checkpoints" / "step_00000003"
        manifest = read_manifest(new)
        old = read_manifest(tmp_path / "checkpoints" / "step_00000001")
        sets = {**manifest.sets, "level_0": old.sets["level_0"]}
        (new / MANIFEST).write_text(Manifest(**{**vars(manifest), "sets": sets}).to_json(), encoding="utf-8")
        shutil.rmtree(new / "level_0")
        writer.keep_last = 1
        writer.prune()
        assert names(tmp_path) == ["step_00000001", "step_00000003"]
        verify(new)
        writer.save(make_state(4), facts(4))
        assert names(tmp_path) == ["step_00000004"]

    def test_what_is_not_understood_is_left_alone(self, tmp_path: Path) -> None:
        writer = save_steps(tmp_path, [1, 2])
        checkpoints = tmp_path / "checkpoints"
        (checkpoints / "step_00000001" / MANIFEST).unlink()
        (checkpoints / "mine").mkdir()
        writer.keep_last = 1
        writer.save(make_state(3), facts(3))
        assert names(tmp_path) == ["mine", "step_00000001", "step_00000003"]

    def test_not_when_told_not_to(self, tmp_path: Path) -> None:
        writer = save_steps(tmp_path, [1], keep_last=1)
        writer.save(make_state(2), facts(2), prune=False)
        assert names(tmp_path) == ["step_00000001", "step_00000002"]


class TestFencing:
    """A writer that is no longer the current incarnation changes nothing."""

    @pytest.mark.parametrize("async_save", [False, True])
    def test_it_publishes_nothing_and_prunes_nothing(self, tmp_path: Path, async_save: bool) -> None:
        old = save_steps(tmp_path, [1, 2], async_save=async_save)
        new, _ = make_writer(tmp_path, keep_last=2)
        old.keep_last = 1

        def save() -> None:
            old.save(make_state(3), facts(3), wait=False)
            old.finish()

        actions: list[Callable[[], None]] = [
            save,
            old.prune,
            old.remove_unfinished,
            lambda: old.set_aside(after=0),
        ]
        for action in actions:
            with pytest.raises(FencedError, match="taken over"):
                action()
        assert names(tmp_path) == ["step_00000001", "step_00000002"]
        new.save(make_state(3), facts(3))
        assert names(tmp_path) == ["step_00000002", "step_00000003"]

    def test_taken_over_in_the_middle_of_a_save(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = save_steps(tmp_path, [1])
        write = writer_module.write_manifest

        def overtaken(*arguments: Any) -> Manifest:
            manifest = write(*arguments)
            Fence.take(tmp_path)
            return manifest

        monkeypatch.setattr(writer_module, "write_manifest", overtaken)
        with pytest.raises(FencedError):
            writer.save(make_state(2), facts(2))
        assert names(tmp_path) == ["step_00000001"]


def test_leftovers_of_killed_processes_are_removed_and_named(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    checkpoints = tmp_path / "checkpoints"
    for name in ("step_00000002.tmp-a", "step_00000001.tmp-a-pruned"):
        shutil.copytree(checkpoints / "step_00000001", checkpoints / name)
    shutil.copytree(checkpoints / "step_00000001", checkpoints / "step_00000009.superseded-a")
    writer, said = make_writer(tmp_path)
    writer.remove_unfinished()
    assert names(tmp_path) == ["step_00000001", "step_00000009.superseded-a"]
    assert len(said) == 2
    assert "step_00000002.tmp-a" in said[1]


def test_later_checkpoints_are_set_aside_and_stay_loadable(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    writer, said = make_writer(tmp_path)
    writer.set_aside(after=2)
    aside = f"step_00000003.superseded-{writer.fence.id}"
    assert names(tmp_path) == ["step_00000001", "step_00000002", aside]
    assert len(said) == 1
    assert_equal(loaded(tmp_path / "checkpoints" / aside, 3), make_state(3))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    writer = save_steps(tmp_path, [1])
    writer.save(make_state(2), facts(1))
    assert_equal(loaded(tmp_path / "checkpoints" / "step_00000001", 1), make_state(2))
    aside = tmp_path / "checkpoints" / f"step_00000001.superseded-{writer.fence.id}"
    assert_equal(loaded(aside, 1), make_state(1))
