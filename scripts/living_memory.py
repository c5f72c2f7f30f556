"""Is the memory of a trained model alive? What its fast weights do with held-out text, and what they are worth.

    python -m scripts.living_memory runs/demo/hope
    python -m scripts.living_memory runs/demo/hope --wikitext FOLDER --json

Two tables. Activity: for each layer and box how far the weights stand from their initial state (|W - W_init| /
|W_init|), which share of them the clamp holds, and the mean write rate and retention. Worth: the loss on the same
windows with the writes as they are, switched off (eta_max = 0, every memory stays at its learned initial state), and
with everything reset every n tokens; with the standard error of the PAIRED difference.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipelines.batches import Batch, WindowSource
from data_pipelines.corpus import open_corpus
from hope_train.checkpoint.store import load_model
from hope_train.config.batches import BatchSizes
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.run_files import checkpoint_tokenizer, pick_device
from hope_train.evaluate.scoring import Scorer
from hope_train.evaluate.sources import read_wikitext
from hope_train.evaluate.wikitext import join_pages
from hope_train.memory.activity import MOST_HELD, TRAINED_BAND, TRAINED_MOST, outside_band
from hope_train.model.activity import observe_model, without_writes
from hope_train.model.hope import HopeModel
from hope_train.model.loss import IGNORED


@dataclass(frozen=True)
class Worth:
    """What a model loses, in nats per token, when something is taken from its memory; on the same windows."""

    what: str
    """`no writes`, or `memory of n tokens`: reset every n tokens, so that no write is used by more than n - 1 later
    ones."""
    loss: float
    difference: float
    """From the loss of the model as it is."""
    standard_error: float
    """Of the difference: over the windows' own differences, which share their text."""
    share_worse: float
    """Share of the windows that it makes worse."""


def window_losses(
    model: HopeModel, batches: Iterable[Batch], device: torch.device, precision: str, horizon: int | None = None
) -> np.ndarray:
    """Nats per scored token of each window, float64 [windows]; with `horizon` the model is reset every so many
    tokens."""
    losses: list[float] = []
    scorer = Scorer(model, device, eot_id=0, precision=precision)
    with scorer.running():
        for batch in batches:
            tokens_BT = torch.from_numpy(batch.tokens).to(device)
            targets_BT = torch.from_numpy(batch.targets).to(device)
            starts_BT = None if batch.starts is None else torch.from_numpy(batch.starts).to(device)
            if horizon is not None:
                resets_T = torch.arange(tokens_BT.shape[1], device=device) % horizon == 0
                starts_BT = resets_T.expand(tokens_BT.shape) if starts_BT is None else starts_BT | resets_T
            sums_B = model.row_nll(tokens_BT, targets_BT, starts_BT, scorer.chunk)
            losses += (sums_B / (targets_BT != IGNORED).sum(1)).tolist()
    return np.array(losses)


def worth_of_writes(
    model: HopeModel,
    batches: Sequence[Batch],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    horizons: Sequence[int] = (),
) -> tuple[float, list[Worth]]:
    """The loss of `model` on at least two windows of equal length, and what it loses without its writes and with
    shorter memories."""
    place = torch.device(device)
    whole = window_losses(model, batches, place, precision)
    taken = [("no writes", window_losses(without_writes(model), batches, place, precision))]
    for horizon in horizons:
        taken.append((f"memory of {horizon} tokens", window_losses(model, batches, place, precision, horizon)))
    found = []
    for what, losses in taken:
        more = losses - whole
        error = float(more.std(ddof=1) / math.sqrt(len(more)))
        found.append(Worth(what, float(losses.mean()), float(more.mean()), error, float((more > 0).mean())))
    return float(whole.mean()), found


def activity_rows(
    model: HopeModel, batch: Batch, device: torch.device | str = "cpu", precision: str = "fp32"
) -> list[dict[str, Any]]:
    """A row per layer and box over one batch: those of `Activity.rows`, with the layer and its mean eta and alpha."""
    starts = None if batch.starts is None else torch.from_numpy(batch.starts).to(device)
    with Scorer(model, torch.device(device), eot_id=0, precision=precision).running():
        found = observe_model(model, torch.from_numpy(batch.tokens).to(device), starts)
    return [
        {"layer": int(layer), "eta": seen.eta_BTH.mean().item(), "alpha": seen.alpha_BTH.mean().item(), **row}
        for layer, seen in found.items()
        for row in seen.rows()
    ]


