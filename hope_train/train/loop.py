"""The story of a run, from top to bottom: evaluate, then step after step, saving and measuring, until it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from hope_train.levels.report import StepReport
from hope_train.train.evaluation import evaluate, evaluation_is_due, is_evaluated
from hope_train.train.heartbeat import beat
from hope_train.train.metrics import Row, peak_memory_bytes
from hope_train.train.saving import (
    check_background_save,
    check_ownership,
    finish_background_save,
    is_overdue,
    save,
    write_line,
)
from hope_train.train.session import Session
from hope_train.train.signals import StopRequest
from hope_train.train.step import optimizer_step
from hope_train.train.streaming import data_failure, data_metrics


@dataclass(frozen=True)
class Outcome:
    """Why the loop ended: `completed`, `signal`, `nan` or `error` (no more data), and more about it."""

    reason: str
    detail: str | None = None


def train(run: Session, stop: StopRequest) -> Outcome:
    """Train to the end of the run, or until a stop is asked for or the loss stays not finite.

    Raises:
        SaveError: the last save failed; the checkpoints before it are whole.
        FencedError: another process has taken the run over.
    """
    config, progress = run.config, run.progress
    run.display.say(run.evaluator.sources())
    run.display.start(progress.step, run.total_steps)
    run.clock.lap()
    run.model.train()
    save_is_due = is_overdue(progress, config.checkpoint.every)
    logged = progress.tokens
    if progress.step > 0 and run.writer.last_step is None:
        save(run)  # gone on from a checkpoint of elsewhere: from here on this directory is enough
    if evaluation_is_due(run) and not is_evaluated(run, "validation"):
        evaluate(run, stop, "validation")

    while progress.step < run.total_steps:
        beat("step", progress.step)
        run.still_ours()
        if (asked := stop.asked_by_any(run.engine.mesh.team)) is not None:
            save(run, last=True)
            stop.obeyed()
            return Outcome("signal", asked)

        index = progress.step
        wanted = (index + 1) % config.train.log_every == 0 or index + 1 == run.total_steps
        if (failure := data_failure(run.data.train, run.engine.mesh, index)) is not None:
            save(run, last=True)
            return Outcome("error", failure)
        loss, report, bad_rows = take_step(run, index, measure=wanted)
        progress.step += 1
        progress.tokens += config.train.tokens_in(index)
        if report.applied:
            progress.losses["train"] = loss

        if wanted or not report.applied:
            row = metrics_row(run, loss, report, progress.tokens - logged)
            logged = progress.tokens
            if not report.applied:
                row["refused"] = {"batch": index, "windows": bad_rows}
            check_ownership(run)
            write_line(run, run.metrics, row)
            run.loggers.log(row)
            run.display.step(row, run.total_steps)

        if report.applied:
            progress.refused = 0
        else:
            progress.refused += 1
            what = f"step {progress.step} is not applied (loss {loss}, gradient norm {report.grad_norm})"
            run.display.say(f"warning: {what}: batch {index}, windows {_shown(bad_rows)} of the training text")
            if progress.refused >= config.train.nan_patience:
                finish_background_save(run)
                first = progress.step - progress.refused
                return Outcome("nan", f"{progress.refused} steps in a row were not finite: batches {first} to {index}")

        check_background_save(run)
        save_is_due |= config.checkpoint.every > 0 and progress.step % config.checkpoint.every == 0
        # Weights that only give NaN must not drive out the last good checkpoint: the save waits for a good step.
        if save_is_due and report.applied and progress.step < run.total_steps:
            save_is_due = False
            save(run, scheduled=True)
        if evaluation_is_due(run) and progress.step < run.total_steps:
            evaluate(run, stop, "validation")

    # A longer run saves here too, if the schedule says so.
    save(run, last=True, scheduled=save_is_due and not progress.refused)
    if progress.refused:  # the weights are those of the last good step, and what came after it may be the model's end
        few = "the last step was" if progress.refused == 1 else f"the last {progress.refused} steps were"
        return Outcome("nan", f"{few} not finite: batches {progress.step - progress.refused} to {progress.step - 1}")
    for split in ("validation", "test") if config.eval.test_at_end else ("validation",):
        if not is_evaluated(run, split) and not evaluate(run, stop, split):
            stop_reason = stop.asked()  # an evaluation is cut short in a run of one process only
            stop.obeyed()
            return Outcome("signal", stop_reason)
    return Outcome("completed")


def take_step(run: Session, index: int, measure: bool) -> tuple[float, StepReport, list[int]]:
    """One optimizer step on global batch `index`.

    Returns the mean loss in nats per scored token, the optimizer's report, and, if the step was refused, the windows
    of the training text that are to blame.
    """
    return optimizer_step(run.engine, run.data.train, run.config.train, index, measure)


def metrics_row(run: Session, loss: float, report: StepReport, tokens: int) -> Row:
    """A line of metrics.jsonl; `tokens` were trained on since the last one."""
    train = run.config.train
    grows = {"batch_tokens": train.tokens_in(run.progress.step - 1)} if len(train.batches.sizes) > 1 else {}
    return {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        **grows,
        "loss": loss if np.isfinite(loss) else None,
        **report.metrics(),
        **data_metrics(run.data.train, run.engine.mesh),
        "tokens_per_s": tokens / max(run.clock.lap(), 1e-9),
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "time": time.time(),
    }


def _shown(windows: list[int]) -> str:
    text = ", ".join(map(str, windows[:8]))
    return text if len(windows) <= 8 else f"{text}, … ({len(windows)})"
