"""What sample belongs to global batch i. This is the one place that knows.

Samples are numbered from 0 without end; what sample s is depends on (text, configuration, seed, s) alone. Global batch
i holds the n(i) samples that follow those of batch i - 1, n(i) being a function of the configuration and i, and rank r
of R takes the r-th of R equal parts of its rows. So neither the number of ranks nor that of workers changes what is
trained on, and a batch of another size only cuts the same sequence elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hope_train.config.batches import BatchSizes
from hope_train.errors import UserError

_MAX_SAMPLES = 2**63 - 1
"""Samples of the endless sequence have 64-bit numbers."""

IGNORED = -100
"""A target that is not scored."""


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch; n rows of T tokens."""

    tokens: np.ndarray
    """int64 [n, T]."""

    targets: np.ndarray
    """int64 [n, T]: the next tokens; -100 is not scored (padding; nothing in a corpus that is cut into windows)."""

    starts: np.ndarray | None
    """bool [n, T]: True at the end-of-text token that opens a document and at each row's first token; None where
    documents do not reset anything. The end-of-text's own target, the document's first token, is scored."""


class Segment(NamedTuple):
    """A document, or a part of one, in a row."""

    position: int
    """Of its first token in the row."""

    source: str

    document: str
    """Its id."""


class BatchSource(ABC):
    """Batches by their number."""

    context_length: int
    """T, tokens in a row."""

    sizes: BatchSizes
    """Rows of every global batch, over all ranks."""

    seed: int

    reset_at_documents: bool
    """Whether batches have `starts`."""

    windows: int | None
    """Samples of an epoch; None where nobody knows before it is over."""

    reads_on: bool = False
    """Whether text is read while batches are asked for, so that asking may fail, and take a place to go on from."""

    def prepare(self, index: int, rank: int = 0, ranks: int = 1) -> None:  # noqa: B027 - most have nothing to do
        """Fetch what `batch` will be asked for next. Raises UserError."""

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank `rank`'s rows of global batch `index` (from 0).

        Raises UserError if the ranks do not divide its rows, or there is no number for its samples.
        """
        if index >= (last := self.sizes.whole_batches(_MAX_SAMPLES)):
            raise UserError(f"batch {index} is too far: batches end before {last}")
        if index < 0 or not 0 <= rank < ranks:
            raise ValueError(f"no batch {index} for rank {rank} of {ranks}")
        return self.samples(*self.sizes.samples_of(index), rank, ranks)

    def samples(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank `rank`'s rows of the batch that is the samples first .. first+count-1. Raises as `batch`."""
        if count % ranks:
            raise UserError(
                f"a batch of {count} sequences cannot be divided among {ranks} ranks: make "
                f"train.batch_tokens a multiple of {ranks * self.context_length}"
            )
        rows = count // ranks
        return self._rows(self.row_order(first, count)[rank * rows : (rank + 1) * rows])

    def row_order(self, first: int, count: int) -> np.ndarray:
        """The samples of a batch in the order of its rows, int64 [count]."""
        return np.arange(first, first + count, dtype=np.int64)

    @abstractmethod
    def window_numbers(self, first: int, count: int) -> np.ndarray:
        """A name for what each row of the batch first .. first+count-1 holds, to look it up by, int64 [count]."""

    @abstractmethod
    def contents(self, first: int, count: int) -> list[list[Segment]]:
        """What each row of that batch is made of, in order."""

    @abstractmethod
    def _rows(self, samples: np.ndarray) -> Batch:
        """These samples, one a row."""

    def state(self, sample: int) -> dict[str, Any]:
        """What makes going on with `sample` fast, a few kilobytes for a checkpoint; nothing depends on it but time."""
        return {}

    def restore(self, states: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to restore
        """Take in what `state` gave, here or on other ranks."""

    def metrics(self) -> dict[str, Any]:
        """Counters for the log; nothing where there is nothing to count."""
        return {}

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """End what works in the background."""
