"""How much context trained models use, side by side: the loss when all context is cut every n tokens.

    python -m scripts.horizon RUN [RUN …] [--wikitext FOLDER] [--horizons 8 16 32 64 128] [--json]

For any architecture: a cut resets memories and convolution, and hides from attention what came before it. All runs are
measured on the same windows (held-out text of the first run, or WikiText's validation split), so that two runs can be
compared at every length: where one falls behind tells which distances it uses less well. A loss that FALLS when context
is cut shows context that misleads the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hope_train.checkpoint.store import load_model
from hope_train.errors import UserError
from hope_train.evaluate.run_files import pick_device
from scripts.living_memory import held_out_windows, window_losses


def by_horizon(
    runs: Sequence[str], wikitext: str | None, windows: int, horizons: Sequence[int], device: str
) -> dict[str, Any]:
    """Nats per token of each run with whole windows (key `whole`) and with cuts every n tokens (key n).

    Raises UserError for runs that cannot be compared: with other tokenizers, or trained on other lengths.
    """
    place, found, first = pick_device(device), [], None
    for run in runs:
        model, config, manifest = load_model(run, place, tell=lambda line: print(line, file=sys.stderr))
        identity = (manifest.tokenizer, config.train.context_length)
        if first is None:
            label, batches = held_out_windows(run, config, manifest.tokenizer, wikitext, windows)
            first = identity
        elif identity != first:
            raise UserError(f"{run} has another tokenizer or context length than {runs[0]}: no loss can be compared")
        losses = {
            "whole" if n is None else str(n): float(
                window_losses(model, batches, place, config.train.precision, n).mean()
            )
            for n in (None, *sorted(horizons, reverse=True))
        }
        found.append({"run": run, "step": manifest.step, "arch": config.model.arch, "loss": losses})
    return {"text": label, "windows": sum(len(batch.tokens) for batch in batches), "runs": found}


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m scripts.horizon", description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run directories or checkpoints")
    parser.add_argument("--wikitext", help="measure on WikiText's validation split from this folder (or `hub`)")
    parser.add_argument("--windows", type=int, default=96, help="how many windows to read (default: %(default)s)")
    parser.add_argument("--horizons", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="tokens between cuts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.windows < 2:
            raise UserError(f"--windows={chosen.windows}: at least 2")
        if min(chosen.horizons) < 1:
            raise UserError(f"--horizons {min(chosen.horizons)}: tokens between cuts are at least 1")
        if missing := [run for run in chosen.runs if not Path(run).is_dir()]:
            raise UserError(f"{missing[0]} is neither a run directory nor a checkpoint: no such folder")
        found = by_horizon(chosen.runs, chosen.wikitext, chosen.windows, chosen.horizons, chosen.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    table = Table(title=f"Nats per token on {found['text']}, {found['windows']} windows", title_justify="left")
    for column in ("context cut every", *(row["run"] for row in found["runs"])):
        table.add_column(column, justify="right")
    for key in found["runs"][0]["loss"]:
        label = "never" if key == "whole" else f"{key} tokens"
        table.add_row(label, *(f"{row['loss'][key]:.4f}" for row in found["runs"]))
    Console(width=max(100, Console().width)).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
