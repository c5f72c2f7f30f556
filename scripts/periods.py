"""What the periods of the CMS levels cost, and whether slow levels learn.

    python -m scripts.periods CONFIG --twin TWIN --periods 1 4 16 64 --seeds 0 1 2 --out FOLDER [key=value …]

Trains through `hope train`, one run after another: the model of CONFIG with the periods asked for, the same model
with all periods 1, and the configuration TWIN, each with every seed. Tokens, batches and schedule are the same for
all. Then, for each level of each run, it puts the level's initial weights back (those of the run's seed, before the
first step) and measures the held-out loss again. A level counts as one that learned when that raises the loss by more
than the spread of seeds, in every seed, after at least 8 updates of its own.

A level's lr_scale is period^lr_power (ours): a slow level makes fewer steps, with less noise in each.

FOLDER gets a run directory per run and results.jsonl, a line per run. Runs that are finished are not repeated, one
that was interrupted goes on from its newest checkpoint: the same command takes up where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from data_pipelines.batches import Batch, open_data
from hope_train.checkpoint.store import load_model
from hope_train.config.load import load_config
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.loop import validation_loss
from hope_train.levels.schedule import LevelPlan, level_of
from hope_train.model.hope import HopeModel, build_model

RESULTS = "results.jsonl"
TWIN = "twin"
MIN_UPDATES = 8
"""With fewer updates of its own a level is not judged."""

Result = dict[str, Any]
"""A line of results.jsonl: see `measure`."""


@dataclass(frozen=True)
class Run:
    """One run of the set."""

    variant: str
    """`1/4/16/64`: the periods; or `twin`."""
    seed: int
    config: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the run and of its directory."""
        return f"{self.variant.replace('/', '-')}-seed{self.seed}"

    def arguments(self, out: Path) -> list[str]:
        """What `hope train` is given."""
        return [self.config, *self.overrides, f"seed={self.seed}", f"name={self.name}", f"dir={out / self.name}"]


def with_periods(config: RunConfig, periods: Sequence[int], lr_power: float) -> str:
    """The override that gives the levels of `config` these periods, everything else being theirs.

    Raises UserError unless there is one period for each level.
    """
    levels = config.model.cms.levels
    if len(levels) != len(periods):
        raise UserError(f"--periods names {len(periods)} periods, the configuration has {len(levels)} CMS levels")
    rows = [
        level.model_dump() | {"period": period, "lr_scale": round(period**lr_power, 4)}
        for level, period in zip(levels, periods, strict=True)
    ]
    return "model.cms.levels=" + yaml.safe_dump(rows, default_flow_style=True, width=10**6).strip()


def planned_runs(
    config: str,
    twin: str | None,
    periods: Sequence[int],
    seeds: Sequence[int],
    lr_power: float,
    overrides: Sequence[str],
    twin_overrides: Sequence[str] = (),
    ones: bool = True,
) -> list[Run]:
    """All runs, seed by seed, so that an unfinished set has whole comparisons; without `ones` those of all periods 1
    are left out.

    `twin_overrides` come last in the twin's runs: it may need another learning rate.
    """
    settings = load_config(config, overrides)
    variants = {"/".join(map(str, each)): each for each in ((periods, [1] * len(periods)) if ones else (periods,))}
    levels = {name: with_periods(settings, each, lr_power) for name, each in variants.items()}
    runs = []
    for seed in seeds:
        runs += [Run(name, seed, config, (*overrides, value)) for name, value in levels.items()]
        if twin is not None:
            # The compiler of the memories has nothing to do in a model without.
            runs.append(Run(TWIN, seed, twin, (*overrides, "train.compile=none", *twin_overrides)))
    return runs


@contextmanager
def initial_weights(model: HopeModel, level: int, seed: int) -> Iterator[HopeModel]:
    """The model with one level (in all blocks) as it was before the first step of a run with this seed."""
    start = dict(build_model(model.config, seed).named_parameters())
    chosen = [(parameter, start[name]) for name, parameter in model.named_parameters() if level_of(name) == level]
    if not chosen:
        raise ValueError(f"the model has no level {level}")
    kept = [parameter.detach().clone() for parameter, _ in chosen]
    with torch.no_grad():
        for parameter, first in chosen:
            parameter.copy_(first)
        try:
            yield model
        finally:
            for (parameter, _), weights in zip(chosen, kept, strict=True):
                parameter.copy_(weights)


def rise_by_level(model: HopeModel, batches: Sequence[Batch], seed: int, precision: str = "fp32") -> list[float]:
    """For each CMS level, by how many nats per token its initial weights raise the loss on `batches`."""
    device = model.embed.weight.device
    as_it_is = validation_loss(model, batches, device, precision)
    rises = []
    for level in range(len(model.config.cms.levels)):
        with initial_weights(model, level, seed):
            rises.append(validation_loss(model, batches, device, precision) - as_it_is)
    return rises


