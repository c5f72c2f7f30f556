"""`hope data …`: train a tokenizer, look at what the model will see, count the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.batches import DataBundle, open_data
from data_pipelines.pack import CorpusSplit
from data_pipelines.sources import fingerprint_sources, parse_source, read_sources
from data_pipelines.tokenizer import END_OF_TEXT, Tokenizer
from data_pipelines.tokenizer_training import model_path, train_tokenizer
from hope_train.config.load import load_config
from hope_train.errors import UserError


def train_tokenizer_command(
    inputs: Sequence[str],
    out: str,
    vocab_size: int = 32000,
    kind: str = "bpe",
    text_field: str = "text",
    split_digits: bool = True,
    max_bytes: int | None = None,
    seed: int = 0,
    as_json: bool = False,
    overwrite: bool = False,
) -> int:
    """Train a tokenizer on `inputs` (paths, `hub:owner/name[:config]`, `builtin:python-docs`) into file `out`.

    An existing file is left alone unless `overwrite`: models are tied to their tokenizer. Prints the path, the number
    of pieces, the fingerprint, and bytes per token on the text that was read (a sample of it, of at most 1 MB).
    Raises UserError.
    """
    if not inputs:
        raise UserError("no text to train on: name files, folders, hub:owner/name or builtin:python-docs")
    path = model_path(out)
    if path.exists() and not overwrite:
        raise UserError(f"tokenizer {path} exists already: remove it or choose another name")
    sources = [parse_source(text, text_field) for text in inputs]
    fingerprint_sources(sources)  # Paths that are missing are named before any work.
    texts = _Counted(document.text for document in read_sources(sources))
    tokenizer = train_tokenizer(texts, out, vocab_size, kind, split_digits=split_digits, max_bytes=max_bytes, seed=seed)
    sample_bytes = len(texts.sample.encode("utf-8"))
    figures = {
        "path": str(path),
        "kind": kind,
        "pieces": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "documents": texts.documents,
        "bytes": texts.bytes,
        "bytes_per_token": round(sample_bytes / len(tokenizer.encode(texts.sample)), 4),
    }
    _print(figures, as_json, "tokenizer")
    return 0


class _Counted:
    """Texts on their way to somewhere else, counted, the beginnings of them kept as a sample."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.documents = 0
        self.bytes = 0
        self.sample = ""

    def __iter__(self) -> Iterator[str]:
        parts: list[str] = []
        room = 1_000_000
        for text in self._texts:
            self.documents += 1
            self.bytes += len(text.encode("utf-8"))
            part = text[: min(room, 20_000)]
            if part:
                parts.append(part)
                room -= len(part)
            yield text
        self.sample = "".join(parts)


def inspect_command(
    config_path: str, overrides: Sequence[str] = (), batch: int = 0, rows: int = 2, as_json: bool = False
) -> int:
    """Print the first `rows` rows of global batch `batch` as text, as the model will see them. Raises UserError."""
    if batch < 0 or rows < 1:
        raise UserError(f"batch={batch} must be at least 0 and rows={rows} at least 1")
    bundle, _ = _open(config_path, overrides)
    sample = bundle.train.batch(batch)
    shown = []
    for row, tokens in enumerate(sample.tokens[:rows]):
        entry: dict[str, Any] = {
            "row": row,
            "window": int(bundle.train.window_numbers(batch * bundle.train.batch_sequences + row, 1)[0]),
            "tokens": len(tokens),
            "starts": None if sample.starts is None else np.flatnonzero(sample.starts[row]).tolist(),
            "text": _readable(bundle.tokenizer, tokens),
        }
        if as_json:
            entry["token_ids"] = tokens.tolist()
        shown.append(entry)
    figures = {"batch": batch, "batch_rows": len(sample.tokens), "rows": shown}
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    for entry in shown:
        resets = "" if entry["starts"] is None else f", memory starts at {entry['starts']}"
        title = f"batch {batch}, row {entry['row']} of {len(sample.tokens)}: window {entry['window']}{resets}"
        console.print(Panel(Text(entry["text"]), title=Text(title), title_align="left"))
    return 0


def stats_command(config_path: str, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Print documents, tokens, bytes per token and the lengths of documents, for both splits. Raises UserError."""
    bundle, splits = _open(config_path, overrides)
    figures = {**bundle.description, "splits": {split.name: _split_figures(split) for split in splits}}
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="corpus", title_justify="left")
    for column in ("", *(split.name for split in splits)):
        table.add_column(column, justify="right" if column else "left")
    names = [name for name in figures["splits"]["train"] if name != "length_histogram"]
    for name in names:
        table.add_row(name.replace("_", " "), *(_number(figures["splits"][split.name][name]) for split in splits))
    buckets = sorted({int(least) for split in splits for least in figures["splits"][split.name]["length_histogram"]})
    for least in buckets:
        counts = [figures["splits"][split.name]["length_histogram"].get(str(least), 0) for split in splits]
        table.add_row(f"documents of {least:,} to {2 * least - 1:,} tokens", *map(_number, counts))
    console.print(table)
    for name, value in (
        ("tokenizer", f"{bundle.tokenizer.path} ({bundle.tokenizer.vocab_size} pieces)"),
        ("windows of an epoch", _number(bundle.train.windows)),
        ("epochs of the run", f"{bundle.description['epochs']:.3g}"),
        ("cache", bundle.description["corpus"]["folder"]),
    ):
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    if bundle.description["cut_into_pieces_of"]:
        console.print("few documents: held-out text is pieces of documents", highlight=False)
    return 0


def _open(config_path: str, overrides: Sequence[str]) -> tuple[DataBundle, list[CorpusSplit]]:
    from data_pipelines.corpus import open_corpus

    config = load_config(config_path, overrides)
    bundle = open_data(config.data, config.train, config.seed, config.model.vocab_size)
    if bundle.validation is not None:
        return bundle, [bundle.train.split, bundle.validation.split]
    corpus = open_corpus(config.data, bundle.tokenizer)
    return bundle, [corpus.train, corpus.validation]


def _split_figures(split: CorpusSplit) -> dict[str, Any]:
    lengths = split.document_lengths()
    figures: dict[str, Any] = {
        "documents": split.documents,
        "tokens": len(split.tokens),
        "bytes": split.text_bytes,
        "bytes_per_token": None,
        "shortest": None,
        "median": None,
        "longest": None,
        "length_histogram": {},
    }
    if split.documents:
        # Bucket b holds lengths of 2**b to 2**(b+1) - 1; frexp gives the exponent exactly.
        buckets = np.frexp(lengths)[1] - 1
        histogram = {str(1 << int(b)): int(n) for b, n in zip(*np.unique(buckets, return_counts=True), strict=True)}
        figures |= {
            "bytes_per_token": round(split.text_bytes / int(lengths.sum()), 4),
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
            "length_histogram": histogram,
        }
    return figures


def _readable(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Text of a row with end-of-text written out; a row may begin or end inside a character."""
    boundaries = np.flatnonzero(tokens == tokenizer.eot_id)
    before, *documents = np.split(tokens, boundaries)
    return tokenizer.decode(before) + "".join(END_OF_TEXT + tokenizer.decode(document) for document in documents)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}"


def _print(figures: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _number(value) if isinstance(value, (int, float)) else str(value))
    Console().print(table)
