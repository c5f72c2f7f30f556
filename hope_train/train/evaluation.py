"""Evaluations inside the loop: when, what, and each only once."""

from __future__ import annotations

import math

from hope_train.train.display import evaluation_line
from hope_train.train.heartbeat import phase
from hope_train.train.metrics import Row, rows
from hope_train.train.saving import write_line
from hope_train.train.session import Session
from hope_train.train.signals import Interrupted, StopRequest

FIGURES = ("word_ppl", "heldout_word_ppl", "bits_per_byte", "token_ppl", "classic_ppl", "validation_loss")


def evaluation_is_due(run: Session) -> bool:
    """Whether the loop evaluates at this step: every n steps, step 0 included."""
    every = run.config.eval.every
    return every > 0 and run.progress.step % every == 0


def is_evaluated(run: Session, split: str) -> bool:
    """Whether eval.jsonl has this split at this step already (written before a stop)."""
    step = run.progress.step
    return run.engine.mesh.team.on_first(
        lambda: any(row.get("step") == step and row.get("split") == split for row in rows(run.evaluations.path))
    )


def evaluate(run: Session, stop: StopRequest, split: str) -> bool:
    """Measure the model as it is and log it. False if a stop cut it short: nothing is logged then.

    It leaves no trace in the run's state, so that a run with evaluations equals one without.
    """
    step, tokens = run.progress.step, run.progress.tokens
    try:
        with run.clock.paused(), stop.droppable(), phase("evaluate", step):
            found = run.evaluator.evaluate(run.model, split, step, tokens)
            if split == "validation":
                found += validation_rows(run)
    except Interrupted:
        return False
    for row in found:
        write_line(run, run.evaluations, row)
        run.loggers.log(row)
        run.display.say(evaluation_line(row))
        if split == "validation":
            remember(run, row)
    return True


def validation_rows(run: Session) -> list[Row]:
    """The loss on held-out training text, where there is any."""
    source, limit = run.data.validation, run.config.eval.validation_batches
    if source is None or limit == 0:
        return []
    shares = run.evaluator.shares
    batches = source.validation_batches(run.config.train.micro_batch_size, limit, shares.rank, shares.ranks)
    return [run.evaluator.validation_row(run.model, batches, run.progress.step, run.progress.tokens)]


def remember(run: Session, row: Row) -> None:
    """Keep the last and the best value of each figure, for the checkpoints. Partial and whole figures are apart."""
    suffix = " (partial)" if row.get("partial") else ""
    for name in FIGURES:
        value = row.get(name)
        if isinstance(value, float) and math.isfinite(value):
            best = run.progress.losses.get(name + suffix, {}).get("best", math.inf)
            run.progress.losses[name + suffix] = {"last": value, "best": min(best, value)}
