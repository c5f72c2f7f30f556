"""Writing checkpoints: whole or not at all, fenced, in the background if wished, and pruning what is no longer kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hope_train.checkpoint.fence import Fence, FencedError
from hope_train.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    TRAINER,
    Manifest,
    ShardSet,
    is_trimmed,
    list_checkpoints,
    record_file,
    record_files,
    size_problem,
    step_name,
    step_of,
    sync_folders,
)
from hope_train.checkpoint.retention import removals, remove, remove_unfinished
from hope_train.checkpoint.sets import Contents, is_accumulator_set, plan_save
from hope_train.checkpoint.tensors import (
    UPDATES,
    Staging,
    State,
    contents_of,
    counter,
    distributed,
    save_set,
    split_accumulators,
)


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were. The message is one line."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says besides its tensors; see `Manifest` for the fields."""

    step: int
    tokens: int
    config: dict[str, Any]
    tokenizer: str
    data: dict[str, Any]
    losses: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    """The trainer's own state, as JSON holds it."""


class CheckpointWriter:
    """Saves into `<run>/checkpoints`. With a process group every rank has one and calls the same methods.

    Attributes:
        last, last_step: the newest checkpoint published by this writer (or gone on from) and its step, or None.
        failures: saves in a row, up to the newest, that failed.
    """

    def __init__(
        self,
        fence: Fence,
        keep_last: int,
        keep_every: int = 0,
        async_save: bool = False,
        tell: Callable[[str], None] = print,
        levels: Literal["own", "all"] = "own",
    ) -> None:
        """`levels`: write a level only if it has taken an update since it was last written (`own`), or at every save
        (`all`). `tell` takes one line for the user; it may be called from the writing thread.
        """
        self.fence = fence
        self.checkpoints = fence.run_dir / CHECKPOINTS
        self.keep_last, self.keep_every, self.async_save, self.tell = keep_last, keep_every, async_save, tell
        self.levels = levels
        self.last: Path | None = None
        self.last_step: int | None = None
        self.failures = 0
        self._base: Manifest | None = None
        self._staging = Staging()
        # A group of its own: the writing thread's messages must not mix with the training's.
        self.group = dist.new_group(backend="gloo") if distributed() else None
        self.rank = dist.get_rank() if distributed() else 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def go_on_from(self, folder: Path, manifest: Manifest) -> None:
        """The live state is that of this verified checkpoint. If it is one of this run's own, levels that have not
        changed by the next save are referred to there.
        """
        if folder.resolve() in [own.resolve() for own in list_checkpoints(self.checkpoints)]:
            self.last, self.last_step, self._base = folder, manifest.step, manifest

    def reserve(self, state: State) -> None:
        """Allocate the host memory that saves in the background copy into, so that the first of them blocks no longer
        than the others, and memory that does not suffice is noticed at the start.
        """
        self._staging.copy(split_accumulators(state))

    def save(self, state: State, facts: Facts, wait: bool = True, prune: bool = True, rows: int | None = None) -> None:
        """Write a checkpoint. One save is under way at a time: an earlier one is waited for first.

        With `async_save` and not `wait`, returns when the state has been copied; what goes wrong afterwards is raised
        by the next `poll`, `finish` or `save`. `prune=False` deletes no older checkpoint this time. `rows`: the
        accumulators are stacked (see `collected`), one row for each of so many ranks.

        Raises:
            SaveError: nothing was published, nothing older was touched.
            FencedError: the run belongs to another process now.
        """
        self.finish()
        parts, refer = self._plan(state)
        if not self.async_save or wait:
            self._save(parts, refer, facts, prune, rows)
            return
        self.fence.check()
        copied = self._staging.copy(parts)
        # A daemon: an abort is not held up by a write that nobody will see.
        self._thread = threading.Thread(
            target=self._save_quietly, args=(copied, refer, facts, prune, rows), name="checkpoint", daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Raise what went wrong in a save that has ended in the background; do not wait for one that has not."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if any, and raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def remove_unfinished(self) -> None:
        """Delete what earlier incarnations left half written (or half deleted). Raises FencedError."""
        with self.fence.held():
            for folder in remove_unfinished(self.checkpoints):
                self.tell(f"removed {folder.name}, which was never finished")

    def set_aside(self, after: int) -> None:
        """Rename every checkpoint of a later step: the run goes on from `after` and will not be what they are of.

        They stay loadable by name and are never deleted here, nor is what they refer to. Raises FencedError.
        """
        with self.fence.held():
            for folder in list_checkpoints(self.checkpoints):
                if (step_of(folder) or 0) > after:
                    remains = is_trimmed(folder)
                    aside = folder.with_name(f"{folder.name}.superseded-{self.fence.id}")
                    folder.rename(aside)
                    if remains:
                        continue
                    self.tell(f"{folder.name} is of an abandoned or damaged continuation: kept as {aside.name}")

    # One save

    def _plan(self, state: State) -> tuple[State, dict[str, ShardSet]]:
        """The sets to write, and those that stay where they are. One rank decides: all must write the same."""
        parts, now = split_accumulators(state), contents_of(state)
        refer: list[dict[str, ShardSet]] = [self._still_good(now) if self.rank == 0 else {}]
        if self.group is not None:
            dist.broadcast_object_list(refer, group=self.group, group_src=0)
        return {name: parts[name] for name in now if name not in refer[0]}, refer[0]

    def _still_good(self, now: Contents) -> dict[str, ShardSet]:
        """The sets of the last checkpoint that have not changed since and whose files are all there."""
        if self.levels == "all" or self._base is None or self.last is None:
            return {}
        base, last = self._base, self.last
        same = plan_save(now, {name: part.updates for name, part in base.sets.items()}).refer
        return {
            name: base.sets[name]
            for name in same
            if not any(
                size_problem(base.set_folder(last, name) / file, record)
                for file, record in base.sets[name].files.items()
            )
        }

    def _save_quietly(self, *arguments: Any) -> None:
        try:
            self._save(*arguments)
        except BaseException as error:  # it is raised in the training thread
            self._error = error

    def _save(self, parts: State, refer: dict[str, ShardSet], facts: Facts, prune: bool, rows: int | None) -> None:
        work = self.checkpoints / f"{step_name(facts.step)}.tmp-{self.fence.id}"
        with self._errors(facts.step, work):
            with self._together("prepare"):
                if self.rank == 0:
                    self.fence.check()
                    shutil.rmtree(work, ignore_errors=True)
                    work.mkdir(parents=True)
            for name, tensors in parts.items():
                with self._together(f"write {name}"):
                    save_set(work / name, tensors, self.group)
            with self._together("publish"):
                if self.rank == 0:
                    written = {name: counter(tensors, UPDATES) for name, tensors in parts.items()}
                    manifest = write_manifest(work, facts, self.fence.id, written, refer, rows)
                    with self.fence.held():
                        self._publish(work, self.checkpoints / step_name(facts.step))
                    self._base = manifest
        self.last, self.last_step, self.failures = self.checkpoints / step_name(facts.step), facts.step, 0
        if prune:
            with self._together("prune"):  # who lost the run just now is every rank's business
                if self.rank == 0:
                    try:
                        self.prune()
                    except OSError as error:
                        self.tell(f"warning: an old checkpoint could not be deleted: {error}")

    def _publish(self, work: Path, final: Path) -> None:
        """The moment at which the checkpoint exists."""
        if final.exists():  # nothing is overwritten, whatever it is
            final.rename(final.with_name(f"{final.name}.superseded-{self.fence.id}"))
        work.rename(final)
        sync_folders([self.checkpoints])

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """A stretch after which all ranks know whether all of them have done it."""
        failure: BaseException | None = None
        try:
            yield
        except (Exception, CheckpointException) as error:
            failure = error
        if self.group is not None:
            mine = None if failure is None else (isinstance(failure, FencedError), one_line(failure))
            reasons: list[tuple[bool, str] | None] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(reasons, mine, group=self.group)
            for rank, reason in enumerate(reasons):
                if failure is None and reason is not None:
                    kind = FencedError if reason[0] else SaveError
                    raise kind(f"cannot {what}: rank {rank}: {reason[1]}")
        if failure is not None:
            raise failure

    @contextmanager
    def _errors(self, step: int, work: Path) -> Iterator[None]:
        """Clear away a save that failed, and say so in one line."""
        try:
            yield
        except BaseException as error:
            if self.rank == 0:
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError | CheckpointException | RuntimeError):
                self.failures += 1
                hint = ": free some space" if is_disk_full(error) else ""
                reason = one_line(error)
                raise SaveError(f"step {step} could not be saved ({reason}){hint}") from error
            if isinstance(error, SaveError):  # another rank's trouble: counted here too, so that all count alike
                self.failures += 1
            raise

    # Pruning

    def prune(self) -> None:
        """Remove what is neither among the newest `keep_last`, nor at a multiple of `keep_every`, nor referred to by
        one of these or by one that was set aside. Raises FencedError, OSError.
        """
        with self.fence.held():
            remove(removals(self.checkpoints, self.keep_last, self.keep_every), mark=self.fence.id)


