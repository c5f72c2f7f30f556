"""Associative recall: does a tiny Hope store what it reads, and does the same model without writes?

    python -m scripts.recall                 the table of docs/living-memory.md (about 15 CPU minutes)
    python -m scripts.recall --seeds 1 --only mlp --json

A sequence is `k v k v … | filler … | k v k v …`: pairs of a key and a value drawn anew for every sequence, fillers
that say nothing, and every key again in another order, after which its value is to be predicted. Weights cannot know
the pairs, and convolutions (window 4, so 3 tokens back per layer) cannot reach them: only the fast weights can carry
them. Without writes a model with the default static queries sees no other token at all, since the convolution feeds
nothing but the writes; with adaptive queries it still has the convolutions, and is the fairer comparison.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hope_train.config.load import validate
from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from hope_train.model.activity import without_writes
from hope_train.model.hope import HopeModel, build_model
from hope_train.model.loss import IGNORED


@dataclass(frozen=True)
class Task:
    """Sequences of `pairs` key-value pairs, `filler` tokens and as many questions as pairs."""

    pairs: int = 4
    filler: int = 16
    """At least as many tokens lie between a pair and its question."""
    keys: int = 32
    """How many keys there are to draw from (without repetition in a sequence)."""
    values: int = 32
    """How many values there are to draw from: a guess is right once in so many."""

    @property
    def vocab_size(self) -> int:
        """Keys, values, and 16 fillers."""
        return self.keys + self.values + 16

    @property
    def tokens(self) -> int:
        """Length of a sequence as the model reads it (the last answer is only a target)."""
        return 4 * self.pairs + self.filler - 1

    @property
    def chance(self) -> float:
        """Accuracy of a model that remembers nothing."""
        return 1.0 / self.values

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 [B, T]; only answers are scored."""
        key_BP = torch.rand(rows, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        value_BP = torch.randint(self.keys, self.keys + self.values, (rows, self.pairs), generator=generator)
        filler_BF = torch.randint(self.keys + self.values, self.vocab_size, (rows, self.filler), generator=generator)
        order_BP = torch.rand(rows, self.pairs, generator=generator).argsort(1)
        shown = torch.stack((key_BP, value_BP), 2).flatten(1)
        asked = torch.stack((key_BP.gather(1, order_BP), value_BP.gather(1, order_BP)), 2).flatten(1)
        whole = torch.cat((shown, filler_BF, asked), 1)
        targets_BT = whole[:, 1:].clone()
        first = 2 * self.pairs + self.filler
        scored_T = torch.arange(whole.shape[1] - 1)
        targets_BT[:, (scored_T < first) | ((scored_T - first) % 2 == 1)] = IGNORED
        return whole[:, :-1], targets_BT


@dataclass(frozen=True)
class Result:
    """One trained model."""

    name: str
    seed: int
    accuracy: float
    """Share of questions answered right, on sequences not seen in training."""
    accuracy_off: float
    """The same model with its writes switched off after training."""
    loss: float
    """Nats per answer."""
    steps: int
    seconds: float


def run_config(task: Task, memory: dict[str, Any], seed: int, steps: int, rows: int, lr: float) -> RunConfig:
    """Two layers of width 64 with one head, a CMS of two levels of which the second steps every other time."""
    tokens = rows * task.tokens
    return validate(
        RunConfig,
        {
            "seed": seed,
            "model": {
                "d_model": 64,
                "n_layers": 2,
                "n_heads": 1,
                "vocab_size": task.vocab_size,
                "memory": memory,
                "cms": {"levels": [{"width": 64, "period": 1}, {"width": 64, "period": 2}]},
            },
            "data": {"sources": [{"builtin": "python-docs"}]},
            "optimizer": {
                "lr": lr,
                "weight_decay": 0.01,
                "schedule": {"kind": "cosine", "warmup_tokens": tokens * steps // 20, "min_ratio": 0.05},
            },
            "train": {
                "context_length": task.tokens,
                "batch_tokens": tokens,
                "micro_batch_size": rows,
                "tokens": tokens * steps,
            },
        },
    )


def train(
    task: Task, memory: dict[str, Any], seed: int, steps: int, rows: int = 32, lr: float = 3e-3, tell: int = 0
) -> HopeModel:
    """A model trained on fresh sequences for `steps` steps; `tell` prints its accuracy every so many of them."""
    config = run_config(task, memory, seed, steps, rows, lr)
    model = build_model(config.model, seed)
    optimizer = build_optimizer(model.named_parameters(), config)
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    started = time.process_time()
    for step in range(1, steps + 1):
        tokens_BT, targets_BT = task.batch(rows, generator)
        total, count = model.loss(tokens_BT, targets_BT)
        (total / count).backward()
        optimizer.step(tokens=int(count))
        optimizer.zero_grad()
        if tell and step % tell == 0:
            accuracy, loss = measure(model, task, rows=256)
            print(f"  step {step}: {accuracy:.3f} ({loss:.3f} nats), {time.process_time() - started:.0f} s", flush=True)
    return model


@torch.no_grad()
def measure(model: HopeModel, task: Task, rows: int = 1024, seed: int = 7) -> tuple[float, float]:
    """(share of right answers, nats per answer) over `rows` sequences that no training run draws."""
    generator = torch.Generator().manual_seed(seed)
    right, nats, count = 0, 0.0, 0
    for _ in range(0, rows, 64):
        tokens_BT, targets_BT = task.batch(64, generator)
        scored_BT = targets_BT != IGNORED
        logits = model(tokens_BT)[scored_BT]
        right += int((logits.argmax(-1) == targets_BT[scored_BT]).sum())
        nats += float(torch.nn.functional.cross_entropy(logits, targets_BT[scored_BT], reduction="sum"))
        count += int(scored_BT.sum())
    return right / count, nats / count


@dataclass(frozen=True)
class Case:
    """One row of the table: what is trained on what."""

    name: str
    memory: dict[str, Any]
    task: Task = Task()
    steps: int = 500


ADAPTIVE = {"adaptive_q": True}
CASES = (
    Case("mlp", {}),
    Case("mlp, no writes", {"eta_max": 0.0}),
    Case("mlp, adaptive q", ADAPTIVE),
    Case("mlp, adaptive q, no writes", {**ADAPTIVE, "eta_max": 0.0}),
    Case("mlp, chunks of 8", {"chunk_size": 8, "generator_chunk_size": 8}),
    Case("linear", {"kind": "linear"}),
    Case("mlp, 8 pairs", {}, Task(pairs=8), 800),
)


def run(case: Case, seed: int, tell: int = 0) -> Result:
    """Train and measure one model."""
    started = time.process_time()
    model = train(case.task, case.memory, seed, case.steps, tell=tell)
    seconds = time.process_time() - started
    accuracy, loss = measure(model, case.task)
    accuracy_off, _ = measure(without_writes(model), case.task)
    return Result(case.name, seed, accuracy, accuracy_off, loss, case.steps, seconds)


def _row(case: Case, results: Sequence[Result]) -> str:
    trained = " ".join(f"{100 * result.accuracy:.1f}" for result in results)
    off = " ".join(f"{100 * result.accuracy_off:.1f}" for result in results)
    seconds = statistics.mean(result.seconds for result in results)
    cells = (case.name, case.task.pairs, case.steps, trained, off, f"{100 * case.task.chance:.1f}", f"{seconds:.0f}")
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Print the table row by row as models are done."""
    parser = argparse.ArgumentParser(prog="python -m scripts.recall", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these rows alone")
    parser.add_argument("--json", action="store_true", help="one JSON object per model")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [case for case in CASES if chosen.only is None or case.name in chosen.only]
    if not chosen.json:
        print("| memories | pairs | steps | right, % by seed | writes switched off after training | chance | CPU s |")
        print("|---|---|---|---|---|---|---|", flush=True)
    for case in cases:
        results = []
        for seed in range(chosen.seeds):
            results.append(run(case, seed))
            if chosen.json:
                print(json.dumps(asdict(results[-1])), flush=True)
        if not chosen.json:
            print(_row(case, results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
