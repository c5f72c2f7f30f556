"""What makes a checkpoint: a folder `step_00001234` whose manifest names every file with its size and sha256.

The manifest is written last and carries a hash of itself, so that a folder is either whole or known not to be. Each
shard set (`core`, `level_0`, …) says where its files lie, relative to the folder of all checkpoints: a set that has not
changed stays in an older checkpoint and is referred to. Of a checkpoint that is no longer kept, the sets that are
still referred to remain, in a folder whose manifest is called `trimmed.json`: it is no checkpoint any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hope_train.errors import UserError

FORMAT = 3
READABLE = (1, 2, 3)
"""Format 1 had what a level collects inside the level's own set; 2 knew no stacked accumulators; all else is the
same."""

MANIFEST = "manifest.json"
TRIMMED = "trimmed.json"
TRAINER = "trainer.json"
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"step_\d{8,}\.tmp-.+")
_SUPERSEDED = re.compile(r"step_\d{8,}\.superseded-.+")


class DamagedCheckpointError(UserError):
    """A checkpoint that is partial, or whose files are not those of its manifest. The message names it and says why."""


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardSet:
    """The files of one set."""

    path: str
    """Folder relative to the folder of all checkpoints: `step_00001234/core`."""

    files: dict[str, FileRecord]
    """By name in that folder."""

    updates: int | None = None
    """Updates that the level had taken; None where that does not tell whether the set has changed since."""

    rows: int | None = None
    """Of accumulators: the data-parallel ranks whose own are in it, stacked; None: their sum (folded), or none."""

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that wrote it: at most the step of the manifest that names it."""
        return step_of(Path(PurePosixPath(self.path).parts[0]))


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors and the trainer's own state."""

    step: int
    """Steps of the run so far, i.e. global batches consumed; the next batch has this number."""

    tokens: int
    """Training tokens consumed."""

    incarnation: str
    """Who wrote it (see `fence`)."""

    created: str
    """ISO 8601, UTC."""

    config: dict[str, Any]
    """The resolved configuration of the run at that time."""

    tokenizer: str
    """Fingerprint (sha256 of the model file)."""

    data: dict[str, Any]
    """What fixes the order of samples; equal data means that batch i is the same batch."""

    losses: dict[str, Any]
    """Figures for people: the last training loss, the last and best validation figures."""

    sets: dict[str, ShardSet]
    """`core`, `level_0`, …; `level_2_accumulator` for a level in mid-period."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    """Other files in the checkpoint's own folder."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return step_name(self.step)

    @property
    def stacked(self) -> int | None:
        """Rows of the stacked accumulators; None: folded, or none are in it."""
        return next((part.rows for part in self.sets.values() if part.rows is not None), None)

    def references(self) -> set[str]:
        """Names of other checkpoints whose files this one needs."""
        return {PurePosixPath(part.path).parts[0] for part in self.sets.values()} - {self.name}

    def set_folder(self, folder: Path, name: str) -> Path:
        """Where the files of a set lie, for the checkpoint in `folder`, whatever that folder is called now."""
        part = self.sets[name]
        first, *rest = PurePosixPath(part.path).parts
        base = folder if first == self.name else _home(folder.parent / first, part)
        return base.joinpath(*rest)

    def to_json(self) -> str:
        """The file's text, with a hash of everything else in it."""
        tree = {"format": FORMAT, **asdict(self)}
        return json.dumps({**tree, "sha256": _digest(tree)}, indent=1, ensure_ascii=False) + "\n"


