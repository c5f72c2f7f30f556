"""The sources as shards: files, each of which can be read from any of its records on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from data_pipelines.builtin import python_docs, python_docs_fingerprint
from data_pipelines.files import SUFFIXES, find_files, fingerprint
from data_pipelines.hub_files import HubFile, hub_files
from data_pipelines.records import Place, Record, read_records
from data_pipelines.unpacking import GzipIndexes
from hope_train.config.data import SourceConfig
from hope_train.errors import UserError


class Shard(Protocol):
    """A part of a source that is read in one go."""

    @property
    def name(self) -> str:
        """Unique and stable; ids of documents begin with it."""

    @property
    def source(self) -> int:
        """Number of the source it belongs to."""

    def records(self, place: Place, part: int, parts: int, columns: Sequence[str] | None) -> Iterator[Record]:
        """Its records from `place` on, as `read_records`."""

    def fingerprint(self) -> str:
        """What changes when its text does."""


@dataclass(frozen=True)
class FileShard:
    """A file, local or on the hub."""

    name: str
    source: int
    file: Path | HubFile
    text_field: str
    indexes: GzipIndexes | None

    @property
    def commit(self) -> str | None:
        """Of a file on the hub."""
        return self.file.commit if isinstance(self.file, HubFile) else None

    def records(self, place: Place, part: int, parts: int, columns: Sequence[str] | None) -> Iterator[Record]:
        indexes = self.indexes if isinstance(self.file, Path) else None
        return read_records(self.file, self.text_field, place, part, parts, columns, indexes)

    def fingerprint(self) -> str:
        if isinstance(self.file, HubFile):
            return _short(self.file.url)  # It holds the revision.
        size, _, ends = fingerprint(self.file)
        return _short(f"{size} {ends}")


@dataclass(frozen=True)
class BuiltinShard:
    """Python's own documentation and library."""

    name: str
    source: int

    def records(self, place: Place, part: int, parts: int, columns: Sequence[str] | None) -> Iterator[Record]:
        for number, document in enumerate(python_docs(), start=1):
            if number > place.number and (number - 1) % parts == part:
                yield Record(number, Place(number, number), document.text, {})

    def fingerprint(self) -> str:
        return _short(json.dumps(python_docs_fingerprint()))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def list_shards(sources: Sequence[SourceConfig], hub_timeout: float, indexes: GzipIndexes | None = None) -> list[Shard]:
    """The shards of all sources: source by source, files in natural order.

    Raises UserError for what is not there, and for files of an unknown kind.
    """
    found: list[Shard] = []
    for number, source in enumerate(sources):
        if source.path is not None:
            root = Path(source.path).expanduser()
            label = PurePath(source.path).as_posix()
            for file in find_files(root):
                name = label if file == root else f"{label}/{file.relative_to(root).as_posix()}"
                found.append(FileShard(name, number, file, source.text_field, indexes))
        elif source.hub is not None:
            files = hub_files(source.hub, split=source.split, revision=source.revision, timeout=hub_timeout)
            for remote in files:
                if not remote.name.lower().endswith(SUFFIXES) or remote.name.lower().endswith(".arrow"):
                    kinds = ", ".join(SUFFIXES[:-1])
                    raise UserError(
                        f"hub data set {source.hub}: {remote.name} cannot be streamed (known are {kinds}); use "
                        "data.mode=cached, which reads every kind"
                    )
                inside = remote.url.removeprefix("hf://datasets/")
                found.append(FileShard(f"hub:{inside}", number, remote, source.text_field, None))
        else:
            found.append(BuiltinShard("python-docs", number))
    return found


_GROUPS = 64


def fingerprint_shards(shards: Sequence[Shard], sources: Sequence[SourceConfig]) -> dict[str, Any]:
    """What the text of each source is, in kilobytes at most: {source: {files: fingerprint}}.

    Many files go together in groups of neighbours, so that a change can be named without a list of thousands.
    """
    result: dict[str, Any] = {}
    for number, source in enumerate(sources):
        own = [shard for shard in shards if shard.source == number]
        size = max(1, -(-len(own) // _GROUPS))
        prints = {}
        for first in range(0, len(own), size):
            group = own[first : first + size]
            name = group[0].name if len(group) == 1 else f"{group[0].name} … {group[-1].name}"
            prints[name] = (
                group[0].fingerprint() if len(group) == 1 else _short("".join(s.fingerprint() for s in group))
            )
        key = source.path or source.hub or str(source.builtin)
        result[f"{number}:{key}"] = {"files": len(own), **prints}
    return result
