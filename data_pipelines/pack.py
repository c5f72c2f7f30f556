"""Packed tokens on disk: one file of token ids, document after document, and where each document begins.

Layout of a split, as `PackWriter` writes it: every document is the end-of-text token and then its own tokens; one
more end-of-text token closes the split. So the model sees a document's first token after end-of-text (as when it
is evaluated or generates), and end-of-text after a document's last token.

Files: `<split>.tokens.bin` (little-endian uint16 or uint32), `<split>.offsets.npy` (int64 [documents + 1]: positions
of the opening end-of-text tokens, the closing one last), `<split>.ids.txt` (a JSON string with the id per document).
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Segment

SPLITS = ("train", "validation")
FILES = tuple(f"{split}.{part}" for split in SPLITS for part in ("tokens.bin", "offsets.npy", "ids.txt"))


def token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds all ids of a vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class PackWriter:
    """Writes one split into a folder."""

    def __init__(self, folder: Path, split: str, vocab_size: int, eot_id: int) -> None:
        self._stem = folder / split
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._eot_id = eot_id
        self._offsets = array("q")
        self._tokens = 0
        self._bytes = 0
        self._token_file = Path(f"{self._stem}.tokens.bin").open("wb")  # noqa: SIM115 - open until close()
        self._id_file = Path(f"{self._stem}.ids.txt").open("w", encoding="utf-8")  # noqa: SIM115

    def add(self, document_id: str, token_ids: Sequence[int], text_bytes: int) -> None:
        """Append a document. `text_bytes` is the length of its text in UTF-8."""
        self._offsets.append(self._tokens)
        self._put([self._eot_id])
        self._put(token_ids)
        self._bytes += text_bytes
        self._id_file.write(json.dumps(document_id) + "\n")

    def _put(self, token_ids: Sequence[int]) -> None:
        self._token_file.write(np.asarray(token_ids, dtype=self._dtype).tobytes())
        self._tokens += len(token_ids)

    def close(self) -> dict[str, int]:
        """Finish the files; the counts of the split: documents, tokens (end-of-text included) and bytes of text."""
        documents = len(self._offsets)
        self._offsets.append(self._tokens)
        if documents:
            self._put([self._eot_id])
        np.save(f"{self._stem}.offsets.npy", np.frombuffer(self._offsets, dtype=np.int64))
        self._token_file.close()
        self._id_file.close()
        return {"documents": documents, "tokens": self._tokens, "bytes": self._bytes}

    def abandon(self) -> None:
        """Close the files without finishing them."""
        self._token_file.close()
        self._id_file.close()


@dataclass(frozen=True)
class CorpusSplit:
    """One side of a corpus, tokens mapped from disk."""

    name: str
    """`train` or `validation`."""

    tokens: np.ndarray
    """Ids, uint16 or uint32 [tokens]; a memory map."""

    offsets: np.ndarray
    """int64 [documents + 1]: where each document's end-of-text token is; the closing one last."""

    documents: int
    """Number of documents (pieces of a document, where documents were cut)."""

    text_bytes: int
    """Bytes of the text in UTF-8."""

    ids_path: Path
    """File with the documents' ids, one JSON string in a line."""

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document without its end-of-text, int64 [documents]."""
        return np.diff(self.offsets) - 1

    def documents_between(self, first: int, last: int) -> list[Segment]:
        """The documents that have tokens in [first, last), positions counted from `first`."""
        low = int(np.searchsorted(self.offsets, first, side="right")) - 1
        high = min(int(np.searchsorted(self.offsets, last, side="left")), self.documents)
        ids = self.document_ids()[low:high]
        starts = np.maximum(self.offsets[low:high] - first, 0).tolist()
        return [Segment(start, source_of(name), name) for start, name in zip(starts, ids, strict=True)]

    def document_ids(self) -> list[str]:
        """All ids, in order."""
        return [json.loads(line) for line in self.ids_path.read_text(encoding="utf-8").splitlines()]


def source_of(document_id: str) -> str:
    """The file, or the hub's data set, that a document's id begins with."""
    return re.sub(r"(:[0-9]+)?(#[0-9]+-[0-9]+)?$", "", document_id)


def open_split(folder: Path, name: str, vocab_size: int, counts: dict[str, Any]) -> CorpusSplit:
    """Map a split whose files and `counts` a manifest vouches for. Raises OSError or ValueError where they disagree."""
    path = folder / f"{name}.tokens.bin"
    dtype = np.dtype(token_dtype(vocab_size))
    count = int(counts["tokens"])
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} does not hold {count} tokens")
    # An empty file cannot be mapped.
    # As a plain array: numpy's own class for maps takes microseconds for every slice.
    tokens = np.memmap(path, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray) if count else np.zeros(0, dtype)
    offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r")
    if len(offsets) != int(counts["documents"]) + 1:
        raise ValueError(f"{name}.offsets.npy does not hold {counts['documents']} documents")
    ids_path = folder / f"{name}.ids.txt"
    return CorpusSplit(name, tokens, offsets, int(counts["documents"]), int(counts["bytes"]), ids_path)
