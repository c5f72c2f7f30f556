"""`hope data inspect` and `hope data stats`: what the model will see, and how much of it there is."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.batches import DataBundle, open_data
from data_pipelines.counting import Tally, count_tokens, tally_corpus, total
from data_pipelines.records import Place
from data_pipelines.samples import IGNORED
from data_pipelines.selecting import Selector, reading_again
from data_pipelines.shards import list_shards
from data_pipelines.sources import describe_source
from data_pipelines.tokenizer import END_OF_TEXT, Tokenizer
from hope_train.config.load import load_config
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError

_log = logging.getLogger(__name__)


def inspect_command(
    config_path: str, overrides: Sequence[str] = (), batch: int = 0, rows: int = 2, as_json: bool = False
) -> int:
    """Print the first `rows` rows of global batch `batch` as text, as the model will see them. Raises UserError."""
    if batch < 0 or rows < 1:
        raise UserError(f"batch={batch} must be at least 0 and rows={rows} at least 1")
    config = load_config(config_path, overrides)
    bundle = open_data(config.data, config.train, config.seed, config.model.vocab_size)
    try:
        figures = look_at(bundle, batch, rows, as_json)
    finally:
        bundle.train.close()
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    for entry in figures["rows"]:
        resets = "" if entry["starts"] is None else f", memory starts at {entry['starts']}"
        padding = f", {entry['padding']} of {entry['tokens']} tokens are padding" if entry["padding"] else ""
        title = (
            f"batch {batch}, row {entry['row']} of {figures['batch_rows']}: window {entry['window']}{resets}{padding}"
        )
        console.print(Panel(Text(entry["text"]), title=Text(title), title_align="left"))
        for segment in entry["documents"]:
            line = f"  from token {segment['position']}: {segment['document']}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in figures["sources"].items())
    console.print(f"padding of the batch: {figures['padding_share']:.2%}", highlight=False)
    console.print(f"sources of the batch, by tokens: {shares}", markup=False, highlight=False, soft_wrap=True)
    return 0


def look_at(bundle: DataBundle, batch: int, rows: int, with_ids: bool) -> dict[str, Any]:
    """A batch in words: its first `rows` rows, its sources, and how much of it is padding."""
    source = bundle.train
    sample = source.batch(batch)
    first, count = source.sizes.samples_of(batch)
    contents = source.contents(first, count)
    windows = source.window_numbers(first, count)
    padding = (sample.targets == IGNORED).sum(axis=1)
    by_source: dict[str, int] = {}
    for row, segments in enumerate(contents):
        ends = [*(segment.position for segment in segments[1:]), source.context_length - int(padding[row])]
        for segment, end in zip(segments, ends, strict=True):
            by_source[segment.source] = by_source.get(segment.source, 0) + end - segment.position
    shown = []
    for row, tokens in enumerate(sample.tokens[:rows]):
        seen = tokens[: len(tokens) - int(padding[row])]
        entry: dict[str, Any] = {
            "row": row,
            "window": int(windows[row]),
            "tokens": len(tokens),
            "padding": int(padding[row]),
            "starts": None if sample.starts is None else np.flatnonzero(sample.starts[row]).tolist(),
            "documents": [segment._asdict() for segment in contents[row]],
            "text": _readable(bundle.tokenizer, seen),
        }
        if with_ids:
            entry["token_ids"] = tokens.tolist()
        shown.append(entry)
    everything = max(sum(by_source.values()), 1)
    return {
        "batch": batch,
        "batch_rows": len(sample.tokens),
        "padding_share": float(padding.sum() / sample.tokens.size),
        "sources": {name: tokens / everything for name, tokens in by_source.items()},
        "rows": shown,
    }


def stats_command(config_path: str, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Print documents, tokens, bytes per token, unknowns and lengths, of both splits and each source.

    Raises UserError.
    """
    config = load_config(config_path, overrides)
    bundle = open_data(config.data, config.train, config.seed, config.model.vocab_size)
    try:
        tallies = _TALLY[config.data.mode](config, bundle)
    finally:
        bundle.train.close()
    figures: dict[str, Any] = {
        **bundle.description,
        "splits": {split: total(own).figures() for split, own in tallies.items()},
        "by_source": [
            {"split": split, "source": tally.source, **tally.figures(), "records": dict(tally.records)}
            for split, own in tallies.items()
            for tally in own
        ],
    }
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    from rich.console import Console

    console = Console()
    console.print(_table("corpus", figures["splits"]))
    if len(figures["by_source"]) > len(tallies):
        columns = {f"{entry['source']}\n{entry['split']}": entry for entry in figures["by_source"]}
        console.print(_table("by source", columns))
    for name, value in (
        ("tokenizer", f"{bundle.tokenizer.path} ({bundle.tokenizer.vocab_size} pieces)"),
        ("windows of an epoch", number(figures["train"]["windows"])),
        ("epochs of the run", "-" if figures["epochs"] is None else f"{figures['epochs']:.3g}"),
        ("cache" if config.data.mode == "cached" else "place", figures["corpus"]["folder"]),
    ):
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    if bundle.tokenizer.note is not None:
        console.print(bundle.tokenizer.note, markup=False, highlight=False, soft_wrap=True)
    for entry in figures["by_source"]:
        if entry["split"] == "train" and entry["records"]:
            said = ", ".join(f"{number(count)} {name}" for name, count in entry["records"].items())
            console.print(f"records of {entry['source']}: {said}", markup=False, highlight=False, soft_wrap=True)
    if figures["cut_into_pieces_of"]:
        console.print("few documents: held-out text is pieces of documents", highlight=False)
    return 0


