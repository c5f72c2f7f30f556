"""Update rules beside each other: the same model on the same tokens, matrices by one rule after the other.

    python -m scripts.optimizers CONFIG --out FOLDER [--seeds 0 1 2] [--noise 0.2 --noise-size 10] [key=value …]
    python -m scripts.optimizers LARGER --out FOLDER2 --factors-of FOLDER [key=value …]
    python -m scripts.optimizers CONFIG --out FOLDER --show [--plot curves.png]

The configuration's `lr` is that of everything that is no matrix, by AdamW in all runs. What differs is the rule of the
matrices and its rate, `matrix_lr_scale` times `lr`: first every rule runs with every factor of its grid and the first
seed, then with its best factor and the other seeds, then once more with every seed and noise. A rule whose best factor
lies at an end of its grid is swept further in that direction, at most four times. With --factors-of nothing is swept:
the factors are the best ones of an earlier, smaller study.

Noise: with probability --noise a batch's gradients get Gaussian noise added, parameter by parameter, of --noise-size
times the gradient's own root mean square, before the optimizer sees them (so before clipping). Which batches depends on
seed and step alone: it is the same for all rules.

FOLDER gets results.jsonl, a line per run: rule, factor, seed, noise, the loss of held-out text after the last step, the
word_ppl of WikiText's validation pages (eval.pages of them; where WikiText is at hand), the curve of training losses
(means over a 20th of the run), seconds of CPU time (of one thread) that the steps took, and how many steps were
refused. Runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipelines.batches import DataBundle, open_data
from hope_train.config.load import load_config
from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.loop import Evaluator, validation_loss
from hope_train.model.loss import IGNORED
from hope_train.parallel.engine import Engine, build_engine
from hope_train.parallel.mesh import Mesh
from hope_train.train.session import apply_options

RESULTS = "results.jsonl"
STEP_OF_GRID = 3.0
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "adamw": ((), (1 / 3, 1.0, 3.0)),
    "sgd": (("optimizer.name=sgd",), (30.0, 90.0, 270.0)),
    "muon": (("optimizer.name=muon",), (1 / 3, 1.0, 3.0)),
    # delta_momentum does not look ahead either: these two differ in the momentum's objective alone.
    "muon-no-nesterov": (("optimizer.name=muon", "optimizer.muon.nesterov=false"), (1 / 3, 1.0, 3.0)),
    "m3": (("optimizer.name=m3",), (1 / 3, 1.0, 3.0)),
    "delta_momentum": (("optimizer.name=delta_momentum",), (1 / 3, 1.0, 3.0)),
    "delta_momentum-linear": (
        ("optimizer.name=delta_momentum", "optimizer.delta_momentum.output=linear"),
        (30.0, 90.0, 270.0),
    ),
    "deep_momentum": (("optimizer.name=deep_momentum",), (1 / 3, 1.0, 3.0)),
    "dgd": (("optimizer.name=dgd",), (30.0, 90.0, 270.0)),
}
"""By name: overrides, and the factors that the sweep begins with."""

Result = dict[str, Any]


def train(config: RunConfig, data: DataBundle, noise: float, size: float) -> Result:
    """One run; its figures."""
    engine = build_engine(config, Mesh(MeshSizes(), torch.device("cpu")))
    apply_options(config, engine.model)
    losses, refused, spent = [], 0, 0.0
    for index in range(config.train.total_steps):
        start = time.process_time()
        batch = engine.batch(data.train, index)
        scored = int((batch.targets != IGNORED).sum())
        loss = float(engine.forward_backward(batch, scored, config.train).sum()) / max(scored, 1)
        if np.random.default_rng([config.seed, index]).random() < noise:
            add_noise(engine, config.seed, index, size)
        report = engine.optimizer.step(tokens=scored, loss=loss)
        engine.zero_grad()
        spent += time.process_time() - start
        losses.append(loss)
        refused += not report.applied
        if not math.isfinite(loss) or loss > 2 * losses[0]:
            return {"loss": None, "curve": curve(losses), "seconds": spent, "refused": refused, "steps": len(losses)}
    assert data.validation is not None
    batches = list(data.validation.validation_batches(config.train.micro_batch_size, config.eval.validation_batches))
    held_out = validation_loss(engine.model, batches, "cpu", config.train.precision)
    rows = wikitext(config, data).evaluate(engine.model, "validation", 0, 0)
    words = [row["word_ppl"] for row in rows if "word_ppl" in row]
    return {
        "loss": held_out,
        "word_ppl": words[0] if words else None,
        "curve": curve(losses),
        "seconds": spent,
        "refused": refused,
        "steps": len(losses),
    }


def wikitext(config: RunConfig, data: DataBundle) -> Evaluator:
    """Of the word protocol alone."""
    word = config.eval.model_copy(update={"protocols": ["word"], "stateful": False})
    return Evaluator(config.model_copy(update={"eval": word}), data.tokenizer, "cpu", splits=("validation",))


def add_noise(engine: Engine, seed: int, index: int, size: float) -> None:
    """To every gradient, in proportion to it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + index)
    for parameter in engine.model.parameters():
        if parameter.grad is not None:
            rms = parameter.grad.square().mean().sqrt()
            parameter.grad.add_(size * rms * torch.randn(parameter.shape, generator=generator))