def measure(run: Run, out: Path) -> Result:
    """The line of a finished run: its last figures on the validation split (those of eval.jsonl), and per level the
    period, the updates made and the rise of the held-out loss when its initial weights are put back."""
    model, config, manifest = load_model(out / run.name)
    figures: dict[str, float] = {}
    for line in (out / run.name / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["step"] == manifest.step and row["split"] == "validation":
            found = ("validation_loss", "word_ppl", "bits_per_byte")
            figures |= {name: row[name] for name in found if name in row}
    data = open_data(config.data, config.train, config.seed, config.model.vocab_size)
    if data.validation is None:
        raise UserError("no text is held out (data.validation_fraction): there is no loss to measure levels by")
    batches = list(data.validation.validation_batches(config.train.micro_batch_size, config.eval.validation_batches))
    rises = rise_by_level(model, batches, config.seed, config.train.precision)
    planned = [part for part in LevelPlan.from_config(config).sets if part.level is not None]
    return {
        "variant": run.variant,
        "seed": run.seed,
        "step": manifest.step,
        "tokens": manifest.tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **figures,
        "levels": [
            {"level": part.level, "period": part.period, "updates": manifest.step // part.period, "rise": rise}
            for part, rise in zip(planned, rises, strict=True)
        ],
    }


def read_results(out: Path) -> list[Result]:
    """The lines of results.jsonl."""
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def learned(rises: Sequence[float], spread: float, updates: int) -> bool | None:
    """Whether a level learned: every seed's rise is beyond the spread of seeds. None: too few updates to say."""
    return None if updates < MIN_UPDATES else min(rises) > spread


def tables(results: Sequence[Result]) -> list[Table]:
    """Both tables; ± is the standard deviation over seeds (n - 1)."""

    def spread(rows: Sequence[Result], key: str) -> float | None:
        values = [row[key] for row in rows if key in row]
        return statistics.stdev(values) if len(values) > 1 else None

    def cell(rows: Sequence[Result], key: str, digits: int) -> str:
        values, around = [row[key] for row in rows if key in row], spread(rows, key)
        shown = f"{statistics.mean(values):,.{digits}f}" if values else "-"
        return shown + (f" ± {around:,.{digits}f}" if around is not None else "")

    first = Table("periods", "seeds", "held-out loss", "word_ppl", "bits per byte", title="Figures at the end")
    second = Table("periods", "level", "period", "updates", "rise, mean", "least", "spread of seeds", "learned")
    second.title = "Initial weights put back: rise of the held-out loss, nats per token"
    for variant in dict.fromkeys(row["variant"] for row in results):
        rows = [row for row in results if row["variant"] == variant]
        figures = [cell(rows, "validation_loss", 4), cell(rows, "word_ppl", 0), cell(rows, "bits_per_byte", 4)]
        first.add_row(variant, str(len(rows)), *figures)
        around = spread(rows, "validation_loss")
        for level in range(len(rows[0]["levels"])):
            entries = [row["levels"][level] for row in rows]
            rises, updates = [entry["rise"] for entry in entries], entries[0]["updates"]
            verdict = learned(rises, around, updates) if around is not None else None
            said = {None: "cannot say", True: "yes", False: "no"}[verdict]
            shown = [f"{statistics.mean(rises):.4f}", f"{min(rises):.4f}", "-" if around is None else f"{around:.4f}"]
            second.add_row(variant, str(level), str(entries[0]["period"]), str(updates), *shown, said)
    return [first, second]


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0; 2 after one line about what is wrong; that of `hope train` where a run failed."""
    parser = argparse.ArgumentParser(prog="python -m scripts.periods", description=str(__doc__).splitlines()[0])
    parser.add_argument("config", help="a configuration with CMS levels")
    parser.add_argument("overrides", nargs="*", help="key=value, for all runs")
    parser.add_argument("--twin", help="the configuration to compare with")
    parser.add_argument("--twin-overrides", nargs="+", default=[], help="key=value, for the twin besides")
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--without-ones", action="store_true", help="leave out the runs with all periods 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr-power", type=float, default=0.25, help="lr_scale = period^this (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        sizes = chosen.periods, chosen.seeds, chosen.lr_power
        more = chosen.overrides, chosen.twin_overrides, not chosen.without_ones
        runs = planned_runs(chosen.config, chosen.twin, *sizes, *more)
        chosen.out.mkdir(parents=True, exist_ok=True)
        finished = {(row["variant"], row["seed"]) for row in read_results(chosen.out)}
        for run in runs:
            if (run.variant, run.seed) in finished:
                continue
            # A process each, as users run them: nothing of one run is left for the next.
            command = [sys.executable, "-m", "hope_train.cli", "train", *run.arguments(chosen.out.resolve())]
            if code := subprocess.run(command, stdout=sys.stderr).returncode:
                return code
            result = measure(run, chosen.out)
            with (chosen.out / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in tables(read_results(chosen.out)):
        Console(width=max(110, Console().width)).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
