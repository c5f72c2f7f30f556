"""Saves of DeepSpeed's beside the checkpoints: published whole, kept and removed with them; without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hope_train.checkpoint.commands import prune_command
from hope_train.checkpoint.fence import Fence, FencedError
from hope_train.checkpoint.manifest import step_name
from hope_train.checkpoint.own_saves import OwnSaves
from hope_train.checkpoint.writer import CheckpointWriter
from tests.checkpoint.toy import facts, make_state, make_writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def begin(own: OwnSaves, step: int) -> None:
    """What DeepSpeed writes, before it is published."""
    own.begin(step)
    place = own.work(step) / step_name(step)
    place.mkdir()
    (place / "mp_rank_00_model_states.pt").write_text(f"of step {step} by {own.fence.id}")
    (own.work(step) / "zero_to_fp32.py").write_text("a script")


def save(writer: CheckpointWriter, own: OwnSaves, *steps: int) -> None:
    for step in steps:
        writer.save(make_state(step), facts(step))
        begin(own, step)
        own.publish(step)


def there(run_dir: Path) -> tuple[list[str], str | None]:
    """The saves (by their steps, with what follows their names), and what `latest` says."""
    folder = run_dir / "deepspeed"
    latest = folder / "latest"
    names = sorted(path.name.removeprefix("step_0000000") for path in folder.glob("step_*"))
    return names, latest.read_text() if latest.is_file() else None


def start(run_dir: Path, after: int, **more: Any) -> tuple[CheckpointWriter, OwnSaves]:
    """A new process that goes on from a step."""
    writer, _ = make_writer(run_dir, **more)
    own = OwnSaves(writer.fence)
    writer.set_aside(after)
    own.open(after)
    return writer, own


def test_each_goes_with_its_checkpoint(tmp_path: Path) -> None:
    writer, own = start(tmp_path, 0, keep_last=2, keep_every=2)
    save(writer, own, 1, 2, 3, 4, 5)
    assert there(tmp_path) == (["2", "4", "5"], step_name(5))
    assert (tmp_path / "deepspeed" / "zero_to_fp32.py").is_file()
    assert not list((tmp_path / "deepspeed").glob("*.tmp-*"))


def test_later_ones_are_set_aside_with_their_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(*start(tmp_path, 0), 1, 2, 3)
    writer, own = start(tmp_path, 1)
    aside = f".superseded-{own.fence.id}"
    assert there(tmp_path) == (["1", f"2{aside}", f"3{aside}"], step_name(1))
    save(writer, own, 2)
    assert there(tmp_path) == (["1", "2", f"2{aside}", f"3{aside}"], step_name(2))
    old = tmp_path / "deepspeed" / f"{step_name(2)}{aside}" / "mp_rank_00_model_states.pt"
    assert own.fence.id not in old.read_text()

    own.fence.release()
    assert prune_command(str(tmp_path), 1, None, True, dry_run=True, force=False, as_json=True) == 0
    listed = json.loads(capsys.readouterr().out)["removed"]
    assert {row["name"] for row in listed if row["name"].startswith("deepspeed/")} == {
        f"deepspeed/{step_name(1)}",
        f"deepspeed/{step_name(2)}{aside}",
        f"deepspeed/{step_name(3)}{aside}",
    }
    assert len(there(tmp_path)[0]) == 4
    assert prune_command(str(tmp_path), 1, None, True, dry_run=False, force=False, as_json=True) == 0
    assert there(tmp_path) == (["2"], step_name(2))


def test_what_was_never_finished_is_removed_and_nothing_older_touched(tmp_path: Path) -> None:
    writer, own = start(tmp_path, 0)
    save(writer, own, 1)
    writer.save(make_state(2), facts(2))
    begin(own, 2)  # and here it dies
    assert there(tmp_path) == (["1", f"2.tmp-{own.fence.id}"], step_name(1))
    start(tmp_path, 2)
    assert there(tmp_path) == (["1"], step_name(1))


def test_a_death_before_it_is_named_the_newest(tmp_path: Path) -> None:
    save(*start(tmp_path, 0), 1, 2)
    (tmp_path / "deepspeed" / "latest").write_text(step_name(1))
    start(tmp_path, 2)
    assert there(tmp_path) == (["1", "2"], step_name(2))


def test_who_has_lost_the_run_publishes_nothing(tmp_path: Path) -> None:
    writer, own = start(tmp_path, 0)
    save(writer, own, 1)
    begin(own, 2)
    Fence.take(tmp_path)
    with pytest.raises(FencedError):
        own.publish(2)
    assert there(tmp_path)[1] == step_name(1)
    assert not (tmp_path / "deepspeed" / step_name(2)).exists()
    with pytest.raises(FencedError):
        own.begin(3)
