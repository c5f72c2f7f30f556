"""Training from tokens in Megatron's indexed format: token sets of `hope data tokenize`, and corpora made elsewhere."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.files import natural_key
from data_pipelines.megatron import IndexedFile, open_indexed
from data_pipelines.samples import Segment
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenset import MANIFEST, PLAN, read_manifest
from data_pipelines.windows import TokenSequence, WindowSource
from hope_train.config.data import DataConfig, SourceConfig
from hope_train.errors import UserError

_LOOKED_AT = 256
"""Documents of a foreign corpus whose ends are looked at."""


class TokenParts:
    """Sequences of tokens, one after the other, as one."""

    def __init__(self, parts: Sequence[TokenSequence]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, wanted: slice) -> np.ndarray:
        first, last = int(wanted.start), min(int(wanted.stop), len(self))
        number = bisect.bisect_right(self._ends, first)
        if last <= self._ends[number]:  # As good as always.
            end = self._ends[number] - len(self._parts[number])
            return self._parts[number][first - end : last - end]
        pieces = []
        while first < last:
            start = self._ends[number] - len(self._parts[number])
            stop = min(last, self._ends[number])
            pieces.append(self._parts[number][first - start : stop - start])
            first, number = stop, number + 1
        return np.concatenate(pieces)


@dataclass(frozen=True)
class IndexedSplit:
    """One side of one or several indexed sources."""

    name: str
    tokens: TokenSequence
    documents: int

    text_bytes: int | None
    """Of the text, where a manifest says it."""

    unknowns: int | None

    boundaries: np.ndarray | None
    """Where each document begins, int64, for a corpus whose documents do not end with end-of-text; else None."""

    lengths: list[np.ndarray]
    """int64 arrays, one a file: tokens of each document, end-of-text included."""

    files: list[str]
    """The name of each of these files."""

    def documents_between(self, first: int, last: int) -> list[Segment]:
        """The documents that have tokens in [first, last); one is named by its file and its number there, from 1."""
        found, start = [], 0
        opening = int(self.boundaries is None)  # The end-of-text before a document counts as its own.
        for name, lengths in zip(self.files, self.lengths, strict=True):
            ends = start + np.cumsum(lengths) - opening
            low, high = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last - 1, side="right")
            for number in range(int(low), min(int(high), len(lengths) - 1) + 1):
                begin = int(ends[number] - lengths[number])
                found.append(Segment(max(begin - first, 0), name, f"{name}:{number + 1}"))
            start += int(lengths.sum())
        return found

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, its end-of-text included where it has one, int64 [documents]."""
        return np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int64)


@dataclass(frozen=True)
class IndexedCorpus:
    """An indexed source, both sides."""

    name: str
    train: IndexedSplit
    validation: IndexedSplit
    content: str
    tokenizer: str | None
    """Fingerprint of its tokenizer, where a manifest says it."""


class IndexedWindows(WindowSource):
    """Windows of an indexed split; documents may begin where no end-of-text token is."""

    def starts_of(self, windows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """At end-of-text tokens, or where the index says that documents begin."""
        assert isinstance(self.split, IndexedSplit)
        if self.split.boundaries is None:
            return super().starts_of(windows, tokens)
        starts = np.zeros(tokens.shape, dtype=bool)
        for row, first in enumerate((windows * self.context_length).tolist()):
            low, high = np.searchsorted(self.split.boundaries, [first, first + self.context_length])
            starts[row, self.split.boundaries[low:high] - first] = True
        return starts


def open_corpus(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> IndexedCorpus:
    """An indexed source, mapped. Nothing of it is changed.

    Raises UserError: it is not there or not whole, or its tokenizer is another one.
    """
    assert source.indexed is not None
    place = Path(source.indexed).expanduser()
    if (place / MANIFEST).is_file() or (place / PLAN).is_file():
        return _open_token_set(source.indexed, place, tokenizer)
    return _open_foreign(source.indexed, place, data.validation_fraction, tokenizer)


def _open_token_set(name: str, folder: Path, tokenizer: Tokenizer) -> IndexedCorpus:
    manifest = read_manifest(folder)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"token set {name} was made with tokenizer {manifest['tokenizer'][:12]}, {tokenizer.path} is "
            f"{tokenizer.fingerprint[:12]}: set data.tokenizer to that one, or tokenise anew"
        )
    splits = {}
    for split in ("train", "validation"):
        parts = [shard["splits"][split] for shard in manifest["shards"] if split in shard["splits"]]
        for part in parts:
            for file, entry in part["files"].items():
                path = folder / file
                size = path.stat().st_size if path.is_file() else None
                if size != entry["bytes"]:
                    was = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
                    raise UserError(f"{path} {was}: restore it, or remove {folder / MANIFEST} and tokenise again")
        files = [open_indexed(folder / part["prefix"]) for part in parts if part["tokens"]]
        totals = manifest["splits"].get(split, {"documents": 0, "bytes": 0, "unknowns": 0})
        splits[split] = IndexedSplit(
            split,
            TokenParts([file.tokens for file in files]),
            totals["documents"],
            totals["bytes"],
            totals["unknowns"],
            None,
            [np.diff(file.documents) for file in files],
            [str(file.prefix) for file in files],
        )
    content = manifest["splits"]["train"]["content"]
    return IndexedCorpus(name, splits["train"], splits["validation"], content, manifest["tokenizer"])


def _open_foreign(name: str, place: Path, fraction: float, tokenizer: Tokenizer) -> IndexedCorpus:
    """A corpus of Megatron's own tools. The last `fraction` of its tokens, in whole documents, is held out."""
    if place.is_dir():
        prefixes = [path.with_suffix("") for path in place.glob("*.idx")]
        prefixes.sort(key=lambda path: natural_key(path.name))
        if not prefixes:
            raise UserError(f"{name}: the folder holds neither a token set nor .idx files")
    else:
        prefixes = [place.with_suffix("") if place.suffix in (".bin", ".idx") else place]
    files = [open_indexed(prefix) for prefix in prefixes]
    files = [file for file in files if len(file.tokens)]
    if not files:
        raise UserError(f"{name}: there are no tokens in it")
    digest = hashlib.sha256()
    for file in files:
        digest.update(_fingerprint(file).encode())
        _check_ids(file, tokenizer)
    starts = np.concatenate([file.documents[:-1] + base for file, base in zip(files, _bases(files), strict=True)])
    total = sum(len(file.tokens) for file in files)
    whole = TokenParts([file.tokens for file in files])
    # The document in which the held-out share begins is held out too, unless it is the first of all.
    edge = int(np.searchsorted(starts, total * (1.0 - fraction), side="right")) - 1 if fraction else len(starts)
    edge = max(edge, 1)
    cut = int(starts[edge]) if edge < len(starts) else total
    closed = _ends_with_eot(files, tokenizer.eot_id)
    lengths = np.diff(np.append(starts, total))

    def side(split: str, first: int, last: int, chosen: slice) -> IndexedSplit:
        own = starts[chosen]
        return IndexedSplit(
            split,
            _Window(whole, first, last),
            len(own),
            None,
            None,
            None if closed else own - first,
            [lengths[chosen]],
            [name],
        )

    train, held = side("train", 0, cut, slice(0, edge)), side("validation", cut, total, slice(edge, None))
    return IndexedCorpus(name, train, held, digest.hexdigest(), None)


class _Window:
    """A stretch of a sequence of tokens as a sequence of its own."""

    def __init__(self, tokens: TokenSequence, first: int, last: int) -> None:
        self._tokens, self._first, self._last = tokens, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, wanted: slice) -> np.ndarray:
        return self._tokens[wanted.start + self._first : min(wanted.stop + self._first, self._last)]