def step_name(step: int) -> str:
    """`step_00001234`."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders named like a published checkpoint, whole or damaged, from the oldest step to the newest."""
    if not checkpoints.is_dir():
        return []
    found = [(step, path) for path in checkpoints.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def list_unfinished(checkpoints: Path) -> list[Path]:
    """Temporary folders of saves that have not been published (or of checkpoints being deleted)."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _TEMPORARY.fullmatch(path.name) and path.is_dir())


def list_superseded(checkpoints: Path) -> list[Path]:
    """Checkpoints, and what remains of them, of continuations that were given up."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _SUPERSEDED.fullmatch(path.name) and path.is_dir())


def list_renamed(checkpoints: Path) -> list[Path]:
    """Folders of any other name: checkpoints that somebody has renamed may be among them."""
    if not checkpoints.is_dir():
        return []
    known = (_NAME, _TEMPORARY, _SUPERSEDED)
    return sorted(
        path
        for path in checkpoints.iterdir()
        if path.is_dir() and not any(pattern.fullmatch(path.name) for pattern in known)
    )


def is_trimmed(folder: Path) -> bool:
    """Whether a folder is what remains of a checkpoint: sets that others refer to."""
    return (folder / TRIMMED).is_file() and not (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`; files are not looked at. Raises DamagedCheckpointError, UserError."""
    if is_trimmed(folder):
        raise DamagedCheckpointError(
            f"checkpoint {folder} was given up: only what other checkpoints refer to is left of it ({TRIMMED})"
        )
    return _read(folder, MANIFEST)


def read_trimmed(folder: Path) -> Manifest:
    """What the manifest of a trimmed folder was. Raises DamagedCheckpointError, UserError."""
    return _read(folder, TRIMMED)


def _read(folder: Path, file: str) -> Manifest:
    try:
        tree = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"checkpoint {folder} has no {file}: it is not whole") from None
    except OSError as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {file} cannot be read: {error.strerror}") from None
    except ValueError:  # not UTF-8, or not JSON
        raise DamagedCheckpointError(f"checkpoint {folder}: {file} is damaged: it is not JSON") from None
    if not isinstance(tree, dict) or tree.pop("sha256", None) != _digest(tree):
        raise DamagedCheckpointError(f"checkpoint {folder}: {file} is damaged: it does not have its own sha256")
    version = tree.pop("format", None)
    if version not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise UserError(f"checkpoint {folder} has format {version}, this version of hope-train reads {known}")
    try:
        sets = {
            name: ShardSet(part["path"], _records(part["files"]), part.get("updates"), part.get("rows"))
            for name, part in tree.pop("sets").items()
        }
        manifest = Manifest(**{**tree, "sets": sets, "files": _records(tree["files"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {file} is incomplete: {error}") from None
    for part in sets.values():
        place = PurePosixPath(part.path)
        names = [place, *map(PurePosixPath, part.files)]
        if any(name.is_absolute() or ".." in name.parts or not name.parts for name in names):
            raise DamagedCheckpointError(f"checkpoint {folder}: {file} leads out of the checkpoints' folder")
    return manifest


def _home(plain: Path, part: ShardSet) -> Path:
    """The folder called `plain` when a set was written into it. It may have been set aside since, and the step of that
    name have been written anew by another continuation: what each says that it holds tells which of them it is.
    """
    aside = [path for path in plain.parent.glob(f"{plain.name}.superseded-*") if path.is_dir()]
    for folder in (plain, *sorted(aside)) if aside else ():
        try:
            held = read_trimmed(folder) if is_trimmed(folder) else read_manifest(folder)
        except UserError:
            continue
        if any(other.path == part.path and other.files == part.files for other in held.sets.values()):
            return folder
    return plain


def wanted_files(folder: Path, manifest: Manifest) -> dict[Path, FileRecord]:
    """Every file that a checkpoint consists of, with what it was when it was written."""
    wanted = {folder / name: record for name, record in manifest.files.items()}
    for set_name, part in manifest.sets.items():
        place = manifest.set_folder(folder, set_name)
        wanted |= {place / name: record for name, record in part.files.items()}
    return wanted


def problems(folder: Path, manifest: Manifest, known: dict[Path, str] | None = None) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, a line for each that is not as it was written.

    Sizes come first: they cost nothing, and a truncated file should not wait for gigabytes of others to be hashed.

    known: digests of files hashed before (by path), which are used and added to; None: hash them all.
    """
    known = {} if known is None else known
    whole: dict[Path, FileRecord] = {}
    for path, record in wanted_files(folder, manifest).items():
        reason = size_problem(path, record)
        if reason is None:
            whole[path] = record
        else:
            elsewhere = "" if path.is_relative_to(folder) else ", which this checkpoint refers to"
            yield f"checkpoint {folder}: {shown_in(folder, path)} {reason}{elsewhere}"
    fresh = [path for path in whole if path not in known]
    known |= zip(fresh, _hashes(folder, fresh), strict=True)
    for path, record in whole.items():
        if known[path] != record.sha256:
            yield f"checkpoint {folder}: {shown_in(folder, path)} does not have the sha256 of the manifest"


def size_problem(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file as far as its size tells, or None."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return None if size == record.bytes else f"has {size} bytes instead of {record.bytes}"


def verify(folder: Path) -> Manifest:
    """Read the manifest and compare every file with it, contents and all, those it refers to in other folders too.

    Raises DamagedCheckpointError naming the first file that is missing or not as it was written.
    """
    manifest = read_manifest(folder)
    for problem in problems(folder, manifest):
        raise DamagedCheckpointError(problem)
    return manifest


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Every file below `folder` by its path there, with size and hash."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = _hashes(folder, paths)
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, digest)
        for path, digest in zip(paths, digests, strict=True)
    }


def record_file(path: Path) -> FileRecord:
    """Size and hash of one file."""
    return FileRecord(path.stat().st_size, file_sha256(path))


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hashes(folder: Path, paths: list[Path]) -> list[str]:
    """Digests of files; hashing lets go of the interpreter's lock, so that several are done at a time."""
    try:
        with ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0)))) as pool:
            return list(pool.map(file_sha256, paths))
    except OSError as error:
        name = shown_in(folder, Path(error.filename)) if error.filename else "a file"
        raise DamagedCheckpointError(f"checkpoint {folder}: {name} cannot be read: {error.strerror}") from None


def _records(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    return {name: FileRecord(int(entry["bytes"]), str(entry["sha256"])) for name, entry in tree.items()}


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def shown_in(folder: Path, path: Path) -> str:
    """A file's name for a message: relative to its checkpoint, or to the folder of all where it lies in another."""
    base = folder if path.is_relative_to(folder) else folder.parent
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def sync_folders(folders: Iterable[Path]) -> None:
    """Make new names in these folders survive a loss of power."""
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
