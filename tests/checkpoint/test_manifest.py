"""A checkpoint is whole, or known not to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hope_train.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    ShardSet,
    list_checkpoints,
    read_manifest,
    step_name,
    step_of,
    verify,
)
from hope_train.checkpoint.store import load_state
from hope_train.errors import UserError
from tests.checkpoint.toy import assert_equal, blank, make_state, save_steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    save_steps(tmp_path / "run", [3])
    return tmp_path / "run" / "checkpoints" / "step_00000003"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_whole_one_is_verified(folder: Path) -> None:
    manifest = verify(folder)
    assert (manifest.step, manifest.tokens, manifest.name) == (3, 30, "step_00000003")
    assert set(manifest.sets) == {"core", "level_0"}
    assert {path.relative_to(folder).as_posix() for path in files(folder)} == {
        MANIFEST,
        "trainer.json",
        *(f"{part}/{name}" for part in ("core", "level_0") for name in (".metadata", "__0_0.distcp")),
    }


def test_one_flipped_bit_anywhere_is_noticed(folder: Path) -> None:
    for path in files(folder):
        whole = path.read_bytes()
        for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 2}:
            for bit in (0, 6):
                spoilt = bytearray(whole)
                spoilt[place] ^= 1 << bit
                path.write_bytes(spoilt)
                with pytest.raises(DamagedCheckpointError) as caught:
                    verify(folder)
                assert str(folder) in str(caught.value)
                assert path.name in str(caught.value)
        path.write_bytes(whole)
    verify(folder)


def test_truncated_lengthened_and_missing_files_are_named(folder: Path) -> None:
    for path in files(folder):
        whole = path.read_bytes()
        for spoilt in (b"", whole[:-2], whole[: len(whole) // 2], whole + b"x"):
            path.write_bytes(spoilt)
            with pytest.raises(DamagedCheckpointError, match=path.name):
                verify(folder)
        path.unlink()
        with pytest.raises(DamagedCheckpointError, match=path.name):
            verify(folder)
        path.write_bytes(whole)


def test_a_missing_set_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "level_0")
    with pytest.raises(DamagedCheckpointError, match=r"level_0/.*is missing"):
        verify(folder)


def test_a_manifest_that_leads_elsewhere_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    for path in ("../outside", "/etc", "step_00000003/../../x"):
        moved = Manifest(**{**vars(manifest), "sets": {"core": ShardSet(path, {})}})
        (folder / MANIFEST).write_text(moved.to_json(), encoding="utf-8")
        with pytest.raises(DamagedCheckpointError, match="leads out"):
            read_manifest(folder)


def test_a_newer_format_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(folder)
    monkeypatch.setattr("hope_train.checkpoint.manifest.FORMAT", 4)
    text = manifest.to_json()
    monkeypatch.undo()
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="has format 4") as caught:
        verify(folder)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_text_survives_the_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    odd = Manifest(**{**vars(manifest), "config": {"name": "été \u2028 数字", "tiny": 1e-300, "many": (1, 2)}})
    (folder / MANIFEST).write_text(odd.to_json(), encoding="utf-8")
    assert read_manifest(folder).config == {"name": "été \u2028 数字", "tiny": 1e-300, "many": [1, 2]}
    assert json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["format"] == 3


def test_nothing_depends_on_where_it_lies_or_what_it_is_called(folder: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "elsewhere" / "step_00000003", tmp_path / "best"):
        shutil.copytree(folder, place)
        loaded = blank(make_state(3))
        load_state(place, verify(place), loaded)
        assert_equal(loaded, make_state(3))


def test_a_set_may_lie_in_an_older_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, [4, 6])
    checkpoints = tmp_path / "checkpoints"
    old, new = checkpoints / "step_00000004", checkpoints / "step_00000006"
    shutil.rmtree(new / "level_0")
    manifest = read_manifest(new)
    sets = {**manifest.sets, "level_0": read_manifest(old).sets["level_0"]}
    (new / MANIFEST).write_text(Manifest(**{**vars(manifest), "sets": sets}).to_json(), encoding="utf-8")
    manifest = verify(new)
    assert manifest.references() == {"step_00000004"}
    loaded = blank(make_state(6))
    load_state(new, manifest, loaded)
    assert_equal(loaded, {"core": make_state(6)["core"], "level_0": make_state(4)["level_0"]})
    (old / "level_0" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"step_00000006: step_00000004/level_0/__0_0.distcp is missing"):
        verify(new)


def test_names() -> None:
    assert step_name(1234) == "step_00001234"
    assert step_name(123456789) == "step_123456789"
    assert step_of(Path("x/step_123456789")) == 123456789
    for other in ("step_12", "step_00000001.tmp-a", "step_00000001.superseded-a", "best", "step_0000000x"):
        assert step_of(Path(other)) is None


def test_listing_is_by_number(tmp_path: Path) -> None:
    for name in ("step_100000000", "step_00000002", "step_99999999", "step_00000001.tmp-a", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_99999999", "step_100000000"]
    assert list_checkpoints(tmp_path / "nowhere") == []
