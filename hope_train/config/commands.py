"""What `hope config` prints: a resolved configuration, or the documentation of its fields."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from hope_train.config.load import dump_yaml, field_docs, load_config
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError


def show_command(config: str, overrides: Sequence[str], as_json: bool) -> int:
    """Print the configuration in file `config` with overrides, every key written out. Raises UserError."""
    resolved = load_config(config, overrides)
    if as_json:
        print(json.dumps(resolved.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        print(dump_yaml(resolved), end="")
    return 0


def docs_command(keys: Sequence[str], as_json: bool) -> int:
    """Print type, default and meaning of every field, or of the keys and sections named. Raises UserError."""
    rows = field_rows()
    if keys:
        rows = [row for key in keys for row in _below(rows, key)]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    for row in rows:
        print(f"{row['key']}  ({row['type']}; {_default_text(row)})\n    {row['doc']}")
    return 0


def field_rows() -> list[dict[str, Any]]:
    """Every leaf field in the order of the tree: `key`, `type`, `doc`, and `default` where the field has one.

    A list of sections shows as `N` in the key: `model.cms.levels.N.width`.
    """
    rows = []
    for key, kind, default, doc in field_docs(RunConfig):
        row: dict[str, Any] = {"key": key, "type": kind, "doc": doc}
        if default is not PydanticUndefined:
            row["default"] = list(default) if isinstance(default, tuple) else default
        rows.append(row)
    return rows


def _default_text(row: dict[str, Any]) -> str:
    return f"default {json.dumps(row['default'])}" if "default" in row else "required"


def _below(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The row of a key, or the rows of a section; an index may stand for N."""
    wanted = ["N" if part.isdigit() else part for part in name.split(".")]
    found = [row for row in rows if row["key"].split(".")[: len(wanted)] == wanted]
    if found:
        return found
    names = {".".join(row["key"].split(".")[:depth]) for row in rows for depth in range(1, 6)}
    last = {known.rsplit(".", 1)[-1]: known for known in sorted(names)}
    close = difflib.get_close_matches(name, names, n=1) or [
        last[match] for match in difflib.get_close_matches(wanted[-1], last, n=1)
    ]
    hint = f" (did you mean `{close[0]}`?)" if close else ""
    raise UserError(f"no configuration key or section `{name}`{hint}")
