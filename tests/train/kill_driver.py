"""`hope train`, killed by its own hand (SIGKILL) at a chosen point. As a program: STAGE STEP CONFIG [KEY=VALUE …]."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from hope_train.checkpoint import retention, writer
from hope_train.cli import run
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.train import metrics

STAGES = (
    *("step", "log", "first file", "between sets", "sets", "manifest", "published", "pruning"),
    *("trimming", "half trimmed"),
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str, step: int) -> None:
    """Patch the point `stage` of step number `step`, or of the save of that step."""

    def in_save_of(path: Path) -> bool:
        return any(part.startswith(f"step_{step:08d}.tmp") for part in path.parts)

    if stage == "step":  # the gradients are there, the weights are not yet stepped
        original: Any = LevelOptimizer.step

        def stepping(self: Any, *arguments: Any, **more: Any) -> Any:
            return die() if self.steps + 1 == step else original(self, *arguments, **more)

        LevelOptimizer.step = stepping  # type: ignore[method-assign]
    elif stage == "log":  # half of a line is on the disk
        write = metrics.JsonLines.write

        def logging(self: Any, row: Any) -> None:
            if row["step"] == step and "loss" in row:
                os.write(self._file, b'{"step": 5, "tokens": 640, "lo')
                die()
            write(self, row)

        metrics.JsonLines.write = logging  # type: ignore[method-assign]
    elif stage == "first file":  # a part of the tensors is written, their index is not
        fsync = os.fsync

        def flushing(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if in_save_of(path) and path.suffix == ".distcp":
                os.ftruncate(handle, path.stat().st_size // 2)
                die()
            fsync(handle)

        os.fsync = flushing
    elif stage == "between sets":  # the core is written, a level is not
        save_set = writer.save_set

        def writing(folder: Path, *arguments: Any) -> None:
            save_set(folder, *arguments)
            if in_save_of(folder) and folder.name == "core":
                die()

        writer.save_set = writing
    elif stage in ("sets", "manifest"):  # all sets without a manifest; all with it, not yet in place
        write_manifest = writer.write_manifest

        def completing(work: Path, *arguments: Any) -> Any:
            if in_save_of(work) and stage == "sets":
                die()
            manifest = write_manifest(work, *arguments)
            if in_save_of(work):
                die()
            return manifest

        writer.write_manifest = completing
    elif stage == "published":  # in place, nothing pruned
        prune = writer.CheckpointWriter.prune

        def pruning(self: Any) -> None:
            if self.last_step == step:
                die()
            prune(self)

        writer.CheckpointWriter.prune = pruning  # type: ignore[method-assign]
    elif stage == "pruning":  # an old checkpoint is half deleted

        class Shutil:
            @staticmethod
            def rmtree(path: Path, **more: Any) -> None:
                if (path.parent / f"step_{step:08d}").exists() and "pruned" in path.name:
                    shutil.rmtree(path / "core")
                    die()
                shutil.rmtree(path, **more)

        retention.shutil = Shutil  # type: ignore[assignment]
    elif stage == "trimming":  # an old checkpoint is none any more, what nobody names is all still there
        sync_folders = retention.sync_folders

        def syncing(folders: Any) -> None:
            sync_folders(folders)
            if (folders[0].parent / f"step_{step:08d}").exists():
                die()

        retention.sync_folders = syncing
    elif stage == "half trimmed":  # and in the middle of deleting it

        class Scissors:
            @staticmethod
            def rmtree(path: Path, **more: Any) -> None:
                if (path.parent.parent / f"step_{step:08d}").exists() and path.name == "core":
                    (path / "__0_0.distcp").unlink()
                    die()
                shutil.rmtree(path, **more)

        retention.shutil = Scissors  # type: ignore[assignment]
    else:
        raise ValueError(stage)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(run(["train", *sys.argv[3:]]))
