"""What is kept of the checkpoints of a run, and removing the rest so that a kill at any moment leaves no false one.

A checkpoint that is no longer kept is removed, but for the sets that a kept one names: its manifest is renamed to
`trimmed.json` first, which ends its being a checkpoint, then what nobody names is deleted. Checkpoints that were set
aside (superseded) are kept with all they refer to, unless it is said that they may go.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hope_train.checkpoint.manifest import (
    MANIFEST,
    TRIMMED,
    Manifest,
    is_trimmed,
    list_checkpoints,
    list_renamed,
    list_superseded,
    list_unfinished,
    read_manifest,
    size_problem,
    sync_folders,
    wanted_files,
)
from hope_train.errors import UserError


@dataclass(frozen=True)
class Removal:
    """What is to be removed of one folder."""

    folder: Path

    keep: tuple[str, ...]
    """Sets that stay; with none of them the folder goes as a whole."""

    @property
    def paths(self) -> list[Path]:
        """What goes, at the top of the folder."""
        spared = {*self.keep, TRIMMED} if self.keep else set()
        return sorted(path for path in self.folder.iterdir() if path.name not in spared)

    @property
    def bytes(self) -> int:
        """How much is freed."""
        paths = [path for path in self.paths if path.name not in (MANIFEST, TRIMMED) or not self.keep]
        return sum(size_of(path) for path in paths)


def removals(
    checkpoints: Path,
    keep_last: int | None,
    keep_every: int = 0,
    superseded: bool = False,
    check_sizes: bool = False,
) -> list[Removal]:
    """What can go. Reads manifests, changes nothing; what has no readable manifest is left alone.

    Args:
        keep_last: how many of the newest checkpoints stay; None: all of them.
        keep_every: each checkpoint whose step is a multiple of it stays too (0: none for that reason).
        superseded: whether those that were set aside may go as well.
        check_sizes: a checkpoint of which a file is missing or has another size does not count as one of the newest.
    """
    whole = dict(_readable(list_checkpoints(checkpoints)))
    newest = set(whole) if keep_last is None else _newest(whole, keep_last, check_sizes)
    kept = {
        folder: manifest
        for folder, manifest in whole.items()
        if folder in newest or (keep_every and manifest.step % keep_every == 0)
    }
    aside = {} if superseded else dict(_readable(list_superseded(checkpoints)))
    # Who has renamed one wants to keep it.
    naming = kept | aside | dict(_readable(list_renamed(checkpoints)))
    # What one refers to holds the files itself: a reference never leads to another reference.
    named = {manifest.set_folder(folder, name) for folder, manifest in naming.items() for name in manifest.sets}
    candidates = [folder for folder in whole if folder not in kept]
    candidates += [folder for folder in list_checkpoints(checkpoints) if is_trimmed(folder)]
    candidates += [folder for folder in list_superseded(checkpoints) if superseded or is_trimmed(folder)]
    found = []
    for folder in candidates:
        inside = {path.relative_to(folder).parts[0] for path in named if path.is_relative_to(folder)}
        removal = Removal(folder, tuple(sorted(inside)))
        if removal.paths:
            found.append(removal)
    return found


def remove(found: Iterable[Removal], mark: str) -> None:
    """Carry removals out, each so that a deletion cut short leaves nothing that looks like a checkpoint.

    `mark` goes into the names of folders under deletion, which the next start removes if need be. Raises OSError.
    """
    for removal in found:
        if not removal.keep:
            step, _, rest = removal.folder.name.partition(".")
            doomed = removal.folder.with_name(f"{step}.tmp-{mark}-pruned{rest and '-'}{rest}")
            if doomed.exists():
                shutil.rmtree(doomed)
            removal.folder.rename(doomed)
            shutil.rmtree(doomed)
            continue
        if (removal.folder / MANIFEST).exists():
            (removal.folder / MANIFEST).replace(removal.folder / TRIMMED)
            # On the disk before anything is deleted: otherwise a loss of power could bring the manifest back.
            sync_folders([removal.folder])
        for path in removal.paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_unfinished(checkpoints: Path) -> Iterator[Path]:
    """Delete what was half written or half deleted, one folder after another; yields each before it goes."""
    for folder in list_unfinished(checkpoints):
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what goes away meanwhile has none."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else (path,):
        with suppress(FileNotFoundError):
            total += 0 if file.is_dir() else file.stat().st_size
    return total


def _newest(whole: dict[Path, Manifest], count: int, check_sizes: bool) -> set[Path]:
    """The newest `count` of these, and what is damaged among them."""
    found: set[Path] = set()
    for folder in reversed(whole):
        if count == 0:
            break
        found.add(folder)
        count -= not check_sizes or not any(
            size_problem(path, record) for path, record in wanted_files(folder, whole[folder]).items()
        )
    return found


def _readable(folders: Iterable[Path]) -> Iterator[tuple[Path, Manifest]]:
    for folder in folders:
        with suppress(UserError):
            yield folder, read_manifest(folder)
