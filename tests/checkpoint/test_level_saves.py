"""Levels saved at their own frequencies: a resume is exact at every step, whatever the interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hope_train.checkpoint import manifest as manifest_module
from hope_train.checkpoint.manifest import (
    DamagedCheckpointError,
    is_trimmed,
    list_checkpoints,
    read_manifest,
    step_name,
    verify,
)
from hope_train.checkpoint.sets import contents_at
from hope_train.checkpoint.store import newest_whole
from hope_train.checkpoint.tensors import TOKENS, UPDATES, save_set
from hope_train.checkpoint.writer import write_manifest
from tests.checkpoint.toy import assert_equal, facts, make_writer
from tests.checkpoint.toy_levels import Training, level_state, load_levels, save_levels

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class TestResume:
    """Bit for bit, from every checkpoint, while older ones are pruned."""

    @pytest.mark.parametrize(
        ("periods", "every", "steps", "variant"),
        [
            *(((1, 2, 4), every, 13, "sequential") for every in (1, 3)),
            *(((1, 2, 4), every, 13, "nested") for every in (1, 2, 3, 4, 5)),
            ((1, 4, 16), 1, 34, "sequential"),
            *(((1, 4, 16), every, 34, "nested") for every in (1, 3, 4, 5, 16, 17)),
        ],
    )
    def test_from_every_save(
        self, tmp_path: Path, periods: tuple[int, ...], every: int, steps: int, variant: str
    ) -> None:
        whole = Training(periods, variant).train(steps).state()
        writer, _ = make_writer(tmp_path, keep_last=1)
        run = Training(periods, variant)
        for step in range(every, steps + 1, every):
            run.train(step).save(writer)
            assert_equal(Training(periods, variant).resume(tmp_path).state(), run.state())
            assert_equal(Training(periods, variant).resume(tmp_path).train(steps).state(), whole)

    @pytest.mark.parametrize("async_save", [False, True])
    @pytest.mark.parametrize("every", [1, 3])
    def test_stopped_after_every_save(self, tmp_path: Path, every: int, async_save: bool) -> None:
        # Each start goes on from what another wrote, and refers to it: references over many incarnations.
        periods, steps = (1, 4, 16), 21
        whole = Training(periods, "nested").train(steps).state()
        writer, _ = make_writer(tmp_path, keep_last=2, async_save=async_save)
        Training(periods, "nested").train(every).save(writer, wait=False)
        writer.finish()
        for step in range(2 * every, steps + 1, every):
            writer, _ = make_writer(tmp_path, keep_last=2, async_save=async_save)
            run = Training(periods, "nested").resume(tmp_path, writer).train(step)
            run.save(writer, wait=False)
            run.train(step + 2)  # must not leak into what is being written
            writer.finish()
            assert verify(tmp_path / "checkpoints" / step_name(step)).sets.keys() == expected(step, periods)
        assert_equal(Training(periods, "nested").resume(tmp_path).train(steps).state(), whole)

    def test_steps_that_are_refused_count_for_no_level(self, tmp_path: Path) -> None:
        # Batches and updates drift apart: what is referred to goes by updates.
        periods, refused = (1, 2, 4), (2, 5, 6)
        whole = Training(periods, refused=refused).train(14).state()
        writer, _ = make_writer(tmp_path, keep_last=1)
        run = Training(periods, refused=refused)
        for step in range(1, 15):
            run.train(step).save(writer)
            assert_equal(Training(periods, refused=refused).resume(tmp_path).train(14).state(), whole)
        manifest = read_manifest(tmp_path / "checkpoints" / step_name(14))
        assert {name: part.updates for name, part in manifest.sets.items() if name != "core"} == {
            "level_0": 11,
            "level_1": 5,
            "level_1_accumulator": None,
            "level_2": 2,
            "level_2_accumulator": None,
        }


def expected(step: int, periods: tuple[int, ...]) -> set[str]:
    return set(contents_at(step, {"core": 1, **{f"level_{place}": each for place, each in enumerate(periods)}}))


def homes(folder: Path) -> dict[str, int | None]:
    """By set the step whose folder it lies in."""
    return {name: part.step for name, part in verify(folder).sets.items()}


class TestWhatIsWritten:
    """Periods 1, 2 and 4, a save at every step."""

    def test_each_set_lies_where_it_last_changed(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4, 5, 6, 7, 8])
        checkpoints = tmp_path / "checkpoints"
        assert homes(checkpoints / step_name(4)) == {"core": 4, "level_0": 4, "level_1": 4, "level_2": 4}
        assert homes(checkpoints / step_name(7)) == {
            "core": 7,
            "level_0": 7,
            "level_1": 6,
            "level_1_accumulator": 7,
            "level_2": 4,
            "level_2_accumulator": 7,
        }
        assert homes(checkpoints / step_name(8)) == {"core": 8, "level_0": 8, "level_1": 8, "level_2": 8}
        for step in (4, 5, 6, 7, 8):
            assert_equal(load_levels(checkpoints / step_name(step), step), level_state(step))
        # What an accumulator adds is the accumulator alone.
        files = sorted(path.name for path in (checkpoints / step_name(5)).iterdir())
        assert files == [
            "core",
            "level_0",
            "level_1_accumulator",
            "level_2_accumulator",
            "manifest.json",
            "trainer.json",
        ]

    def test_all_writes_all(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path, levels="all")
        save_levels(writer, [4, 5, 6])
        for step in (4, 5, 6):
            folder = tmp_path / "checkpoints" / step_name(step)
            assert set(homes(folder).values()) == {step}
            assert_equal(load_levels(folder, step), level_state(step))

    def test_the_first_save_of_a_process_refers_only_to_what_it_went_on_from(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4])
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [5])
        assert set(homes(tmp_path / "checkpoints" / step_name(5)).values()) == {5}
        # A checkpoint of another run is none of this run's own.
        elsewhere, _ = make_writer(tmp_path / "other")
        folder = tmp_path / "checkpoints" / step_name(5)
        elsewhere.go_on_from(folder, verify(folder))
        save_levels(elsewhere, [6])
        assert set(homes(tmp_path / "other" / "checkpoints" / step_name(6)).values()) == {6}
        assert elsewhere.last_step == 6

    @pytest.mark.parametrize("how", ["missing", "truncated"])
    def test_a_file_that_is_not_there_any_more_is_written_again(self, tmp_path: Path, how: str) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4])
        victim = tmp_path / "checkpoints" / step_name(4) / "level_2" / "__0_0.distcp"
        if how == "missing":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[:-1])
        save_levels(writer, [5])
        found = homes(tmp_path / "checkpoints" / step_name(5))
        assert (found["level_1"], found["level_2"]) == (4, 5)

    def test_a_save_that_fails_is_relied_on_by_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from hope_train.checkpoint import writer as writer_module

        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4])

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(writer_module, "write_manifest", fail)
            with pytest.raises(writer_module.SaveError):
                save_levels(writer, [6])
        save_levels(writer, [7])
        found = homes(tmp_path / "checkpoints" / step_name(7))
        assert (found["level_1"], found["level_2"]) == (7, 4)
        assert_equal(load_levels(tmp_path / "checkpoints" / step_name(7), 7), level_state(7))


class TestDamage:
    """In a set that several checkpoints refer to."""

    def test_the_newest_that_is_whole_with_all_it_refers_to_is_found(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [3, 4, 5, 6])
        shared = tmp_path / "checkpoints" / step_name(4) / "level_2" / "__0_0.distcp"
        content = bytearray(shared.read_bytes())
        content[len(content) // 2] ^= 1
        shared.write_bytes(content)
        said: list[str] = []
        found = newest_whole(tmp_path, said.append)
        assert found is not None
        assert found[1].step == 3
        assert [line.split("checkpoints/")[1].split(":")[0] for line in said] == [
            step_name(6),
            step_name(5),
            step_name(4),
        ]
        assert "step_00000004/level_2/__0_0.distcp does not have the sha256" in said[0]

    def test_a_copy_without_what_it_refers_to_says_what_is_missing(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        save_levels(writer, [4, 5])
        alone = tmp_path / "elsewhere" / step_name(5)
        alone.parent.mkdir()
        (tmp_path / "checkpoints" / step_name(5)).rename(alone)
        with pytest.raises(
            DamagedCheckpointError, match=r"step_00000004/level_1/.* is missing, which this .* refers to"
        ):
            verify(alone)


class TestContinuationsGivenUp:
    """They stay loadable by their path, whatever becomes of the steps they refer to."""

    def test_references_find_the_folder_they_meant(self, tmp_path: Path) -> None:
        checkpoints = tmp_path / "checkpoints"
        first, _ = make_writer(tmp_path, keep_last=1)
        save_levels(first, [4, 5, 6, 7])
        assert [folder.name for folder in list_checkpoints(checkpoints) if is_trimmed(folder)] == [
            step_name(4),
            step_name(6),
        ]
        verified = verify(checkpoints / step_name(7))
        # From a checkpoint of elsewhere the run begins at step 3 anew, and writes the same steps with other values.
        second, said = make_writer(tmp_path, keep_last=1)
        second.set_aside(after=3)
        assert len(said) == 1, "what remains of others is moved without a word"
        save_levels(second, [4, 5, 6, 7], seed=1)
        aside = checkpoints / f"{step_name(7)}.superseded-{second.fence.id}"
        assert verify(aside) == verified
        assert_equal(load_levels(aside, 7), level_state(7))
        assert_equal(load_levels(checkpoints / step_name(7), 7), level_state(7, seed=1))
        # And once more, from step 6 of the second.
        third, _ = make_writer(tmp_path, keep_last=1)
        third.set_aside(after=3)
        save_levels(third, [4, 6, 7, 8], seed=2)
        assert_equal(load_levels(aside, 7), level_state(7))
        newer = checkpoints / f"{step_name(7)}.superseded-{third.fence.id}"
        assert_equal(load_levels(newer, 7), level_state(7, seed=1))
        assert_equal(load_levels(checkpoints / step_name(8), 8), level_state(8, seed=2))

    def test_what_they_refer_to_among_the_steps_before_is_kept(self, tmp_path: Path) -> None:
        checkpoints = tmp_path / "checkpoints"
        first, _ = make_writer(tmp_path)
        save_levels(first, [4, 5, 7])
        second, _ = make_writer(tmp_path, keep_last=1)
        second.set_aside(after=5)
        second.go_on_from(checkpoints / step_name(5), verify(checkpoints / step_name(5)))
        save_levels(second, [8, 9], seed=1)
        assert [folder.name for folder in list_checkpoints(checkpoints) if not is_trimmed(folder)] == [step_name(9)]
        aside = checkpoints / f"{step_name(7)}.superseded-{second.fence.id}"
        assert_equal(load_levels(aside, 7), level_state(7))
        assert sorted(path.name for path in (checkpoints / step_name(4)).iterdir()) == ["level_2", "trimmed.json"]


def test_format_1_had_what_is_collected_in_the_level_s_own_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / step_name(7)
    state = level_state(7)
    for name, tensors in state.items():
        save_set(folder / name, tensors)
    monkeypatch.setattr(manifest_module, "FORMAT", 1)
    write_manifest(folder, facts(7), "x", dict.fromkeys(state), {})
    monkeypatch.undo()
    assert_equal(load_levels(folder, 7), state)
    # A run that goes on from it writes everything once.
    writer, _ = make_writer(tmp_path)
    writer.go_on_from(folder, verify(folder))
    save_levels(writer, [8, 9])
    assert set(homes(tmp_path / "checkpoints" / step_name(8)).values()) == {8}
    assert homes(tmp_path / "checkpoints" / step_name(9))["level_2"] == 8


def test_counters_are_those_of_the_step_not_of_the_files(tmp_path: Path) -> None:
    writer, _ = make_writer(tmp_path)
    save_levels(writer, [4, 7])
    loaded = load_levels(tmp_path / "checkpoints" / step_name(7), 7)
    assert {name: int(part[UPDATES]) for name, part in loaded.items()} == {
        "core": 7,
        "level_0": 7,
        "level_1": 3,
        "level_2": 1,
    }
    assert {name: int(loaded[name][TOKENS]) for name in ("level_0", "level_1", "level_2")} == {
        "level_0": 0,
        "level_1": 10,
        "level_2": 30,
    }