def write_manifest(
    work: Path,
    facts: Facts,
    incarnation: str,
    written: Mapping[str, int | None],
    refer: Mapping[str, ShardSet],
    rows: int | None = None,
) -> Manifest:
    """Complete the folder of a checkpoint whose sets have been written: the trainer's state, then the manifest.

    written: the sets in the folder, each with the updates of its level. refer: those that lie in other checkpoints.
    rows: of stacked accumulators.
    """
    write_synced(work / TRAINER, json.dumps(facts.trainer))
    name = step_name(facts.step)
    manifest = Manifest(
        step=facts.step,
        tokens=facts.tokens,
        incarnation=incarnation,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=facts.config,
        tokenizer=facts.tokenizer,
        data=facts.data,
        losses=facts.losses,
        sets={
            **{
                part: ShardSet(
                    f"{name}/{part}", record_files(work / part), count, rows if is_accumulator_set(part) else None
                )
                for part, count in written.items()
            },
            **refer,
        },
        files={TRAINER: record_file(work / TRAINER)},
    )
    write_synced(work / MANIFEST, manifest.to_json())
    sync_folders([*(work / part for part in written), work])
    return manifest


def write_synced(path: Path, text: str) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, on every rank."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, CheckpointException):
            waiting += [failure for failure, _ in current.failures.values()]
        waiting += [cause for cause in (current.__cause__, current.__context__) if cause is not None]


def is_disk_full(error: BaseException) -> bool:
    """Whether a save failed for want of space."""
    return any(
        isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        for cause in causes(error)
    )


def one_line(error: BaseException) -> str:
    """The reason of a failed save for a message: the operating system's word where there is one."""
    for cause in causes(error):
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}" + (f": {cause.filename}" if cause.filename else "")
    found = [cause for cause in causes(error) if not isinstance(cause, CheckpointException)]
    lines = str(found[0] if found else error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = ["CheckpointWriter", "Facts", "FencedError", "SaveError"]
