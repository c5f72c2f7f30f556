"""Write docs/configuration.md from the configuration's fields; with --check say whether it is current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hope_train.config.commands import field_rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by `make format` from the fields in hope_train/config/. Change the docstrings there. -->

A run is one YAML file. What it says lies over the defaults below, and `key=value` words on the
command line lie over the file:

    hope train configs/hope_tiny.yaml train.tokens=2e6 optimizer.lr=1e-3 name=try_1

* A file may begin with `base: other.yaml` (relative to itself) and then says only what differs.
* Values are YAML: `1e6` and `100e9` are numbers, `null` is nothing, `[word, token]` is a list.
* A list is replaced whole; one entry of a list is changed by its number: `model.cms.levels.0.period=4`.
* An unknown key, a wrong type or a value out of range stops the command before any work, with exit code 2.
* `hope config FILE [key=value ...]` prints the whole tree that results; `hope config --docs model.memory` explains a
  section. The tree of a run is saved in its directory as `config.yaml`.

In a key, `N` is the number of a list's entry, counted from 0. "Open" marks what the papers leave open."""

SECTIONS = {
    "": "The run",
    "model": "Model",
    "model.memory": "Self-modifying memories",
    "model.cms": "Continuum memory system",
    "model.cms.levels.N": "Each level",
    "data": "Data",
    "data.sources.N": "Each source",
    "optimizer": "Optimizer",
    "optimizer.schedule": "Learning-rate schedule",
    "train": "The loop",
    "train.batch_ramp": "Growing batches",
    "parallel": "Devices",
    "parallel.deepspeed": "DeepSpeed",
    "eval": "Evaluation",
    "checkpoint": "Checkpoints",
    "log": "Loggers",
}


def page() -> str:
    """The whole page. One table per section, sections in the order of the tree."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in field_rows():
        tables.setdefault(row["key"].rpartition(".")[0], []).append(row)
    parts = [INTRODUCTION]
    for section, rows in tables.items():
        title = SECTIONS.get(section, section)
        parts.append(f"\n## {title}{f' (`{section}`)' if section else ''}\n\n| key | default | type | meaning |")
        parts.append("|---|---|---|---|")
        for row in rows:
            default = f"`{json.dumps(row['default'])}`" if "default" in row else "required"
            cells = [f"`{row['key']}`", default, row["type"], row["doc"]]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page; with `--check` write nothing and return 1 when it would change."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("error: docs/configuration.md does not show the present fields; run `make format`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