def held_out_windows(
    run: str, config: RunConfig, fingerprint: str, wikitext: str | None, windows: int
) -> tuple[str, list[Batch]]:
    """What is read, and at most `windows` windows of the training length from all over it.

    The run's own held-out text, or WikiText's validation split. Raises UserError when there is none or it is too short.
    """
    tokenizer = checkpoint_tokenizer(run, config, fingerprint)
    length, rows = config.train.context_length, config.eval.batch_size
    if wikitext is None:
        label, split = "held-out training text", open_corpus(config.data, tokenizer).validation
        source = WindowSource(
            split, length, BatchSizes.constant(rows), config.seed, config.data.reset_at_documents, tokenizer.eot_id
        )
        chosen = list(source.validation_batches(1, windows))
    else:
        text = read_wikitext(wikitext, "validation", config.data.hub_timeout)
        label = f"WikiText ({text.place})"
        tokens = np.array(tokenizer.encode(join_pages([page.text for page in text.pages])), dtype=np.int64)
        count = (len(tokens) - 1) // length
        if not count:
            raise UserError(f"{text.place} has {len(tokens)} tokens, fewer than a window of {length} and the next one")
        chosen = []
        for number in np.arange(min(count, windows)) * count // min(count, windows):
            row = tokens[number * length : (number + 1) * length + 1][None]
            starts = np.arange(length)[None] == 0 if config.data.reset_at_documents else None
            chosen.append(Batch(row[:, :-1].copy(), row[:, 1:].copy(), starts))
    if len(chosen) < 2:
        raise UserError(f"{label} has a single window of {length} tokens: a standard error needs at least 2")
    groups = [chosen[first : first + rows] for first in range(0, len(chosen), rows)]
    return label, [_joined(group) for group in groups]


def _joined(rows: Sequence[Batch]) -> Batch:
    starts = None if rows[0].starts is None else np.concatenate([row.starts for row in rows if row.starts is not None])
    return Batch(np.concatenate([row.tokens for row in rows]), np.concatenate([row.targets for row in rows]), starts)


def print_tables(label: str, rows: Sequence[dict[str, Any]], title: str, loss: float, worth: Sequence[Worth]) -> None:
    """Both tables on standard output."""
    table = Table(title=f"Activity on {label}", title_justify="left")
    for column in ("layer", "box", "moved", "least", "most", "first chunk", "last", "clamped", "eta", "alpha"):
        table.add_column(column, justify="left" if column == "box" else "right", no_wrap=True)
    for row in rows:
        over_time = row["deviation_by_chunk"] or [math.nan]
        keys = ("deviation", "deviation_min", "deviation_max")
        moved = [math.nan if row[key] is None else row[key] for key in keys]
        held = math.nan if row["held"] is None else 100 * row["held"]
        table.add_row(
            str(row["layer"]),
            row["box"],
            *(f"{value:.3f}" for value in (*moved, over_time[0], over_time[-1])),
            f"{held:.2f}%",
            f"{row['eta']:.3f}",
            f"{row['alpha']:.4f}",
        )
    console = Console(width=max(100, Console().width))
    console.print(table)
    table = Table(title=title, title_justify="left")
    for column in ("", "nats per token", "worse by", "standard error", "windows made worse"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    table.add_row("as it is", f"{loss:.4f}", "", "", "")
    for each in worth:
        figures = (f"{each.loss:.4f}", f"{each.difference:.4f}", f"{each.standard_error:.4f}")
        table.add_row(each.what, *figures, f"{100 * each.share_worse:.0f}%")
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m scripts.living_memory", description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a run directory or a checkpoint of a model with memories")
    parser.add_argument("--wikitext", help="measure on WikiText's validation split from this folder (or `hub`)")
    parser.add_argument("--windows", type=int, default=64, help="how many windows to read (default: %(default)s)")
    parser.add_argument(
        "--horizons", type=int, nargs="*", default=[8, 32, 128], help="reset every so many tokens (default: 8 32 128)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.windows < 2:
            raise UserError(f"--windows={chosen.windows}: a standard error needs at least 2")
        if min(chosen.horizons, default=1) < 1:
            raise UserError(f"--horizons {min(chosen.horizons)}: tokens between resets are at least 1")
        if not Path(chosen.run).is_dir():
            raise UserError(f"{chosen.run} is neither a run directory nor a checkpoint: no such folder")
        device = pick_device(chosen.device)
        model, config, manifest = load_model(chosen.run, device, tell=lambda line: print(line, file=sys.stderr))
        if config.model.arch != "hope":
            raise UserError(f"{chosen.run} is a model with arch={config.model.arch}, which has no memories")
        label, batches = held_out_windows(chosen.run, config, manifest.tokenizer, chosen.wikitext, chosen.windows)
        rows = activity_rows(model, batches[0], device, config.train.precision)
        loss, worth = worth_of_writes(model, batches, device, config.train.precision, chosen.horizons)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(len(batch.tokens) for batch in batches)
    if chosen.json:
        found = {
            "run": chosen.run,
            "step": manifest.step,
            "text": label,
            "windows": count,
            "context_length": config.train.context_length,
            "loss": loss,
            "worth": [asdict(row) for row in worth],
            "activity": rows,
            "outside_band": outside_band(rows),
        }
        print(json.dumps(found, ensure_ascii=False))
    else:
        title = f"Worth of the memory: {count} windows of {config.train.context_length:,} tokens"
        low, high = TRAINED_BAND
        limits = f"{low} to {high}, {TRAINED_MOST} somewhere, {100 * MOST_HELD}% clamped at most"
        band = f"the band of trained models ({limits})"
        print_tables(f"{label} by {chosen.run}, step {manifest.step:,}", rows, title, loss, worth)
        print(*([f"outside {band}:", *wrong] if (wrong := outside_band(rows)) else [f"all inside {band}"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