def curve(losses: Sequence[float], points: int = 20) -> list[float]:
    """Means of equal parts of a run."""
    return [round(float(part.mean()), 4) for part in np.array_split(np.array(losses), min(points, len(losses)))]


def read_results(folder: Path) -> list[Result]:
    """What a study has, in the order of its runs."""
    file = folder / RESULTS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


class Study:
    """The runs of a folder."""

    def __init__(self, config: str, overrides: Sequence[str], out: Path, noise: float, size: float) -> None:
        self.config, self.overrides, self.out, self.noise, self.size = config, overrides, out, noise, size
        self._data: dict[int, DataBundle] = {}
        self.results = read_results(out)

    def result(self, variant: str, factor: float, seed: int, noise: float) -> Result:
        """Of a run, made if it is not there."""
        key = {"variant": variant, "factor": round(factor, 6), "seed": seed, "noise": noise}
        for found in self.results:
            if all(found[name] == value for name, value in key.items()):
                return found
        own = (*VARIANTS[variant][0], f"optimizer.matrix_lr_scale={factor}", f"seed={seed}")
        config = load_config(self.config, [*self.overrides, *own])
        if seed not in self._data:
            self._data[seed] = open_data(config.data, config.train, config.seed, config.model.vocab_size)
        made = key | train(config, self._data[seed], noise, self.size)
        self.results.append(made)
        with (self.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")
        print({name: value for name, value in made.items() if name != "curve"}, file=sys.stderr, flush=True)
        return made

    def best_factor(self, variant: str, seed: int) -> float:
        """Swept with one seed."""
        factors = list(VARIANTS[variant][1])
        for _ in range(4):
            losses = [self._loss(variant, factor, seed) for factor in factors]
            best = losses.index(min(losses))
            if 0 < best < len(factors) - 1:
                break
            wider = factors[0] / STEP_OF_GRID if best == 0 else factors[-1] * STEP_OF_GRID
            factors = [wider, *factors] if best == 0 else [*factors, wider]
        losses = [self._loss(variant, factor, seed) for factor in factors]
        return factors[losses.index(min(losses))]

    def _loss(self, variant: str, factor: float, seed: int) -> float:
        return _infinite(self.result(variant, factor, seed, 0.0)["loss"])

    def run(self, variants: Sequence[str], seeds: Sequence[int], factors: Mapping[str, float] | None = None) -> None:
        """All of them; the comparison without noise first. factors: the best ones, where they are known."""
        best = factors or {variant: self.best_factor(variant, seeds[0]) for variant in variants}
        for noise in dict.fromkeys((0.0, self.noise)):
            for seed in seeds:
                for variant in variants:
                    self.result(variant, best[variant], seed, noise)


def swept(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By rule its runs with the first seed and without noise, from the smallest factor on."""
    first = results[0]["seed"] if results else 0
    clean = [row for row in results if row["noise"] == 0.0 and row["seed"] == first]
    names = dict.fromkeys(row["variant"] for row in results)
    return {name: sorted((r for r in clean if r["variant"] == name), key=lambda r: r["factor"]) for name in names}


def best_factors(results: Sequence[Result]) -> dict[str, float]:
    """By rule the factor with the least held-out loss."""
    losses = {name: [(_infinite(row["loss"]), row["factor"]) for row in rows] for name, rows in swept(results).items()}
    return {name: min(found)[1] for name, found in losses.items()}


def _infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def compared(results: Sequence[Result]) -> Iterator[tuple[str, float, float, list[Result]]]:
    """Rule, factor, noise, and a run for each seed."""
    for variant, factor in best_factors(results).items():
        for noise in dict.fromkeys(row["noise"] for row in results):
            rows = [r for r in results if (r["variant"], r["factor"], r["noise"]) == (variant, factor, noise)]
            if rows:
                yield variant, factor, noise, rows


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """The sweep, and the comparison at the best factors; ± is the standard deviation over seeds (n - 1)."""
    sweep = Table("rule", "factor", "held-out loss, first seed", title="Sweep")
    for variant, rows in swept(results).items():
        for row in rows:
            sweep.add_row(variant, f"{row['factor']:g}", "diverged" if row["loss"] is None else f"{row['loss']:.4f}")
    yield sweep
    table = Table("rule", "factor", "noise", "seeds", "held-out loss", "by seed", "word_ppl", "CPU ms per step")
    for variant, factor, noise, rows in compared(results):
        losses = [row["loss"] for row in rows]
        each = " ".join("diverged" if loss is None else f"{loss:.3f}" for loss in losses)
        speed = statistics.median(1e3 * row["seconds"] / row["steps"] for row in rows)
        words = mean_and_spread([row.get("word_ppl") for row in rows], 0)
        cells = (f"{factor:g}", f"{noise:g}", str(len(rows)), mean_and_spread(losses, 4), each, words, f"{speed:.0f}")
        table.add_row(variant, *cells)
    yield table


def mean_and_spread(values: Sequence[float | None], digits: int) -> str:
    """± the standard deviation; what is None has no mean."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "some diverged" if there else "-"
    spread = f" ± {statistics.stdev(there):,.{digits}f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):,.{digits}f}{spread}"


def plot(results: Sequence[Result], file: Path) -> None:
    """The curves of training losses at the best factors, means over the seeds: without noise, and with it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = list(dict.fromkeys(row["noise"] for row in results))
    figure, panels = pyplot.subplots(1, len(levels), figsize=(6 * len(levels), 4.5), sharey=True, squeeze=False)
    for variant, _, noise, rows in compared(results):
        whole = [row["curve"] for row in rows if row["loss"] is not None]
        if whole:
            mean = np.mean(whole, axis=0)
            share = (np.arange(len(mean)) + 0.5) / len(mean)
            panels[0][levels.index(noise)].plot(share * rows[0]["steps"], mean, label=variant, linewidth=1.2)
    for noise, axes in zip(levels, panels[0], strict=True):
        axes.set(xlabel="step", title=f"noise in {noise:.0%} of the batches" if noise else "without noise")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("training loss, nats per token")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0; 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m scripts.optimizers", description=str(__doc__).splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value, for all runs")
    parser.add_argument("--rules", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise", type=float, default=0.2, help="share of batches (default: %(default)s)")
    parser.add_argument("--noise-size", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factors-of", type=Path, help="the folder of an earlier study: its best factors, no sweep")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--plot", type=Path, help="draw the curves of training losses into this file (.png, .svg)")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        torch.set_num_threads(1)
        chosen.out.mkdir(parents=True, exist_ok=True)
        study = Study(chosen.config, chosen.overrides, chosen.out, chosen.noise, chosen.noise_size)
        factors = None
        if chosen.factors_of is not None:
            known = best_factors(read_results(chosen.factors_of))
            if missing := [rule for rule in chosen.rules if rule not in known]:
                raise UserError(f"{chosen.factors_of} has no runs of {', '.join(missing)}: leave out --factors-of")
            factors = {rule: known[rule] for rule in chosen.rules}
        if not chosen.show:
            study.run(chosen.rules, chosen.seeds, factors)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in tables(study.results):
        Console(width=max(130, Console().width)).print(table)
    if chosen.plot is not None:
        plot(study.results, chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
