"""`hope data …`: train a tokenizer, write a token set, compare one with its manifest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.batches import open_tokenizer
from data_pipelines.looking import number
from data_pipelines.sources import fingerprint_sources, parse_source, read_sources
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
    user_symbols: Sequence[str] = (),
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
        raise UserError(f"tokenizer {path} exists already: say --overwrite to replace it, or choose another name")
    sources = [parse_source(text, text_field) for text in inputs]
    fingerprint_sources(sources)  # Paths that are missing are named before any work.
    # A sample is drawn from a data set of any size without keeping it, so the hub's need not be downloaded whole.
    texts = _Counted(document.text for document in read_sources(sources, stream_hub=max_bytes is not None))
    options: dict[str, Any] = {"split_digits": split_digits, "max_bytes": max_bytes, "seed": seed}
    tokenizer = train_tokenizer(texts, out, vocab_size, kind, **options, user_symbols=user_symbols)
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


def tokenize_command(config_path: str, overrides: Sequence[str], out: str, workers: int, as_json: bool = False) -> int:
    """Write the text of a configuration as a token set into folder `out`. Raises UserError."""
    from data_pipelines.tokenising import tokenise

    config = load_config(config_path, overrides)
    tokenizer = open_tokenizer(config.data, config.model.vocab_size)
    say = _quiet if as_json else _say
    if tokenizer.note is not None:
        say(tokenizer.note)
    began = time.perf_counter()
    manifest = tokenise(config.data, tokenizer, Path(out).expanduser(), workers, say)
    figures = {
        "path": out,
        "shards": len(manifest["shards"]),
        "tokenizer": manifest["tokenizer"],
        "splits": manifest["splits"],
        "counts": manifest["counts"],
        "retries": manifest["retries"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    flat: dict[str, Any] = {name: figures[name] for name in ("path", "shards", "tokenizer", "seconds", "retries")}
    for split, entry in manifest["splits"].items():
        flat |= {f"{split} {name}": entry[name] for name in ("documents", "tokens", "bytes", "unknowns")}
    flat |= {f"records: {name}": count for name, count in manifest["counts"].items()}
    _print(flat, False, "token set")
    return 0


def verify_command(path: str, as_json: bool = False) -> int:
    """Compare every file of a token set or of a cached corpus with its manifest; 2 when something is damaged."""
    from data_pipelines.tokenset import damage, read_json, read_manifest

    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {path}: name a token set, or a cached corpus (`hope data stats` shows where it is)")
    cached = (folder / "train.offsets.npy").exists()
    manifest = read_json(folder / "manifest.json") if cached else read_manifest(folder)
    files = dict(manifest.get("files", {}))
    for shard in manifest.get("shards", []):
        for part in shard["splits"].values():
            files |= part["files"]
    lines = damage(folder, files, threads=len(os.sched_getaffinity(0)))
    if as_json:
        print(json.dumps({"path": path, "files": len(files), "damaged": lines}, ensure_ascii=False))
    else:
        for line in lines:
            _say(line)
        _say(f"{path}: {len(files)} files, {len(lines)} damaged")
    return 2 if lines else 0


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    pass


def _print(figures: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # A fingerprint or a path is of use whole.
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), Text(number(value) if isinstance(value, (int, float)) else str(value)))
    Console().print(table)