def _table(title: str, columns: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(Text(name), justify="right")
    entries = list(columns.values())
    kinds = {"split", "source", "length_histogram", "records"}
    for name in (name for name in entries[0] if name not in kinds):
        table.add_row(name.replace("_", " "), *(number(entry[name]) for entry in entries))
    for least in sorted({int(least) for entry in entries for least in entry["length_histogram"]}):
        counts = [entry["length_histogram"].get(str(least), 0) for entry in entries]
        table.add_row(f"documents of {least:,} to {2 * least - 1:,} tokens", *map(number, counts))
    return table


def _tally_cached(config: RunConfig, bundle: DataBundle) -> dict[str, list[Tally]]:
    from data_pipelines.corpus import open_corpus

    corpus = open_corpus(config.data, bundle.tokenizer)
    return {split.name: tally_corpus(split, bundle.tokenizer) for split in (corpus.train, corpus.validation)}


def _tally_indexed(config: RunConfig, bundle: DataBundle) -> dict[str, list[Tally]]:
    from data_pipelines.indexed import open_corpus

    found: dict[str, list[Tally]] = {"train": [], "validation": []}
    for source in config.data.sources:
        corpus = open_corpus(source, config.data, bundle.tokenizer)
        for split in (corpus.train, corpus.validation):
            closing = 0 if split.boundaries is not None else 1
            known = split.text_bytes is not None and split.unknowns is not None
            text_bytes, unknowns = (split.text_bytes or 0, split.unknowns or 0)
            if not known:  # A corpus made elsewhere: its tokens are counted.
                text_bytes, unknowns = count_tokens(split.tokens, bundle.tokenizer)
            tally = Tally(corpus.name)
            tally.add(split.document_lengths() - closing, len(split.tokens), text_bytes, unknowns)
            found[split.name].append(tally)
    return found


def _tally_streaming(config: RunConfig, bundle: DataBundle) -> dict[str, list[Tally]]:
    """Everything is read and tokenised, in this process."""
    data, tokenizer = config.data, bundle.tokenizer
    sides = {"documents": "train", "held_out": "validation"}
    found: dict[str, list[Tally]] = {side: [] for side in sides.values()}
    shards = list_shards(data.sources, data.hub_timeout)
    for number, source in enumerate(data.sources):
        selector = Selector(source, data)
        tallies = {side: Tally(describe_source(source)) for side in found}
        for shard in (shard for shard in shards if shard.source == number):
            records = reading_again(
                shard,
                Place(),
                part=0,
                parts=1,
                columns=selector.columns,
                retries=data.retries,
                wait=data.retry_seconds,
                tell=_log.warning,
            )
            for record in records:
                verdict = selector.judge(record)
                for tally in tallies.values():
                    tally.records[verdict] += 1
                if verdict in sides and record.text is not None:
                    tokens = tokenizer.encode(record.text)
                    length = np.array([len(tokens)], np.int64)
                    size = len(record.text.encode("utf-8"))
                    tallies[sides[verdict]].add(length, len(tokens) + 1, size, tokenizer.count_unknowns(tokens))
        for side, tally in tallies.items():
            found[side].append(tally)
    return found


_TALLY = {"cached": _tally_cached, "indexed": _tally_indexed, "streaming": _tally_streaming}


def _readable(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Text of a row with end-of-text written out; a row may begin or end inside a character."""
    boundaries = np.flatnonzero(tokens == tokenizer.eot_id)
    before, *documents = np.split(tokens, boundaries)
    return tokenizer.decode(before) + "".join(END_OF_TEXT + tokenizer.decode(document) for document in documents)


def number(value: Any) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    return f"{value:,}"
