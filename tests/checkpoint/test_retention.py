"""What is kept: never less than what a kept manifest names, whatever happened, and not much more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hope_train.checkpoint import retention
from hope_train.checkpoint import writer as writer_module
from hope_train.checkpoint.manifest import (
    TRIMMED,
    DamagedCheckpointError,
    is_trimmed,
    list_checkpoints,
    list_superseded,
    read_manifest,
    step_name,
    verify,
)
from hope_train.checkpoint.retention import removals, remove, remove_unfinished
from hope_train.checkpoint.store import find_checkpoint, newest_whole
from hope_train.errors import UserError
from tests.checkpoint.toy import facts, make_writer, names
from tests.checkpoint.toy_levels import level_state, load_levels, save_levels

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of one small file, so that many saves take no time."""

    def save_set(folder: Path, tensors: dict[str, Any], group: Any) -> None:
        folder.mkdir()
        (folder / "data").write_text(repr(sorted((name, tensor.tolist()) for name, tensor in tensors.items())))

    monkeypatch.setattr(writer_module, "save_set", save_set)


def whole(run_dir: Path) -> list[int]:
    return [
        read_manifest(folder).step for folder in list_checkpoints(run_dir / "checkpoints") if not is_trimmed(folder)
    ]


def inside(run_dir: Path, step: int) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints" / step_name(step)).iterdir())


class TestTrimming:
    """Periods 1, 2 and 4, a save at every step, the newest one kept."""

    def test_only_what_is_named_remains(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path, keep_last=1)
        save_levels(writer, [4, 5])
        assert inside(tmp_path, 4) == ["level_1", "level_2", TRIMMED]
        save_levels(writer, [6])
        assert inside(tmp_path, 4) == ["level_2", TRIMMED]
        assert names(tmp_path) == [step_name(4), step_name(6)]
        save_levels(writer, [7])
        assert inside(tmp_path, 6) == ["level_1", TRIMMED]
        load_levels(tmp_path / "checkpoints" / step_name(7), 7)
        save_levels(writer, [8])
        assert names(tmp_path) == [step_name(8)]

    def test_what_remains_is_no_checkpoint(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path, keep_last=1)
        save_levels(writer, [4, 5])
        remains = tmp_path / "checkpoints" / step_name(4)
        for look in (verify, read_manifest, find_checkpoint):
            with pytest.raises(DamagedCheckpointError, match="only what other checkpoints refer to is left"):
                look(remains)
        (tmp_path / "checkpoints" / step_name(5) / "manifest.json").unlink()
        said: list[str] = []
        assert newest_whole(tmp_path, said.append) is None

    def test_multiples_keep_what_they_refer_to(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path, keep_last=1, keep_every=5)
        save_levels(writer, list(range(1, 12)))
        assert whole(tmp_path) == [5, 10, 11]
        assert inside(tmp_path, 4) == ["level_1", "level_2", TRIMMED]
        assert inside(tmp_path, 8) == ["level_2", TRIMMED]
        for step in (5, 10, 11):
            load_levels(tmp_path / "checkpoints" / step_name(step), step)

    def test_one_that_was_renamed_keeps_what_it_refers_to(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path, keep_last=1)
        save_levels(writer, [4, 6, 7])
        best = (tmp_path / "checkpoints" / step_name(7)).rename(tmp_path / "checkpoints" / "best")
        save_levels(writer, [8])
        assert names(tmp_path) == ["best", step_name(4), step_name(6), step_name(8)]
        assert verify(best).step == 7

    def test_what_would_be_freed_is_known_before(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4, 5, 6])
        found = removals(tmp_path / "checkpoints", keep_last=1)
        before = retention.size_of(tmp_path / "checkpoints")
        promised = sum(removal.bytes for removal in found)
        assert {removal.folder.name: removal.keep for removal in found} == {
            step_name(4): ("level_2",),
            step_name(5): (),
        }
        remove(found, "x")
        assert before - retention.size_of(tmp_path / "checkpoints") == promised > 0

    def test_without_a_number_every_checkpoint_stays(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4, 5, 6])
        assert removals(tmp_path / "checkpoints", keep_last=None) == []

    def test_those_set_aside_go_when_told(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4, 5, 7])
        writer, _ = make_writer(tmp_path, keep_last=1)
        writer.set_aside(after=5)
        writer.go_on_from(
            tmp_path / "checkpoints" / step_name(5), read_manifest(tmp_path / "checkpoints" / step_name(5))
        )
        save_levels(writer, [8])
        aside = f"{step_name(7)}.superseded-{writer.fence.id}"
        assert names(tmp_path) == [step_name(4), aside, step_name(8)]
        remove(removals(tmp_path / "checkpoints", None, superseded=True), "x")
        assert names(tmp_path) == [step_name(8)]


class Cut(Exception):
    """The process dies here."""


@contextmanager
def dies_after(operations: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At that many changes to the disk from here."""
    left = [operations]

    def counted(original: Any) -> Any:
        def step(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return original(*arguments, **more)

        return step

    with monkeypatch.context() as patch:
        for name in ("unlink", "rename", "replace"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(retention.shutil, "rmtree", counted(retention.shutil.rmtree))
        with suppress(Cut):
            yield


@pytest.mark.usefixtures("quick")
class TestAlways:
    """Over random runs: saves, stops, going back, kills in the middle of pruning."""

    @pytest.mark.parametrize("seed", range(6))
    def test_whatever_is_a_checkpoint_is_whole(
        self, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng = random.Random(seed)
        checkpoints = tmp_path / "checkpoints"
        keep = {"keep_last": rng.randint(1, 3), "keep_every": rng.choice([0, 0, 5, 8])}
        writer, _ = make_writer(tmp_path, **keep)
        step, values = 0, seed
        for _ in range(30):
            if rng.random() < 0.2:  # a new start, sometimes from an older checkpoint
                writer, _ = make_writer(tmp_path, **keep)
                there = [folder for folder in list_checkpoints(checkpoints) if not is_trimmed(folder)]
                if there:
                    chosen = rng.choice(there[-2:])
                    step, values = read_manifest(chosen).step, rng.random()  # type: ignore[assignment]
                    writer.remove_unfinished()
                    writer.set_aside(after=step)
                    writer.go_on_from(chosen, verify(chosen))
            step += rng.randint(1, 3)
            state = level_state(step, seed=int(values * 1000))
            if rng.random() < 0.3:
                with dies_after(rng.randint(0, 6), monkeypatch), suppress(UserError):
                    writer.save(state, facts(step))
                writer, _ = make_writer(tmp_path, **keep)
                writer.remove_unfinished()
                found = newest_whole(tmp_path, print)
                if found is not None:
                    step = found[1].step
                    writer.set_aside(after=step)
                    writer.go_on_from(*found)
            else:
                writer.save(state, facts(step))
                assert len(whole(tmp_path)) >= min(keep["keep_last"], 1)
            for folder in (*list_checkpoints(checkpoints), *list_superseded(checkpoints)):
                if not is_trimmed(folder):
                    verify(folder)
        # Nothing lies about for ever: what no manifest names goes with the next save.
        writer.keep_last, writer.keep_every = 1, 0
        list(remove_unfinished(checkpoints))
        writer.save(level_state(step + 8), facts(step + 8))
        named = {
            manifest.set_folder(folder, name)
            for folder in (*list_checkpoints(checkpoints), *list_superseded(checkpoints))
            if not is_trimmed(folder)
            for manifest in [read_manifest(folder)]
            for name in manifest.sets
        }
        sets = {path for path in checkpoints.glob("*/*") if path.is_dir()}
        assert sets == named
        remove(removals(checkpoints, 1, superseded=True), "x")
        assert len(whole(tmp_path)) == 1
        verify(checkpoints / step_name(step + 8))
