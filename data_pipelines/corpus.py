"""A tokenised corpus in the cache: made once, by one process, whole or not at all, and checked when it is opened."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.carving import Carving, ContentHash, carve, survey
from data_pipelines.documents import Document
from data_pipelines.pack import FILES, SPLITS, CorpusSplit, PackWriter, open_split
from data_pipelines.sources import describe_source, fingerprint_sources, read_sources
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError

_log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_BATCH_CHARACTERS = 1 << 22
# Up to this size a corpus is hashed at every opening; above it when its files' times are not those of the manifest.
_HASH_ALWAYS_BYTES = 1 << 30
_NOTICE_SECONDS = 10.0


class DamagedCacheError(Exception):
    """A cached corpus is not what its manifest says."""


@dataclass(frozen=True)
class Corpus:
    """Both sides of a tokenised corpus, its folder and its manifest."""

    train: CorpusSplit
    validation: CorpusSplit
    folder: Path
    manifest: dict[str, Any]


def open_corpus(data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """The corpus of `data.sources` under `tokenizer`, from the cache, where it is put first if need be.

    Any number of processes may call this at once: one reads and tokenises, the others wait for it. The cache's key
    is made of the sources (names, sizes, times), the tokenizer's fingerprint and the share held out.

    Raises:
        UserError: no sources, text that cannot be read, no text, a cache folder that cannot be written or is full.
    """
    if not data.sources:
        raise UserError("data.sources is empty: name at least one path, hub data set or builtin text")
    if any(source.selects for source in data.sources) or data.on_fault != "stop":
        raise UserError(
            "a cached corpus is all of its text: filters and data.on_fault=skip go with `hope data tokenize`, which "
            "writes what is left for data.mode=indexed"
        )
    key = {
        "format": FORMAT,
        "sources": fingerprint_sources(data.sources),
        "tokenizer": tokenizer.fingerprint,
        "validation_fraction": data.validation_fraction,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    root = Path(data.cache_dir).expanduser() / "corpora"
    folder = root / name
    if folder.is_dir():
        try:
            return _open(folder, tokenizer)
        except DamagedCacheError:
            pass  # Looked at again under the lock: another process may be mending it.
    with cache_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f"{name}.lock"):
            if folder.is_dir():
                try:
                    return _open(folder, tokenizer)
                except DamagedCacheError as damage:
                    _log.warning("the cached corpus %s is damaged (%s): making it anew", folder, damage)
                    _remove(folder)
            _build(folder, data, tokenizer, key)
            try:
                return _open(folder, tokenizer)
            except DamagedCacheError as damage:
                raise UserError(f"the cached corpus {folder} is damaged right after it was made: {damage}") from None


def _open(folder: Path, tokenizer: Tokenizer) -> Corpus:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _verify(folder, manifest["files"])
        splits = [open_split(folder, name, tokenizer.vocab_size, manifest["splits"][name]) for name in SPLITS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCacheError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    return Corpus(splits[0], splits[1], folder, manifest)


def _verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Compare all files with the manifest. Raises ValueError or OSError naming the first that differs."""
    if set(files) != set(FILES):
        raise ValueError(f"{MANIFEST} does not list the files of a corpus")
    total = sum(int(entry["bytes"]) for entry in files.values())
    for name, entry in files.items():
        status = (folder / name).stat()
        if status.st_size != entry["bytes"]:
            raise ValueError(f"{name} has {status.st_size} bytes instead of {entry['bytes']}")
        trusted = total > _HASH_ALWAYS_BYTES and status.st_mtime_ns == entry["mtime_ns"]
        if not trusted and _file_hash(folder / name) != entry["sha256"]:
            raise ValueError(f"{name} does not have the sha256 of its manifest")


def _build(folder: Path, data: DataConfig, tokenizer: Tokenizer, key: dict[str, Any]) -> None:
    """Make the corpus in a temporary folder beside its place and rename it there."""
    carving = survey(lambda: _progress(_read(data), "reading", None), data.validation_fraction)
    with new_folder(folder) as work:
        counts = _tokenise(work, data, tokenizer, carving)
        files = {}
        for name in FILES:
            status = _flush(work / name).stat()
            digest = _file_hash(work / name)
            files[name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
        manifest = {
            "format": FORMAT,
            "key": key,
            "content": carving.content,
            "cut_into_pieces_of": carving.piece_characters,
            "eot_id": tokenizer.eot_id,
            "vocab_size": tokenizer.vocab_size,
            "splits": counts,
            "files": files,
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(work / MANIFEST)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end of the block; removed if the block fails.

    To be used under the lock of `folder`. What a killed process left there is removed first. Raises OSError.
    """
    prefix = f"{folder.name}.tmp-{socket.gethostname()}-"
    for left_over in folder.parent.glob(prefix + "*"):
        _remove(left_over)  # Of a process that was killed: the lock is ours.
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        work.chmod(0o755)
        yield work
        try:
            work.rename(folder)
        except OSError as error:
            # Where locks do not reach from machine to machine, another may have been first with the same content.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        if work.exists():
            _remove(work)


def _read(data: DataConfig) -> Iterator[Document]:
    return read_sources(data.sources, data.hub_timeout)


def _tokenise(work: Path, data: DataConfig, tokenizer: Tokenizer, carving: Carving) -> dict[str, dict[str, int]]:
    """Read everything once more and write both splits; counts per split."""
    writers = {name: PackWriter(work, name, tokenizer.vocab_size, tokenizer.eot_id) for name in SPLITS}
    content = ContentHash()
    waiting: list[tuple[str, Document]] = []
    characters = 0
    try:
        for number, document in enumerate(_progress(_read(data), "tokenising", carving.documents)):
            own_hash = content.add(document.text)
            for part in carve(carving, number, document, own_hash):
                waiting.append(part)
                characters += len(part[1].text)
            if characters >= _BATCH_CHARACTERS:
                _write(writers, tokenizer, waiting)
                waiting, characters = [], 0
        _write(writers, tokenizer, waiting)
        if content.hexdigest() != carving.content:
            names = ", ".join(describe_source(source) for source in data.sources)
            raise UserError(f"the text of {names} changed while it was being read: start again when it is at rest")
        return {name: writer.close() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()


def _write(writers: dict[str, PackWriter], tokenizer: Tokenizer, parts: list[tuple[str, Document]]) -> None:
    encoded = tokenizer.encode_batch([document.text for _, document in parts], threads=len(os.sched_getaffinity(0)))
    for (split, document), token_ids in zip(parts, encoded, strict=True):
        writers[split].add(document.id, token_ids, len(document.text.encode("utf-8")))


def _progress(documents: Iterator[Document], doing: str, total: int | None) -> Iterator[Document]:
    """`documents`, counted on a bar where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield from documents
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        for document in documents:
            yield document
            bar.advance(task)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a corpus. A lock dies with the process that holds it, so it is waited for without end."""
    import filelock

    held = filelock.FileLock(str(path))
    try:
        held.acquire(timeout=_NOTICE_SECONDS)
    except filelock.Timeout:
        _log.warning("waiting for another process that is tokenising the same corpus (lock %s)", path)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """A cache folder that cannot be written becomes a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"the cache folder {root} cannot be written ({reason}): {hint}set data.cache_dir") from None


def _remove(folder: Path) -> None:
    """Take a folder out of the way at once, then delete it; processes that have its files mapped keep them."""
    if not folder.name.endswith(".removed"):
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".removed", dir=folder.parent))
        folder.rename(aside / "corpus")
        folder = aside
    shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> Path:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
