"""Saves that DeepSpeed makes in its own layout, beside the checkpoints of a run: `<run>/deepspeed/<step>/`, `latest`.

They are for DeepSpeed's tools and other people's programs; a run goes on from its checkpoints alone. Each belongs to
the checkpoint of the same name, is published after it, and goes with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from hope_train.checkpoint.fence import Fence, write_atomically
from hope_train.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    list_checkpoints,
    list_superseded,
    list_unfinished,
    step_name,
    step_of,
    sync_folders,
)

OWN = "deepspeed"
LATEST = "latest"
"""DeepSpeed's loader reads the name of the newest save in it."""


class OwnSaves:
    """Publishes and removes them, for the process that leads a run. All methods raise FencedError, OSError."""

    def __init__(self, fence: Fence) -> None:
        self.fence, self.folder = fence, fence.run_dir / OWN

    def work(self, step: int) -> Path:
        """The folder into which DeepSpeed saves a step, under the step's name."""
        return self.folder / f"{step_name(step)}.tmp-{self.fence.id}"

    def open(self, after: int) -> None:
        """The run goes on from the step `after`: remove what was never finished, and set later saves aside as the
        checkpoints of these steps have been.
        """
        with self.fence.held():
            for folder in list_unfinished(self.folder):
                shutil.rmtree(folder)
            for folder in list_checkpoints(self.folder):
                if (step_of(folder) or 0) > after:
                    self._set_aside(folder)
            _name_latest(self.folder)

    def begin(self, step: int) -> None:
        """Make the folder that DeepSpeed saves into."""
        self.fence.check()
        self.discard(step)
        self.work(step).mkdir(parents=True)

    def publish(self, step: int) -> None:
        """What DeepSpeed has written is whole: flush it, give it its name, say that it is the newest, and remove those
        whose checkpoints are no longer there.
        """
        work = self.work(step)
        for file in work.rglob("*"):
            if file.is_file():
                _flush(file)
        final = self.folder / step_name(step)
        sync_folders([work / final.name])
        with self.fence.held():
            if final.exists():  # nothing is overwritten, as with checkpoints
                self._set_aside(final)
            (work / final.name).rename(final)
            for script in work.iterdir():  # DeepSpeed's, which read its layout without it
                script.replace(self.folder / script.name)
            work.rmdir()
            sync_folders([self.folder])
            _name_latest(self.folder)
            remove(self.folder, stale(self.folder.parent))

    def discard(self, step: int) -> None:
        """Remove what is there of a save that failed."""
        shutil.rmtree(self.work(step), ignore_errors=True)

    def _set_aside(self, folder: Path) -> None:
        folder.rename(folder.with_name(f"{folder.name}.superseded-{self.fence.id}"))


def stale(run_dir: Path, going: Collection[str] = ()) -> list[Path]:
    """Saves whose checkpoint is not there, or is among those that are `going`."""
    checkpoints = run_dir / CHECKPOINTS
    kept = {
        folder.name
        for folder in (*list_checkpoints(checkpoints), *list_superseded(checkpoints))
        if (folder / MANIFEST).is_file() and folder.name not in going
    }
    folder = run_dir / OWN
    return [own for own in (*list_checkpoints(folder), *list_superseded(folder)) if own.name not in kept]


def remove(folder: Path, saves: Collection[Path]) -> None:
    """Delete saves, each under another name, so that a deletion cut short leaves nothing that looks like one."""
    doomed = [own.rename(own.with_name(f"{own.name.partition('.')[0]}.tmp-pruned-{own.name}")) for own in saves]
    if doomed:
        _name_latest(folder)
    for own in doomed:
        shutil.rmtree(own)


def _name_latest(folder: Path) -> None:
    """Let `latest` name the newest save; without any there is no such file."""
    there = list_checkpoints(folder)
    if there:
        write_atomically(folder / LATEST, there[-1].name)
    else:
        (folder / LATEST).unlink(missing_ok=True)


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
