"""Text that every machine with Python has: the standard library's sources and Python's documentation topics."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.documents import Document
from data_pipelines.files import fingerprint
from hope_train.errors import UserError

# Tests repeat themselves, `encodings` is character tables, `pydoc_data` is read as topics, and `__phello__` is a joke.
_FOLDERS_LEFT_OUT = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_SUFFIXES = (".py", ".rst", ".txt")


def python_docs() -> Iterator[Document]:
    """Documentation topics (`help("lambda")`), then library files, in the order of a hash of their names.

    The hash mixes the library's parts, so that a byte limit cuts off no part of it; the order depends on the names
    alone. Raises UserError on an installation without a readable library.
    """
    for name, text in sorted(_topics().items()):
        yield Document(f"python-docs/topics/{name}", text)
    root = _root()
    for file in _files(root):
        try:
            text = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # A file that this account cannot read, or one of the few in another encoding.
        if text.strip():
            yield Document(f"python-docs/lib/{file.relative_to(root).as_posix()}", text)


def python_docs_fingerprint() -> list[object]:
    """What the text of `python_docs` depends on: Python's version, and size and time of each file."""
    root = _root()
    digest = hashlib.sha256()
    for file in _files(root):
        try:
            digest.update(f"{file.relative_to(root).as_posix()} {fingerprint(file)}\n".encode())
        except UserError:
            continue  # Unreadable files are passed over in reading, too.
    return [sys.version, digest.hexdigest()]


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:  # Distributions that split the library up may leave it out.
        return {}


def _root() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise UserError(f"builtin python-docs: Python's library folder {root} does not exist; name another source")
    return root


def _files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _FOLDERS_LEFT_OUT and not name.startswith((".", "config-"))
        ]
        # _sysconfigdata_* is the record of one machine's build.
        found += [
            Path(folder, name) for name in names if name.endswith(_SUFFIXES) and not name.startswith("_sysconfig")
        ]
    return sorted(found, key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())
