"""`hope train`: check, open, train, and say how it went."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hope_train.checkpoint.fence import CLAIM, FencedError, refuse_if_in_use
from hope_train.checkpoint.manifest import CHECKPOINTS, list_checkpoints, step_of
from hope_train.checkpoint.writer import SaveError
from hope_train.config.load import load_config
from hope_train.config.mesh import resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.run_files import pick_device
from hope_train.parallel.engines import check_engine
from hope_train.parallel.mesh import Mesh, close_mesh, open_mesh, process_rank, world_size
from hope_train.parallel.slurm import adopt_step
from hope_train.parallel.team import SharedError, Team, leave_to_first
from hope_train.train import rundir
from hope_train.train.display import Display
from hope_train.train.evaluation import FIGURES
from hope_train.train.heartbeat import beat
from hope_train.train.loop import Outcome, train
from hope_train.train.metrics import strict
from hope_train.train.session import Session, open_session
from hope_train.train.signals import Interrupted, StopRequest

COMPLETED, CRASHED, WRONG_INPUT, NOT_FINITE = 0, 1, 2, 3


def train_command(config: str, overrides: Sequence[str], resume: str, force_config: bool, as_json: bool) -> int:
    """Train by the configuration file `config`, or go on training after a stop.

    Args:
        overrides: `key=value`, laid over the file.
        resume: `auto` (the newest whole checkpoint of the run directory, if it has any), `never` (refuse if it has
            any), or the checkpoint to go on from.
        force_config: go on in a directory, or from a checkpoint, of another configuration.
        as_json: print the summary as JSON on stdout, and everything else on stderr.

    Returns:
        The exit code: 0 completed, or stopped on request after saving; 1 another process has taken the run over; 3
        stopped because the loss was not finite.

    Raises:
        UserError: something is wrong with the input and nothing has been started, or saves fail and the checkpoints
            before them are whole. Of several processes the first raises it, and the others return 2.
    """
    adopt_step(os.environ)
    team = Team(process_rank(), world_size())
    beat("opening", 0)
    try:
        settings = team.alike(lambda: load_config(config, overrides))
        sizes = team.alike(lambda: resolve_mesh(settings, world_size()))
        team.alike(lambda: check_engine(settings, sizes))
        mesh = open_mesh(settings, pick_device(settings.train.device))
        code = train_on(mesh, settings, resume, force_config, as_json)
    except SharedError as error:
        # Ranks that `hope launch` has started wait for the first one themselves.
        return WRONG_INPUT if CLAIM in os.environ else leave_to_first(error)
    close_mesh()
    return code


def train_on(mesh: Mesh, settings: RunConfig, resume: str, force_config: bool, as_json: bool) -> int:
    """`train_command` of every process of the mesh. Raises UserError."""
    leads = mesh.team.leads
    display = Display(settings.log.progress, to_stderr=as_json, silent=not leads)
    run_dir = Path(settings.run_dir).expanduser()
    with StopRequest(run_dir, alone=mesh.team.ranks == 1) as stop:
        try:
            with stop.opening():
                run = mesh.team.alike(lambda: open_session(settings, resume, force_config, display, mesh, stop))
        except FencedError as error:
            display.say(f"stopped: {error}")
            return CRASHED
        except Interrupted:
            summary = stopped_early(settings, str(stop.signal))
            display.say(f"stopped ({summary['detail']}): nothing to save; the same command starts again")
            if as_json:
                display.result(json.dumps(summary, ensure_ascii=False))
            return COMPLETED
        if run is None:
            display.say(f"{run_dir} is complete ({settings.train.total_steps} steps): nothing to do")
            if as_json and leads:
                display.result(json.dumps(rundir.read_stopped(run_dir), ensure_ascii=False))
            return COMPLETED
        if mesh.sizes.world > 1:
            display.say(f"{mesh.sizes.world} processes: {mesh.sizes}")
        try:
            return execute(run, stop, as_json)
        finally:
            run.close()


def stopped_early(settings: RunConfig, signal: str) -> dict[str, Any]:
    """A stop before training began, as a summary. Where the run has been begun earlier and was killed, it is marked."""
    run_dir = Path(settings.run_dir).expanduser()
    there = list_checkpoints(run_dir / CHECKPOINTS)
    step = (step_of(there[-1]) or 0) if there else 0
    newest = f"{CHECKPOINTS}/{there[-1].name}" if there else None
    detail = f"{signal} before training began"
    with suppress(OSError, UserError):
        refuse_if_in_use(run_dir)
        begun = (run_dir / rundir.CONFIG).is_file() and not (run_dir / rundir.STOPPED).exists()
        if begun and not rundir.serious(rundir.differences_from(run_dir, settings)):
            tokens = settings.train.tokens_after(step)
            rundir.write_stopped(run_dir, "signal", step, tokens, checkpoint=newest, detail=detail)
    return {"run": str(run_dir), "reason": "signal", "detail": detail, "step": step, "checkpoint": newest}


def execute(run: Session, stop: StopRequest, as_json: bool = False) -> int:
    """Train an open run, leave the marker that says why it stopped, and print a summary.

    Returns the exit code. Raises UserError on the first process, and returns 2 on the others, if saves fail.
    """
    try:
        try:
            outcome = train(run, stop)
        finally:
            stop.leave()
    except FencedError as error:
        run.display.say(f"stopped: {error}")
        return CRASHED
    except SaveError as error:
        failed = run.writer.failures
        in_a_row = f"; {failed} saves in a row have failed" if failed > 1 else ""
        mark(run, Outcome("error", f"{error}{in_a_row}"))
        run.display.stop()
        if not run.leads:
            return WRONG_INPUT
        newest = _newest(run)
        left = f"the newest whole checkpoint is {newest}" if newest else "there is no checkpoint"
        raise UserError(f"stopped: {error}{in_a_row}; {left}") from None
    except KeyboardInterrupt:
        mark(run, Outcome("signal", "SIGINT twice: aborted without saving"))
        raise
    except BaseException as error:
        with suppress(Exception):
            run.writer.finish()  # a save under way may still become the checkpoint to go on from
        mark(run, Outcome("error", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        if isinstance(error, torch.OutOfMemoryError):
            run.display.say("out of memory: lower train.micro_batch_size, or say train.recompute=true")
        raise
    mark(run, outcome)
    beat("closing", run.progress.step)
    run.display.stop()
    summary = summarise(run, outcome)
    if as_json and run.leads:
        run.display.result(json.dumps(strict(summary), ensure_ascii=False))
    else:
        for line in summary_lines(summary):
            run.display.say(line)
    return {"nan": NOT_FINITE, "error": WRONG_INPUT}.get(outcome.reason, COMPLETED)


def mark(run: Session, outcome: Outcome) -> None:
    """Write STOPPED.json. A disk too full for it is only worth a line: something else is going on already."""
    if not run.leads:
        return
    more = {"checkpoint": _newest(run), "detail": outcome.detail}
    try:
        run.writer.fence.check()
        rundir.write_stopped(run.run_dir, outcome.reason, run.progress.step, run.progress.tokens, **more)
    except (OSError, FencedError) as error:
        run.display.say(f"warning: {rundir.STOPPED} is not written: {error}")


def summarise(run: Session, outcome: Outcome) -> dict[str, Any]:
    """How a run ended, in numbers."""
    losses = run.progress.losses
    return {
        "run": str(run.run_dir),
        "reason": outcome.reason,
        "detail": outcome.detail,
        "step": run.progress.step,
        "total_steps": run.total_steps,
        "tokens": run.progress.tokens,
        "loss": losses.get("train"),
        "evaluation": {name: entry for name, entry in losses.items() if name.split(" ")[0] in FIGURES},
        "refused_steps": run.optimizer.skipped,
        "checkpoint": _newest(run),
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    why = summary["reason"] + (f" ({summary['detail']})" if summary["detail"] else "")
    lines = [f"{why}: step {summary['step']} of {summary['total_steps']}, {summary['tokens']:,} tokens"]
    if summary["loss"] is not None:
        lines[0] += f", loss {summary['loss']:.4f}"
    for name, entry in summary["evaluation"].items():
        lines.append(f"  {name}: last {entry['last']:.4f}, best {entry['best']:.4f}")
    if summary["refused_steps"]:
        lines.append(f"  {summary['refused_steps']} steps were not finite and not applied")
    lines.append(f"  run directory {summary['run']}, newest checkpoint {summary['checkpoint'] or 'none'}")
    if summary["reason"] == "signal":
        lines.append("  the same command goes on from there")
    return lines


def _newest(run: Session) -> str | None:
    """The newest checkpoint known to be whole, relative to the run directory where it is in it."""
    last = run.writer.last
    if last is None:
        return None
    return str(last.relative_to(run.run_dir)) if last.is_relative_to(run.run_dir) else str(last)