def _bases(files: Sequence[IndexedFile]) -> list[int]:
    return [0, *np.cumsum([len(file.tokens) for file in files])[:-1].tolist()]


def _fingerprint(file: IndexedFile) -> str:
    """Of the whole index, and of the size and both ends of the tokens."""
    digest = hashlib.sha256(Path(f"{file.prefix}.idx").read_bytes())
    digest.update(str(len(file.tokens)).encode())
    digest.update(file.tokens[: 1 << 15].tobytes() + file.tokens[-(1 << 15) :].tobytes())
    return digest.hexdigest()


def _check_ids(file: IndexedFile, tokenizer: Tokenizer) -> None:
    """Refuse ids that the tokenizer does not have, as far as a look at both ends shows."""
    largest = int(max(file.tokens[: 1 << 20].max(), file.tokens[-(1 << 20) :].max()))
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{file.prefix}.bin holds token {largest}, and tokenizer {tokenizer.path} has {tokenizer.vocab_size} "
            "pieces: it was made with another one"
        )


def _ends_with_eot(files: Sequence[IndexedFile], eot_id: int) -> bool:
    """Whether documents end with end-of-text, as Megatron's --append-eod writes them: looked at in each file."""
    for file in files:
        count = len(file.documents) - 1
        chosen = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64))
        lasts = file.tokens[file.documents[chosen + 1] - 1]
        if not (lasts == eot_id).all():
            return False
    return True


def join(splits: Sequence[IndexedSplit]) -> IndexedSplit:
    """Several sources as one, one after the other."""
    if len(splits) == 1:
        return splits[0]
    boundaries = None
    if any(split.boundaries is not None for split in splits):
        bases = np.cumsum([0, *(len(split.tokens) for split in splits[:-1])])
        boundaries = np.concatenate(
            [_boundaries(split) + base for split, base in zip(splits, bases.tolist(), strict=True)]
        )
    known = all(split.text_bytes is not None for split in splits)
    return IndexedSplit(
        splits[0].name,
        TokenParts([split.tokens for split in splits]),
        sum(split.documents for split in splits),
        sum(split.text_bytes or 0 for split in splits) if known else None,
        sum(split.unknowns or 0 for split in splits) if known else None,
        boundaries,
        [part for split in splits for part in split.lengths],
        [name for split in splits for name in split.files],
    )


def _boundaries(split: IndexedSplit) -> np.ndarray:
    """Where documents begin; behind an end-of-text, which then opens the next document, one token earlier."""
    if split.boundaries is not None:
        return split.boundaries
    starts = np.concatenate([[0], np.cumsum(split.document_lengths())])[:-1]
    return np.maximum(starts - 1, 0)


def describe(corpus: IndexedCorpus) -> dict[str, Any]:
    """Counts for people."""
    return {
        "place": corpus.name,
        "content": corpus.content,
        **{
            split.name: {"documents": split.documents, "tokens": len(split.tokens), "bytes": split.text_bytes}
            for split in (corpus.train, corpus.validation)
        },
    }
