"""What sample belongs to global batch i. This is the one place that knows.

A sample is a window of context_length + 1 neighbouring tokens of a packed split: T inputs and, one further on, T
targets. Windows overlap by that one token, so in an epoch every token but the split's first (and a tail shorter than
T) is a target exactly once. An epoch takes all windows in a shuffled order of its own; the endless sequence of samples
is epoch after epoch; global batch i is samples [i n, (i + 1) n) of it, and rank r of R takes the r-th of R equal
parts. So a batch depends on (corpus, config, seed, i) alone, and nothing needs to be read to find a place in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.corpus import open_corpus
from data_pipelines.order import permute
from data_pipelines.pack import CorpusSplit
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError

_MAX_SAMPLES = 2**63 - 1
"""Samples of the endless sequence have 64-bit numbers."""


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch; n rows of T tokens."""

    tokens: np.ndarray
    """int64 [n, T]."""

    targets: np.ndarray
    """int64 [n, T]: the next tokens; -100 would not be scored (packed text has none of those)."""

    starts: np.ndarray | None
    """bool [n, T]: True at the end-of-text token that opens a document and at each row's first token; None where
    documents do not reset anything. The end-of-text's own target, the document's first token, is scored."""


class BatchSource:
    """Batches of one split of a corpus, by their number."""

    def __init__(
        self,
        split: CorpusSplit,
        context_length: int,
        batch_sequences: int,
        seed: int,
        reset_at_documents: bool,
        eot_id: int,
    ) -> None:
        """
        Args:
            context_length: T, tokens in a row.
            batch_sequences: rows of a global batch, over all ranks.
            seed: of the order of windows.
            reset_at_documents: give `Batch.starts`.

        Raises:
            UserError: the split is shorter than one window.
        """
        self.split = split
        self.context_length = context_length
        self.batch_sequences = batch_sequences
        self.seed = seed
        self.reset_at_documents = reset_at_documents
        self.eot_id = eot_id
        self.windows = max(0, len(split.tokens) - 1) // context_length
        """Windows in an epoch."""
        if not self.windows:
            raise UserError(
                f"the {split.name} part of the corpus has {len(split.tokens)} tokens, fewer than one window of "
                f"train.context_length={context_length} and the next token: give more text or a shorter context"
            )

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank `rank`'s rows of global batch `index` (from 0).

        Raises UserError if the ranks do not divide its rows, or there is no number for its samples.
        """
        if self.batch_sequences % ranks:
            raise UserError(
                f"a batch of {self.batch_sequences} sequences cannot be divided among {ranks} ranks: make "
                f"train.batch_tokens a multiple of {ranks * self.context_length}"
            )
        if index < 0 or not 0 <= rank < ranks:
            raise ValueError(f"no batch {index} for rank {rank} of {ranks}")
        if index >= _MAX_SAMPLES // self.batch_sequences:
            raise UserError(f"batch {index} is too far: batches end before {_MAX_SAMPLES // self.batch_sequences}")
        rows = self.batch_sequences // ranks
        first = index * self.batch_sequences + rank * rows
        return self._rows(self.window_numbers(first, rows))

    def window_numbers(self, first: int, count: int) -> np.ndarray:
        """Windows behind samples first .. first+count-1 of the endless sequence, int64 [count].

        Window w starts at token w T of the split; sample s is the (s mod windows)-th of epoch s // windows.
        """
        samples = np.arange(first, first + count, dtype=np.int64)
        epochs, places = samples // self.windows, samples % self.windows
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(places[chosen], self.windows, self.seed, int(epoch))
        return result

    def _rows(self, windows: np.ndarray) -> Batch:
        length = self.context_length
        rows = np.empty((len(windows), length + 1), dtype=np.int64)
        for row, window in enumerate(windows):
            rows[row] = self.split.tokens[window * length : (window + 1) * length + 1]
        tokens = np.ascontiguousarray(rows[:, :-1])
        starts = None
        if self.reset_at_documents:
            starts = tokens == self.eot_id
            starts[:, 0] = True
        return Batch(tokens, np.ascontiguousarray(rows[:, 1:]), starts)

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
            yield self._rows(np.array_split(chosen[first : first + rows], ranks)[rank])


def validation_batches(
    source: BatchSource, rows: int, limit: int | None = None, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """`BatchSource.validation_batches` as a function."""
    return source.validation_batches(rows, limit, rank, ranks)


@dataclass(frozen=True)
class DataBundle:
    """All that the trainer needs of the data."""

    tokenizer: Tokenizer

    train: BatchSource

    validation: BatchSource | None
    """None where nothing is held out, or less than one window."""

    description: dict[str, Any]
    """What was opened, in a form that JSON holds: paths, fingerprints, counts, windows, epochs of the run."""


def open_data(data: DataConfig, train: TrainConfig, seed: int, vocab_size: int) -> DataBundle:
    """Tokenizer and batches of a run; the text is tokenised where the cache does not have it yet.

    May be called by all ranks at once: one of them tokenises.

    Args:
        seed: of the run; it orders the windows.
        vocab_size: of the model; it must be the tokenizer's number of pieces.

    Raises:
        UserError: no or a wrong tokenizer, and everything that `open_corpus` and `BatchSource` raise.
    """
    tokenizer = open_tokenizer(data, vocab_size)
    corpus = open_corpus(data, tokenizer)
    rows = train.batch_tokens // train.context_length

    def source(split: CorpusSplit) -> BatchSource:
        return BatchSource(split, train.context_length, rows, seed, data.reset_at_documents, tokenizer.eot_id)

    train_source = source(corpus.train)
    # A held-out part shorter than a window is no reason to refuse a small corpus: the description says that it is.
    enough = len(corpus.validation.tokens) > train.context_length
    validation_source = source(corpus.validation) if enough else None
    description = {
        "tokenizer": {"path": tokenizer.path, "fingerprint": tokenizer.fingerprint, "pieces": tokenizer.vocab_size},
        "corpus": {"folder": str(corpus.folder), "content": corpus.manifest["content"]},
        "train": {**corpus.manifest["splits"]["train"], "windows": train_source.windows},
        "validation": {
            **corpus.manifest["splits"]["validation"],
            "windows": validation_source.windows if validation_source else 0,
        },
        "cut_into_pieces_of": corpus.manifest["cut_into_pieces_of"],
        "epochs": train.total_steps * rows / train_source.windows,
    }
    return DataBundle(tokenizer, train_source, validation_source, description)


def open_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if there is none or it does not fit the model's vocabulary."""
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set: name a SentencePiece model; `hope data tokenizer train` makes one")
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} pieces, model.vocab_size is {vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer
