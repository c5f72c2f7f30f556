"""Reading a run directory as its files stand, torn or resumed. No torch, no network.

The files are described in docs/architecture.md ("A run directory"). Of a run that was killed and resumed, the lines
written after the resume win over what the killed process had logged beyond its last checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hope_train.errors import UserError

Row = dict[str, Any]

PERPLEXITIES = ("word_ppl", "byte_ppl", "bits_per_byte", "token_ppl", "classic_ppl")
"""Keys of an evaluation that are figures of merit, lower is better."""

_MEASURED = (*PERPLEXITIES, "validation_loss")

_PREFIXES = ("heldout_stateful_", "heldout_", "stateful_")
"""Names under which other text and another way of reading are logged: nobody is to take them for the plain figure."""


@dataclass
class Run:
    """One run directory, read."""

    name: str
    path: Path
    metrics: list[Row]
    """Logged steps in order, each step once."""

    evals: list[Row]
    """Evaluations in order of step, each (step, split, source, protocol, variant) once."""

    config: Mapping[str, Any]
    stopped: Mapping[str, Any] | None
    resumes: int = 0
    """How often the log went back to an earlier step, or what lay beyond a checkpoint was cut off it."""

    notes: list[str] = field(default_factory=list)
    """What was odd about the files, one sentence each."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, values) of a figure in metrics.jsonl; steps where it is missing or not finite are left out."""
        return _points(self.metrics, key)

    def eval_series(self, key: str) -> dict[str, list[Row]]:
        """Evaluations that measured `key`, grouped by what they are comparable in: {label: rows in order of step}."""
        groups: dict[str, list[Row]] = {}
        for row in self.evals:
            if _finite(row.get(key)) is not None:
                groups.setdefault(eval_label(row), []).append(row)
        return groups

    def level_names(self) -> list[str]:
        """`core` first, then the CMS levels by number."""
        names = {name for row in self.metrics for name in row.get("levels") or {}}
        return sorted(names, key=lambda name: (name != "core", int(name) if name.isdigit() else 0, name))

    def level_rows(self, level: str, due_only: bool = True) -> list[Row]:
        """The figures of one level at the logged steps (where it was due), with `step` and `tokens` beside them."""
        rows = []
        for row in self.metrics:
            figures = (row.get("levels") or {}).get(level)
            if isinstance(figures, dict) and (figures.get("due", True) or not due_only):
                rows.append({**figures, "step": row["step"], "tokens": row["tokens"]})
        return rows


def read_run(path: Path, name: str | None = None) -> Run:
    """Read the run directory `path`. Raises UserError where it is none, or has not logged a step yet."""
    if not path.is_dir():
        raise UserError(f"{path} is not a run directory: no such folder")
    source = path / "metrics.jsonl"
    if not source.is_file():
        raise UserError(f"{path} is not a run directory: it has no metrics.jsonl")
    notes: list[str] = []
    metrics, resumes = _ordered(_lines(source, notes))
    if not metrics:
        raise UserError(f"{source} holds no logged step yet: nothing to report")
    evals_path = path / "eval.jsonl"
    evals = _latest(map(_plain_names, _lines(evals_path, notes))) if evals_path.is_file() else []
    resumes += len(list(path.glob("metrics.beyond-*.jsonl")))
    config = _mapping(path / "config.yaml", notes)
    label = name or str(config.get("name") or path.resolve().name)
    return Run(label, path, metrics, evals, config, _mapping(path / "STOPPED.json", notes) or None, resumes, notes)


def read_runs(paths: list[str]) -> list[Run]:
    """Read several run directories; two of the same name are told apart by their folders."""
    if not paths:
        raise UserError("name at least one run directory")
    folders = [Path(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run directory is named twice")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({run.path.resolve().parent.name}/{run.path.resolve().name})"
    return runs


def eval_label(row: Row) -> str:
    """What an evaluation's figure is comparable in: `wikitext valid, word, first 8 pages, stateful`."""
    parts = [" ".join(str(row[key]) for key in ("source", "split") if row.get(key))]
    if row.get("protocol"):
        parts.append(str(row["protocol"]))
    if is_partial(row):
        pages = row.get("pages")
        parts.append(f"partial, {pages} pages" if isinstance(pages, int) and not isinstance(pages, bool) else "partial")
    if row.get("stateful"):
        parts.append("stateful")
    return ", ".join(part for part in parts if part) or "evaluation"


def figure_name(row: Row, key: str = "word_ppl") -> str:
    """The name under which the run logged a figure: `heldout_word_ppl` is no word_ppl of WikiText."""
    return f"{row.get('prefix', '')}{key}"


def is_partial(row: Row) -> bool:
    """Whether the figure is over a part of the pages only."""
    return bool(row.get("partial"))


def is_wikitext(row: Row) -> bool:
    """Whether the text evaluated was WikiText; only then do published WikiText figures belong beside it."""
    return "wikitext" in str(row.get("source", "")).lower()


def _lines(path: Path, notes: list[str]) -> Iterator[Row]:
    """The JSON objects in a file. A torn last line is dropped silently: the writer was killed, or is still at it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    bad = 0
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.strip("\x00 \r\t"):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            bad += number < len(lines) - 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and _finite(row.get("tokens")) is not None:
            yield row
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} unreadable line{'s' if bad > 1 else ''} skipped")


def _ordered(rows: Iterator[Row]) -> tuple[list[Row], int]:
    """Steps in order. Going back to step s withdraws every line of step s and later written before it."""
    kept: list[Row] = []
    resumes = 0
    for row in rows:
        if kept and row["step"] <= kept[-1]["step"]:
            resumes += 1
            while kept and kept[-1]["step"] >= row["step"]:
                kept.pop()
        kept.append(row)
    return kept, resumes


def _plain_names(row: Row) -> Row:
    """The row with figures under their plain names; what was in the names is in `prefix`, `stateful` and `source`."""
    for prefix in _PREFIXES:
        found = [key for key in PERPLEXITIES if f"{prefix}{key}" in row]
        if found:
            plain = {key: value for key, value in row.items() if key.removeprefix(prefix) not in found}
            plain |= {key: row[f"{prefix}{key}"] for key in found} | {"prefix": prefix}
            return plain | ({"stateful": True} if "stateful" in prefix else {})
    return row


def _latest(rows: Iterable[Row]) -> list[Row]:
    """The newest line for each kind of evaluation at each step. An evaluation of an old checkpoint may come late."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        measured = tuple(key for key in _MEASURED if key in row)
        newest[(row["step"], eval_label(row), measured)] = row
    return sorted(newest.values(), key=lambda row: row["step"])


def _points(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    tokens, values = [], []
    for row in rows:
        value = _finite(row.get(key))
        if value is not None:
            tokens.append(float(row["tokens"]))
            values.append(value)
    return tokens, values


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _mapping(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """A YAML or JSON mapping; empty where the file is missing or damaged, which is noted."""
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        notes.append(f"{path.name} is unreadable")
        return {}
    return value if isinstance(value, dict) else {}
