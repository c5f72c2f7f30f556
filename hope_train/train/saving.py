"""What the loop puts on disk: checkpoints and log lines, and what becomes of a full disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hope_train.checkpoint.collected import stacked_bytes
from hope_train.checkpoint.manifest import step_name
from hope_train.checkpoint.own_saves import OwnSaves
from hope_train.checkpoint.spread import run_state
from hope_train.checkpoint.writer import Facts, SaveError, one_line
from hope_train.train import randomness
from hope_train.train.heartbeat import phase
from hope_train.train.metrics import JsonLines, Row
from hope_train.train.session import Progress, Session, data_identity
from hope_train.train.streaming import data_state


def save(run: Session, last: bool = False, scheduled: bool = False) -> None:
    """Save now, unless this very step has been saved. In mid-run a failure is a warning, until patience ends.

    scheduled: every run saves at this step, so that what ranks have collected may be folded: all go on from the same
    sums. Otherwise it is stacked if `checkpoint.stacked_gib` allows, and this run goes on as if it had not saved.

    Raises:
        SaveError: with `last`, or where `checkpoint.patience` saves in a row have failed; older checkpoints are whole.
        FencedError: another process has taken the run over.
    """
    with run.clock.paused(), phase("save", run.progress.step):
        finish_background_save(run)
        if run.writer.last_step == run.progress.step:
            return
        for file in (run.metrics, run.evaluations):
            sync(run, file)
        rows = None if scheduled else rows_to_stack(run)
        if rows is None:
            run.optimizer.fold()
        # Nobody knows of a failure in the background at the same step on all ranks: the try that decides is waited for.
        decisive = last or run.writer.failures + 1 >= run.config.checkpoint.patience
        wait = decisive or run.own_saves is not None
        state = run_state(run.engine, stack=rows is not None)
        try:
            # During a row of refused steps the older checkpoints may be the better ones: none is deleted then.
            run.writer.save(state, facts(run), wait=wait, prune=run.progress.refused == 0, rows=rows)
        except SaveError as error:
            if decisive:
                raise
            warn(run, error)
        finally:
            if rows is None:
                run.optimizer.unfold()
        if run.own_saves is not None and run.writer.last_step == run.progress.step:
            save_own(run, run.own_saves)


def save_own(run: Session, own: OwnSaves) -> None:
    """Let DeepSpeed save beside the checkpoint that has just been published. All ranks wait for it.

    A failure is a warning: the checkpoint is there. Raises FencedError.
    """
    from hope_train.parallel.zero.engine import ZeroEngine

    assert isinstance(run.engine, ZeroEngine)
    engine, step, tokens = run.engine, run.progress.step, run.progress.tokens
    work = own.work(step)
    for leads_alone, action in (
        (True, lambda: own.begin(step)),
        (False, lambda: engine.save_own(work, step_name(step), step, tokens)),
        (True, lambda: own.publish(step)),
    ):
        failure = _failure(run, action) if run.leads or not leads_alone else None
        run.still_ours()
        if (found := next(filter(None, engine.mesh.team.gather(failure)), None)) is not None:
            if run.leads:
                own.discard(step)
            run.display.say(f"warning: DeepSpeed's own save of step {step} failed ({found}); the checkpoint is whole")
            return


def _failure(run: Session, action: Callable[[], None]) -> str | None:
    """Why something could not be written, in a line."""
    try:
        with run.losing():
            action()
    except (OSError, RuntimeError) as error:
        return one_line(error)
    return None


def rows_to_stack(run: Session) -> int | None:
    """How many ranks' accumulators to stack in an unscheduled save; None: sum them, or there is nothing to sum.

    Every rank comes to the same answer.
    """
    ranks, sets = run.engine.collectors, run.optimizer.unfinished_sets()
    if ranks == 1 or not sets:
        return None
    limit = run.config.checkpoint.stacked_gib * 2**30
    return ranks if stacked_bytes(sets, run.config.model, ranks) <= limit else None


def is_overdue(progress: Progress, every: int) -> bool:
    """Whether a scheduled save waits for a step that is applied: one fell into the refused steps up to now."""
    return every > 0 and progress.step // every > (progress.step - progress.refused) // every


def check_background_save(run: Session) -> None:
    """Notice a background save that has failed. Raises FencedError."""
    try:
        with run.losing():
            run.writer.poll()
    except SaveError as error:
        warn(run, error)


def finish_background_save(run: Session) -> None:
    """Wait for the save under way. Raises FencedError, on all ranks if one of them has noticed."""
    try:
        with run.losing():
            run.writer.finish()
    except SaveError as error:
        warn(run, error)
    run.still_ours()


def check_ownership(run: Session) -> None:
    """Raises FencedError when the run is another process's now. A file that cannot be read just now says nothing."""
    if run.engine.mesh.team.leads:
        with suppress(OSError), run.losing():
            run.writer.fence.check()


def warn(run: Session, error: SaveError) -> None:
    """One line about a save in mid-run that failed."""
    newest = run.writer.last.name if run.writer.last is not None else "none"
    run.display.say(f"warning: {error}; training goes on (newest whole checkpoint: {newest})")


def facts(run: Session) -> Facts:
    """What the checkpoint of this moment says besides its tensors."""
    progress = run.progress
    return Facts(
        step=progress.step,
        tokens=progress.tokens,
        config=run.config.model_dump(mode="json"),
        tokenizer=run.data.tokenizer.fingerprint,
        data=data_identity(run.config, run.data),
        losses=dict(progress.losses),
        trainer={
            "random": randomness.capture(),
            "refused": progress.refused,
            "data": data_state(run.data.train, run.engine.mesh, progress.step),
        },
    )


def write_line(run: Session, file: JsonLines, row: Row) -> None:
    """Append to a log. A disk that is full for a while costs no line and no run."""
    if run.lost is not None:
        return
    try:
        file.write(row)
    except OSError as error:
        _warn_of_log(run, file, error)


def sync(run: Session, file: JsonLines) -> None:
    """Bring a log to the disk, so that after a loss of power it is not shorter than the checkpoint."""
    try:
        file.sync()
    except OSError as error:
        _warn_of_log(run, file, error)


def _warn_of_log(run: Session, file: JsonLines, error: OSError) -> None:
    run.display.say(
        f"warning: {file.path.name}: {error.strerror}; its lines are kept and written when that is possible"
    )
