"""What becomes of a job when its ranks have ended: a pure function of what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["finish", "requeue", "wait", "leave"]
"""finish: the job ends. requeue: it goes back to the queue. wait: Slurm is about to requeue it. leave: Slurm has
decided already (cancelled, or requeued after a node was lost)."""

WRONG_INPUT, NOT_FINITE = 2, 3


WINDOW_S = 24 * 3600.0
"""Failures longer ago than this do not count any more."""


@dataclass(frozen=True)
class Failure:
    """A start that failed."""

    step: int
    """Of the newest checkpoint then."""

    time: float


@dataclass(frozen=True)
class Evidence:
    """What is known when the ranks of a start have ended."""

    job_state: str = "RUNNING"
    """Slurm's; `TIMEOUT` while the time limit ends the job, `REQUEUED` once it has been given back to the queue."""

    preempted: bool = False
    """Slurm wants the nodes for another job and will requeue this one."""

    terminated: bool = False
    """The batch script got SIGTERM."""

    asked: str | None = None
    """Why the supervisor asked the run to save and stop (`time limit`, `requeue`); None: it did not."""

    stopped: str | None = None
    """The reason in the STOPPED.json of this start: completed, signal, nan, error; None: it left none."""

    detail: str = ""
    """More about it."""

    exit_code: int = 0
    """Of the step as a whole."""

    first_code: int | None = None
    """Of rank 0; None: it did not live to say."""

    hung: str | None = None
    """The phase in which nothing moved; the supervisor ended the ranks."""

    unhealthy: tuple[str, ...] = ()
    """Nodes that failed their check; nothing was started then."""

    step: int = 0
    """Of the newest checkpoint."""

    failures: tuple[Failure, ...] = ()
    """Those before this one since the job was submitted, the newest last."""

    time: float = 0.0
    """Seconds since 1970."""


@dataclass(frozen=True)
class Decision:
    """What to do, why, and the job's exit code if it ends."""

    action: Action
    reason: str
    code: int = 0
    failure: bool = False
    """It counts against `max_failures`."""

    exclude: tuple[str, ...] = ()
    """Nodes that the next start must not get."""

    delay_s: int = 0


def decide(evidence: Evidence, max_failures: int, chain: bool = False, disk_full_delay_s: int = 0) -> Decision:
    """The rules, the first that applies:

    what Slurm has decided stands; a finished run is finished; what the supervisor asked for leads to a requeue (or to
    the next job of the chain); a stop that somebody else asked for is a stop; wrong input, and a loss that is not
    finite, would be the same the next time; everything else is a failure, requeued a bounded number of times and only
    if a checkpoint was made since the failure before.
    """
    if evidence.job_state == "CANCELLED":
        return Decision("leave", "cancelled", 130)
    if evidence.stopped == "completed":
        return Decision("finish", "completed")
    if evidence.preempted:
        return Decision("wait", "preempted")
    if evidence.terminated and evidence.job_state not in ("RUNNING", "TIMEOUT"):
        return Decision("leave", f"ended by Slurm ({evidence.job_state.lower()})", 1)
    if evidence.asked is not None and evidence.stopped == "signal":
        if chain:
            return Decision("finish", f"{evidence.asked}: the next job of the chain goes on")
        return Decision("requeue", evidence.asked)
    if evidence.stopped == "signal":
        return Decision("finish", f"stopped on request ({evidence.detail})")
    if evidence.terminated and evidence.job_state != "TIMEOUT":
        return Decision("finish", "ended by SIGTERM", 143)
    if evidence.stopped == "nan" or evidence.first_code == NOT_FINITE:
        return Decision("finish", f"the loss is not finite ({evidence.detail})", NOT_FINITE)
    if evidence.first_code == WRONG_INPUT and evidence.stopped != "error":
        return Decision("finish", "wrong input (the log says what)", WRONG_INPUT)
    return _failure(evidence, max_failures, disk_full_delay_s)


def _failure(evidence: Evidence, max_failures: int, disk_full_delay_s: int) -> Decision:
    delay = 0
    if evidence.unhealthy:
        what = f"nodes not healthy: {', '.join(evidence.unhealthy)}"
    elif evidence.hung is not None:
        what = f"hang in phase {evidence.hung}"
    elif evidence.stopped == "error" and evidence.first_code == WRONG_INPUT:
        what, delay = f"a save failed ({evidence.detail})", max(disk_full_delay_s, 1)
    elif evidence.asked is not None:
        what = f"{evidence.asked}, and the run ended without saving (exit code {evidence.exit_code})"
    else:
        what = f"crash (exit code {evidence.exit_code})" + (f": {evidence.detail}" if evidence.detail else "")
    # Neither a sick node nor a full disk is the run's own fault: those are bounded by their number alone.
    ours = not evidence.unhealthy and not delay
    if ours and evidence.failures and evidence.failures[-1].step == evidence.step:
        why = f"{what}; nothing advanced since the failure before (step {evidence.step}): not requeued"
        return Decision("finish", why, 1, failure=True)
    count = sum(evidence.time - earlier.time < WINDOW_S for earlier in evidence.failures) + 1
    if count > max_failures:
        return Decision("finish", f"{what}; failure {count} within a day: not requeued", 1, failure=True)
    return Decision("requeue", what, 1, failure=True, exclude=evidence.unhealthy, delay_s=delay)


def failures_before(events: Sequence[dict[str, Any]]) -> tuple[Failure, ...]:
    """The starts of a run that failed since it was submitted last, from the log of events."""
    found: list[Failure] = []
    for event in events:
        if event["event"] == "submitted":
            found = []
        elif event["event"] == "ended" and event.get("failure"):
            found.append(Failure(int(event["step"]), float(event["time"])))
    return tuple(found)
