"""Local files of text: .txt and .jsonl, plain or compressed (.gz, .zst), .parquet and .arrow."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.documents import Document
from data_pipelines.records import read_records
from data_pipelines.unpacking import reading_error
from hope_train.errors import UserError

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
_FINGERPRINT_BYTES = 1 << 16


def find_files(path: Path) -> list[Path]:
    """The text files at `path`: itself, or all below a folder in natural order (part-2 before part-10).

    Hidden files and folders are left out, links to folders are followed. Raises UserError if there is none, and where
    links lead round in a circle.
    """
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder {path}")
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(folder, name) for name in folders if Path(folder, name).is_symlink()):
            if link.resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
                raise UserError(f"{link}: the link leads back to a folder that it is in: remove it")
        found += [Path(folder, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    if not found:
        raise UserError(f"{path}: the folder holds no text files; known are {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: natural_key(file.relative_to(path).as_posix()))


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key by which numbers inside names count as numbers; the name itself breaks ties such as 1 and 01."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def fingerprint(file: Path) -> list[str | int]:
    """What changes when a file does: its size, its time stamp, and a hash of its first and last 64 KiB."""
    try:
        status = file.stat()
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            digest.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, status.st_size - _FINGERPRINT_BYTES))
            digest.update(stream.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise reading_error(file, error) from None
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def read_file(file: Path, name: str, text_field: str) -> Iterator[Document]:
    """The documents of one file, ids beginning with `name`.

    A .txt file is one document, its line ends kept; a leading byte order mark is dropped. Documents without any
    text are passed over. Raises UserError naming the file, and the line or row, for anything that cannot be read.
    """
    for record in read_records(file, text_field):
        if record.fault is not None:
            raise record.fault.error()
        if record.text:
            yield Document(name if record.whole_file else f"{name}:{record.number}", record.text)
