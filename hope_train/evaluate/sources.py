"""Where evaluation text comes from: a folder, the hub, $HOPE_WIKITEXT, or the corpus's own held-out part."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipelines.corpus import open_corpus
from data_pipelines.hub import load_hub
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError
from hope_train.evaluate.wikitext import HELD_OUT, SPLITS, VERIFIED, Page, Text, join_pages, wikitext_text

ENVIRONMENT = "HOPE_WIKITEXT"
HUB = "EleutherAI/wikitext_document_level:wikitext-2-raw-v1"
HUB_LINES = "Salesforce/wikitext:wikitext-2-raw-v1"
"""The same text, one row per line."""

# Where unpacked archives and snapshots of the hub's repositories keep the files.
_SUBFOLDERS = ("", "wikitext-2-raw", "wikitext-2-raw-v1")


def wikitext_place(configured: str | None) -> str | None:
    """Where to look for WikiText: what `eval.wikitext` says, else $HOPE_WIKITEXT, else None."""
    return configured or os.environ.get(ENVIRONMENT) or None


def read_wikitext(place: str, split: str, hub_timeout: float = 5.0) -> Text:
    """One split of WikiText-2-raw.

    Args:
        place: a folder, `hub`, or `hub:owner/name[:config]` for another copy on the hub. A folder (or its subfolder
            wikitext-2-raw or wikitext-2-raw-v1) holds wiki.valid.raw / wiki.test.raw, each plain or .gz, or
            validation*/test* files as .parquet or .jsonl(.gz) with a column `page` (one page per row) or `text`
            (one line per row).
        split: `validation` or `test`.
        hub_timeout: seconds after which a hub that does not answer is given up.

    Raises:
        UserError: nothing is there, or it cannot be read; the message names what was looked for.
    """
    if place == "hub" or place.startswith("hub:"):
        return _from_hub(place, split, hub_timeout)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"WikiText folder {place} {what}: name one with {_raw_name(split)} in it (eval.wikitext, --wikitext or "
            f"${ENVIRONMENT}), or `hub`"
        )
    for subfolder in (folder / name for name in _SUBFOLDERS):
        for suffix in ("", ".gz"):
            file = subfolder / f"{_raw_name(split)}{suffix}"
            if file.is_file():
                return wikitext_text(_read_text(file), split, str(file))
        rows_file = _rows_file(subfolder, split)
        if rows_file is not None:
            return wikitext_text(_raw_of_rows(_read_rows(rows_file), str(rows_file)), split, str(rows_file))
    raise UserError(f"WikiText folder {place} has no {_raw_name(split)} or {_raw_name(split)}.gz")


def held_out_text(data: DataConfig, tokenizer: Tokenizer) -> Text | None:
    """The held-out documents of a corpus that is the built-in text alone; None for any other corpus.

    The documents are decoded from the tokens (the tokenizer is lossless) of the corpus in the cache, so the part is
    exactly the one that training never sees. Raises UserError as `open_corpus`.
    """
    if data.mode != "cached" or not data.sources or any(source.builtin is None for source in data.sources):
        return None
    split = open_corpus(data, tokenizer).validation
    pages = []
    for first, last in zip(split.offsets, split.offsets[1:], strict=False):
        text = tokenizer.decode(split.tokens[int(first) + 1 : int(last)].tolist())
        pages.append(Page(text, text))
    return Text(HELD_OUT, "validation", "the part of python-docs that training does not see", tuple(pages))


def read_lines(folder: str, names: Iterable[str]) -> tuple[str, Path] | None:
    """(text, file) of the first of `names` (each plain or .gz) in a folder; None where there is none of them."""
    for name in names:
        for suffix in ("", ".gz"):
            file = Path(folder).expanduser() / f"{name}{suffix}"
            if file.is_file():
                return _read_text(file), file
    return None


def _from_hub(place: str, split: str, timeout: float) -> Text:
    named = place.partition(":")[2]
    names = [named] if named else [HUB, HUB_LINES]
    problem: UserError | None = None
    for name in names:
        try:
            rows = load_hub(name, split=split, revision=None, streaming=False, timeout=timeout)
        except UserError as error:
            problem = problem or error
            continue
        return wikitext_text(_raw_of_rows(rows, name), split, name)
    assert problem is not None
    raise UserError(
        f"WikiText from the hub: {str(problem).partition(';')[0]}; name a local folder with {_raw_name(split)} "
        f"(eval.wikitext, --wikitext or ${ENVIRONMENT})"
    )


def _raw_name(split: str) -> str:
    return f"wiki.{SPLITS[split]}.raw"


def _rows_file(folder: Path, split: str) -> Path | None:
    if not folder.is_dir():
        return None
    files = sorted(
        file
        for name in (split, SPLITS[split])
        for suffix in ("parquet", "jsonl", "jsonl.gz")
        for file in folder.glob(f"{name}*.{suffix}")
    )
    if len(set(files)) > 1:
        raise UserError(f"WikiText folder {folder} has several {split} files: {', '.join(f.name for f in files)}")
    return files[0] if files else None


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: cannot be read as parquet: {' '.join(str(error).split())}") from None
        return rows
    try:
        return [json.loads(line) for line in _read_text(file).split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"{file}: not one JSON object per line ({error})") from None


def _raw_of_rows(rows: Iterable[Any], place: str) -> str:
    """The raw file behind a hub table of pages (`page`) or of lines (`text`, in which blank lines have lost theirs)."""
    pages: list[str] = []
    lines: list[str] = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("page", row.get("text")), str):
            raise UserError(f"{place}: no text in column `page` (a page per row) or `text` (a line per row)")
        if "page" in row:
            pages.append(row["page"])
        else:
            lines.append(row["text"] or " \n")
    return join_pages(pages) if pages else "".join(lines)


def _read_text(file: Path) -> str:
    """UTF-8 text, line ends as they are."""
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8; WikiText-2-raw is") from None


__all__ = ["ENVIRONMENT", "HUB", "VERIFIED", "held_out_text", "read_lines", "read_wikitext", "wikitext_place"]
