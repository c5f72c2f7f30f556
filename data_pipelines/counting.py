"""Documents, tokens, bytes and unknowns of each source, with a histogram of lengths: what `hope data stats` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.pack import CorpusSplit, source_of
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.windows import TokenSequence

_CHUNK = 1 << 24


@dataclass
class Tally:
    """Counts of one source, or of several."""

    source: str
    documents: int = 0
    tokens: int = 0
    """End-of-text tokens included."""
    bytes: int = 0
    unknowns: int = 0
    lengths: list[np.ndarray] = field(default_factory=list)
    """int64 arrays: tokens of each document without end-of-text."""
    records: Counter[str] = field(default_factory=Counter)
    """What became of all of the source's records, where that is counted."""

    def add(self, lengths: np.ndarray, tokens: int, text_bytes: int, unknowns: int) -> None:
        """Count documents of these lengths."""
        self.documents += len(lengths)
        self.tokens += tokens
        self.bytes += text_bytes
        self.unknowns += unknowns
        self.lengths.append(lengths)

    def figures(self) -> dict[str, Any]:
        """In a form that JSON holds."""
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int64)
        found: dict[str, Any] = {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": None,
            "unknowns": self.unknowns,
            "shortest": None,
            "median": None,
            "longest": None,
            "length_histogram": {},
        }
        if len(lengths):
            # Bucket b holds lengths of 2**b to 2**(b+1) - 1; frexp gives the exponent exactly.
            buckets = np.maximum(np.frexp(lengths)[1] - 1, 0)
            histogram = {str(1 << int(b)): int(n) for b, n in zip(*np.unique(buckets, return_counts=True), strict=True)}
            found |= {
                "bytes_per_token": round(self.bytes / max(int(lengths.sum()), 1), 4),
                "shortest": int(lengths.min()),
                "median": float(np.median(lengths)),
                "longest": int(lengths.max()),
                "length_histogram": histogram,
            }
        return found


def total(tallies: Sequence[Tally]) -> Tally:
    """All of them together."""
    whole = Tally("all")
    for tally in tallies:
        whole.documents += tally.documents
        whole.tokens += tally.tokens
        whole.bytes += tally.bytes
        whole.unknowns += tally.unknowns
        whole.lengths += tally.lengths
    return whole


def count_tokens(tokens: TokenSequence, tokenizer: Tokenizer) -> tuple[int, int]:
    """(bytes of the text, unknown pieces) of a lossless tokenizer's tokens; all of them are read."""
    sizes, unknown = tokenizer.piece_bytes(), tokenizer.unknown_id
    text_bytes = unknowns = 0
    for first in range(0, len(tokens), _CHUNK):
        part = tokens[first : first + _CHUNK]
        text_bytes += int(sizes[part].sum())
        unknowns += int(np.count_nonzero(part == unknown))
    return text_bytes, unknowns


def tally_corpus(split: CorpusSplit, tokenizer: Tokenizer) -> list[Tally]:
    """A cached corpus, source by source."""
    lengths, offsets = split.document_lengths(), np.asarray(split.offsets)
    found = []
    for name, first, last in _runs(source_of(document) for document in split.document_ids()):
        own = split.tokens[int(offsets[first]) : int(offsets[last])]
        tally = Tally(name)
        tally.add(np.asarray(lengths[first:last]), len(own), *count_tokens(own, tokenizer))
        found.append(tally)
    if found:
        found[-1].tokens += 1  # The end-of-text that closes the split.
    return found


def _runs(names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """(name, first, end) for each stretch of equal names."""
    current, first, number = None, 0, -1
    for number, name in enumerate(names):
        if name != current:
            if current is not None:
                yield current, first, number
            current, first = name, number
    if current is not None:
        yield current, first, number + 1
