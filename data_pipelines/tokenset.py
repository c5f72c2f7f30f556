"""A tokenised data set on disk: the folder that `hope data tokenize` writes, and how it is checked.

    plan.json                  what is to be written: sources, tokenizer, shares; a restart must agree with it
    train-00000.bin .idx       a shard in Megatron's indexed format; validation-00000 beside it, where text is held out
    shard-00000.json           counts and hashes of shard 0, written when it is whole
    manifest.json              all of that, written last: with it the set is complete

Each document is its tokens and then end-of-text, as Megatron writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hope_train.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"


def shard_file(folder: Path, number: int) -> Path:
    """Where the counts and hashes of a shard are."""
    return folder / f"shard-{number:05d}.json"


def prefix_of(split: str, number: int) -> str:
    """The common name of a shard's .bin and .idx."""
    return f"{split}-{number:05d}"


def write_json(path: Path, tree: Any) -> None:
    """Write a file whole or not at all. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(tree, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """A file that `write_json` wrote. Raises UserError for any other."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): restore it, or write the set anew") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object: restore it, or write the set anew")
    return tree


def file_entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file that has been written to the disk. Raises OSError."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete set. Raises UserError where the set is not complete, or of another format."""
    if not (folder / MANIFEST).is_file():
        unfinished = (folder / PLAN).is_file()
        more = "it is not finished: run the same `hope data tokenize` again" if unfinished else "not a token set"
        raise UserError(f"{folder} has no {MANIFEST}: {more}")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST}: format {manifest.get('format')!r} is not {FORMAT}: write the set anew")
    return manifest


def damage(folder: Path, files: dict[str, dict[str, Any]], threads: int = 1) -> list[str]:
    """One line for every file that is not what its manifest says; all of them are read."""

    def check(name: str) -> str | None:
        path, entry = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size} bytes instead of {entry['bytes']}"
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                    return f"{path} does not have the sha256 of its manifest"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return [line for line in pool.map(check, files) if line]


def content_of(shards: Sequence[dict[str, Any]], split: str) -> str:
    """A hash of all tokens of a split, from those of its files."""
    digest = hashlib.sha256()
    for shard in shards:
        part = shard["splits"].get(split)
        if part:
            digest.update(part["files"][f"{part['prefix']}.bin"]["sha256"].encode())
            digest.update(part["files"][f"{part['prefix']}.idx"]["sha256"].encode())
    return digest.hexdigest()
