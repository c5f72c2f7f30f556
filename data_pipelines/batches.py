"""From a configuration to batches: which corpus, which tokenizer, and what a resumed run has to find unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.corpus import open_corpus
from data_pipelines.pack import CorpusSplit
from data_pipelines.samples import Batch, BatchSource
from data_pipelines.sources import describe_source
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.unpacking import GzipIndexes
from data_pipelines.windows import BlendSource, WindowSource
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError

_log = logging.getLogger(__name__)

__all__ = ["Batch", "BatchSource", "DataBundle", "WindowSource", "open_data", "open_tokenizer"]


@dataclass(frozen=True)
class DataBundle:
    """All that the trainer needs of the data."""

    tokenizer: Tokenizer

    train: BatchSource

    validation: WindowSource | None
    """None where nothing is held out, or less than one window."""

    description: dict[str, Any]
    """What was opened, in a form that JSON holds: paths, fingerprints, counts, windows, epochs of the run."""

    identity: dict[str, Any] = field(default_factory=dict)
    """More that global batch i depends on, beside text, sizes and seed."""


def open_data(data: DataConfig, train: TrainConfig, seed: int, vocab_size: int) -> DataBundle:
    """Tokenizer and batches of a run. In cached mode the text is tokenised where the cache does not have it yet.

    May be called by all ranks at once: one of them tokenises.

    Args:
        seed: of the run; it orders the samples.
        vocab_size: of the model; it must be the tokenizer's number of pieces.

    Raises:
        UserError: no or a wrong tokenizer, text or tokens that cannot be read or are too few.
    """
    tokenizer = open_tokenizer(data, vocab_size)
    if not data.sources:
        raise UserError("data.sources is empty: name at least one path, hub data set or builtin text")
    return _OPEN[data.mode](data, train, seed, tokenizer)


def _open_cached(data: DataConfig, train: TrainConfig, seed: int, tokenizer: Tokenizer) -> DataBundle:
    corpus = open_corpus(data, tokenizer)
    sizes = train.batches

    def source(split: CorpusSplit) -> WindowSource:
        return WindowSource(split, train.context_length, sizes, seed, data.reset_at_documents, tokenizer.eot_id)

    train_source = source(corpus.train)
    # A held-out part shorter than a window is no reason to refuse a small corpus: the description says that it is.
    enough = len(corpus.validation.tokens) > train.context_length
    validation_source = source(corpus.validation) if enough else None
    description = {
        "tokenizer": _describe_tokenizer(tokenizer),
        "corpus": {"folder": str(corpus.folder), "content": corpus.manifest["content"]},
        "train": {**corpus.manifest["splits"]["train"], "windows": train_source.windows},
        "validation": {
            **corpus.manifest["splits"]["validation"],
            "windows": validation_source.windows if validation_source else 0,
        },
        "cut_into_pieces_of": corpus.manifest["cut_into_pieces_of"],
        "epochs": sizes.first_sample(train.total_steps) / train_source.windows,
    }
    return DataBundle(tokenizer, train_source, validation_source, description)


def _open_indexed(data: DataConfig, train: TrainConfig, seed: int, tokenizer: Tokenizer) -> DataBundle:
    from data_pipelines import indexed

    corpora = [indexed.open_corpus(source, data, tokenizer) for source in data.sources]
    sizes = train.batches

    def source(split: indexed.IndexedSplit, order: str = "") -> indexed.IndexedWindows:
        reset, eot_id = data.reset_at_documents, tokenizer.eot_id
        return indexed.IndexedWindows(split, train.context_length, sizes, seed, reset, eot_id, order)

    weights = [source.weight for source in data.sources if source.weight is not None]
    samples = sizes.first_sample(train.total_steps)
    train_source: BatchSource
    if len(weights) > 1:
        # Each by a name of its own: sources of equal length must not be shuffled alike.
        parts = [source(corpus.train, f"source-{number}") for number, corpus in enumerate(corpora)]
        train_source = BlendSource(parts, weights, sizes)
        windows = [part.windows for part in parts]
        epochs = max(samples * weight / sum(weights) / count for weight, count in zip(weights, windows, strict=True))
    else:
        train_source = source(indexed.join([corpus.train for corpus in corpora]))
        windows = [train_source.windows or 0]
        epochs = samples / windows[0]
    held_out = indexed.join([corpus.validation for corpus in corpora])
    enough = len(held_out.tokens) > train.context_length
    validation_source = source(held_out) if enough else None
    sources = [indexed.describe(corpus) for corpus in corpora]
    description: dict[str, Any] = {
        "tokenizer": _describe_tokenizer(tokenizer),
        "corpus": {"folder": ", ".join(c.name for c in corpora), "content": [c.content for c in corpora]},
        "sources": sources,
        **{
            split: {name: _sum([entry[split][name] for entry in sources]) for name in ("documents", "tokens", "bytes")}
            for split in ("train", "validation")
        },
        "cut_into_pieces_of": None,
        "epochs": epochs,
    }
    description["train"]["windows"] = sum(windows)
    description["validation"]["windows"] = validation_source.windows if validation_source else 0
    identity = {"mode": data.mode, "weights": weights, "source_windows": windows}
    return DataBundle(tokenizer, train_source, validation_source, description, identity)


def _open_streaming(data: DataConfig, train: TrainConfig, seed: int, tokenizer: Tokenizer) -> DataBundle:
    from data_pipelines.streams import open_stream

    sizes = train.batches
    indexes = GzipIndexes(Path(data.cache_dir).expanduser() / "gzip-indexes")
    train_source, identity, held_out = open_stream(
        data, tokenizer, train.context_length, sizes, seed, indexes, _log.warning
    )
    validation_source = None
    if held_out is not None and len(held_out.tokens) > train.context_length:
        validation_source = WindowSource(
            held_out, train.context_length, sizes, seed, data.reset_at_documents, tokenizer.eot_id
        )
    content = hashlib.sha256(json.dumps(identity["files"], sort_keys=True).encode()).hexdigest()
    description = {
        "tokenizer": _describe_tokenizer(tokenizer),
        "corpus": {"folder": ", ".join(map(describe_source, data.sources)), "content": content},
        "train": {"documents": None, "tokens": None, "bytes": None, "windows": None},
        "validation": {
            "documents": held_out.documents if held_out else 0,
            "tokens": len(held_out.tokens) if held_out else 0,
            "bytes": held_out.text_bytes if held_out else 0,
            "windows": validation_source.windows if validation_source else 0,
        },
        "cut_into_pieces_of": None,
        "epochs": None,
    }
    return DataBundle(tokenizer, train_source, validation_source, description, identity)


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"path": tokenizer.path, "fingerprint": tokenizer.fingerprint, "pieces": tokenizer.vocab_size}


_OPEN = {"cached": _open_cached, "indexed": _open_indexed, "streaming": _open_streaming}


def open_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run. Raises UserError if there is none or it does not fit the model's vocabulary."""
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set: name a SentencePiece model; `hope data tokenizer train` makes one")
    tokenizer = Tokenizer(data.tokenizer, data.lossy_tokenizer)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} pieces, model.vocab_size is {vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer
