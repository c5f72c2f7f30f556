"""Samples from tokens that lie on disk: windows of neighbouring tokens, in a shuffled order, blended by weight.

A sample is a window of context_length + 1 tokens of a split: T inputs and, one further on, T targets. Windows overlap
by that one token, so in an epoch every token but the split's first (and a tail shorter than T) is a target exactly
once. An epoch takes all windows in a shuffled order of its own; the endless sequence of samples is epoch after epoch.
Nothing needs to be read to find a place in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from data_pipelines.order import permute
from data_pipelines.samples import Batch, BatchSource, Segment
from hope_train.config.batches import BatchSizes
from hope_train.errors import UserError

_AHEAD = 4096
"""Samples whose places are computed at a time: the permutation costs as much for one as for hundreds."""

_BLEND = 1 << 16
"""Samples after which the blend of sources repeats; weights are exact to one part in so many."""


class TokenSequence(Protocol):
    """Token ids on disk, as an array gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Split(Protocol):
    """One side of a corpus."""

    @property
    def name(self) -> str:
        """`train` or `validation`."""

    @property
    def tokens(self) -> TokenSequence:
        """All of its tokens, document after document."""

    def documents_between(self, first: int, last: int) -> list[Segment]:
        """The documents that have tokens in [first, last), positions counted from `first`."""


class WindowSource(BatchSource):
    """Windows of one split."""

    windows: int

    def __init__(
        self,
        split: Split,
        context_length: int,
        sizes: BatchSizes,
        seed: int,
        reset_at_documents: bool,
        eot_id: int,
        order: str = "",
    ) -> None:
        """
        Args:
            context_length: T, tokens in a row.
            sizes: rows of every global batch, over all ranks.
            seed: of the order of windows.
            reset_at_documents: give `Batch.starts`.
            order: sources of one run that are shuffled by the same seed have different names for their orders.

        Raises:
            UserError: the split is shorter than one window.
        """
        self.split = split
        self.context_length = context_length
        self.sizes = sizes
        self.seed = seed
        self.reset_at_documents = reset_at_documents
        self.eot_id = eot_id
        self.windows = max(0, len(split.tokens) - 1) // context_length
        self._order = order
        self._known: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        if not self.windows:
            raise UserError(
                f"the {split.name} part of the corpus has {len(split.tokens)} tokens, fewer than one window of "
                f"train.context_length={context_length} and the next token: give more text or a shorter context"
            )

    def window_numbers(self, first: int, count: int) -> np.ndarray:
        """Windows behind samples first .. first+count-1 of the endless sequence, int64 [count].

        Window w starts at token w T of the split; sample s is the (s mod windows)-th of epoch s // windows.
        """
        return self.windows_of(np.arange(first, first + count, dtype=np.int64))

    def contents(self, first: int, count: int) -> list[list[Segment]]:
        """Documents of each window; the end-of-text in front of a document is its first token."""
        return [self.contents_of(window) for window in self.window_numbers(first, count).tolist()]

    def contents_of(self, window: int) -> list[Segment]:
        """Documents of one window."""
        start = window * self.context_length
        return self.split.documents_between(start, start + self.context_length)

    def windows_of(self, samples: np.ndarray) -> np.ndarray:
        """`window_numbers` of any samples, int64 of the same shape."""
        block = int(samples[0]) // _AHEAD if len(samples) else -1
        if block < 0 or int(samples[-1]) // _AHEAD != block:
            return self._windows_of(samples)
        if self._known[0] != block:
            last = min((block + 1) * _AHEAD, 2**63 - 1)
            self._known = (block, self._windows_of(np.arange(block * _AHEAD, last, dtype=np.int64)))
        return self._known[1][samples - block * _AHEAD]

    def _windows_of(self, samples: np.ndarray) -> np.ndarray:
        epochs, places = samples // self.windows, samples % self.windows
        result = np.empty(len(samples), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(places[chosen], self.windows, self.seed, int(epoch), self._order)
        return result

    def _rows(self, samples: np.ndarray) -> Batch:
        return self.rows_of(self.windows_of(samples))

    def rows_of(self, windows: np.ndarray) -> Batch:
        """These windows, one a row."""
        length, ids = self.context_length, self.split.tokens
        tokens = np.empty((len(windows), length), dtype=np.int64)
        targets = np.empty((len(windows), length), dtype=np.int64)
        for row, first in enumerate((windows * length).tolist()):
            part = ids[first : first + length + 1]
            tokens[row] = part[:-1]
            targets[row] = part[1:]
        starts = None
        if self.reset_at_documents:
            starts = self.starts_of(windows, tokens)
            starts[:, 0] = True
        return Batch(tokens, targets, starts)

    def starts_of(self, windows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Where documents begin in these windows, bool [n, T]: at their end-of-text tokens."""
        starts: np.ndarray = tokens == self.eot_id
        return starts

    def validation_batches(self, rows: int, limit: int | None = None, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Windows in the order of the text, the same ones every time, `rows` in a batch over all ranks.

        Args:
            limit: number of batches at most; the windows are then spread evenly over the split. None: all windows, the
                last batch with what is left.
            rank: a rank gets its part of each batch, which is empty where there are more ranks than rows left; sums
                over ranks are those of one rank that takes all.
        """
        count = self.windows if limit is None else min(self.windows, limit * rows)
        chosen = np.arange(count, dtype=np.int64) * self.windows // max(count, 1)
        for first in range(0, count, rows):
            yield self.rows_of(np.array_split(chosen[first : first + rows], ranks)[rank])


class BlendSource(BatchSource):
    """Samples of several sources in the proportion of their weights; each source has epochs of its own."""

    def __init__(self, sources: Sequence[WindowSource], weights: Sequence[float], sizes: BatchSizes) -> None:
        """Raises UserError for a weight too small to matter."""
        self.sources = sources
        self.context_length = sources[0].context_length
        self.sizes = sizes
        self.seed = sources[0].seed
        self.reset_at_documents = sources[0].reset_at_documents
        self.windows = None
        self.table, self._rank = blend_table(weights)
        self.counts = np.bincount(self.table, minlength=len(sources))
        if (self.counts == 0).any():
            raise UserError(f"weights {list(weights)}: the smallest is below 1/{_BLEND} of all: leave that source out")
        self._bases = np.cumsum([0, *(source.windows for source in sources[:-1])])

    def parts_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, number of the sample among that source's own), int64 each."""
        blocks, places = samples // _BLEND, samples % _BLEND
        source = self.table[places]
        return source, blocks * self.counts[source] + self._rank[places]

    def window_numbers(self, first: int, count: int) -> np.ndarray:
        """Numbers over all sources' windows, the first source's first, then the second's, and so on; int64 [count]."""
        source, own = self.parts_of(np.arange(first, first + count, dtype=np.int64))
        result = np.empty(count, dtype=np.int64)
        for number, part in enumerate(self.sources):
            chosen = source == number
            result[chosen] = self._bases[number] + part.windows_of(own[chosen])
        return result

    def contents(self, first: int, count: int) -> list[list[Segment]]:
        """Documents of each row."""
        source, own = self.parts_of(np.arange(first, first + count, dtype=np.int64))
        return [
            self.sources[number].contents_of(int(self.sources[number].windows_of(own[place : place + 1])[0]))
            for place, number in enumerate(source.tolist())
        ]

    def _rows(self, samples: np.ndarray) -> Batch:
        source, own = self.parts_of(samples)
        shape = (len(samples), self.context_length)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        starts = np.empty(shape, bool) if self.reset_at_documents else None
        for number, part in enumerate(self.sources):
            chosen = np.flatnonzero(source == number)
            batch = part.rows_of(part.windows_of(own[chosen]))
            tokens[chosen], targets[chosen] = batch.tokens, batch.targets
            if starts is not None:
                starts[chosen] = batch.starts
        return Batch(tokens, targets, starts)


def blend_table(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each of the samples of a repeating block, its source and its number among that source's in the block.

    Each source has its share of the block to within one sample, spread evenly: its j-th of c samples stands as near as
    the others allow to (j + 1/2) / c of the block.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * _BLEND
    counts = np.floor(shares).astype(np.int64)
    most = np.argsort(-(shares - counts), kind="stable")[: _BLEND - int(counts.sum())]
    counts[most] += 1
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    ideal = (rank + 0.5) / np.repeat(np.maximum(counts, 1), counts)
    order = np.argsort(ideal, kind="stable")
    return source[order].astype(np.int64), rank[order].astype(np.int64)
