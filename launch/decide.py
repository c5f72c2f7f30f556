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

    cancelled: bool = False
    """`hope launch cancel` was said of this submission: that stands, whatever else stops the run at the same time."""

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

    no_space: bool = False
    """Nothing can be written into the run directory; whatever else is seen follows from that."""

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

    what Slurm has decided stands; a finished run is finished; a cancelled one stays cancelled; what the supervisor
    asked for leads to a requeue (or to the next job of the chain); a stop that somebody else asked for is a stop; wrong
    input, and a loss that is not finite, would be the same the next time; everything else is a failure, requeued a
    bounded number of times and only if a checkpoint was made since the failure before.
    """
    if evidence.job_state == "CANCELLED":
        return Decision("leave", "cancelled", 130)
    if evidence.stopped == "completed":
        return Decision("finish", "completed")
    if evidence.cancelled:
        saved = evidence.stopped == "signal"
        return Decision("finish", "stopped on request (cancelled)" if saved else "cancelled", 0 if saved else 130)
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
    if evidence.first_code == WRONG_INPUT and evidence.stopped != "error" and not evidence.no_space:
        return Decision("finish", f"wrong input ({evidence.detail or 'the log says what'})", WRONG_INPUT)
    return _failure(evidence, max_failures, disk_full_delay_s)


def _failure(evidence: Evidence, max_failures: int, disk_full_delay_s: int) -> Decision:
    delay, unhealthy = 0, evidence.unhealthy
    if evidence.no_space:
        what, delay, unhealthy = "no space left in the run directory", max(disk_full_delay_s, 1), ()
    elif unhealthy:
        what = f"nodes not healthy: {', '.join(unhealthy)}"
    elif evidence.hung is not None:
        what = f"hang in phase {evidence.hung}"
    elif evidence.stopped == "error" and evidence.first_code == WRONG_INPUT:
        what, delay = f"a save failed ({evidence.detail})", max(disk_full_delay_s, 1)
    elif evidence.job_state == "TIMEOUT":
        what = "time limit, and the save was not done in time: raise survive.lead_s"
    elif evidence.asked is not None:
        what = f"{evidence.asked}, and the run ended without saving (exit code {evidence.exit_code})"
    else:
        what = f"crash (exit code {evidence.exit_code})" + (f": {evidence.detail}" if evidence.detail else "")
    # Neither a sick node nor a full disk is the run's own fault: those are bounded by their number alone.
    ours = not unhealthy and not delay
    if ours and evidence.failures and evidence.failures[-1].step == evidence.step:
        why = f"{what}; nothing advanced since the failure before (step {evidence.step}): not requeued"
        return Decision("finish", why, 1, failure=True)
    count = sum(evidence.time - earlier.time < WINDOW_S for earlier in evidence.failures) + 1
    if count > max_failures:
        return Decision("finish", f"{what}; failure {count} within a day: not requeued", 1, failure=True)
    return Decision("requeue", what, 1, failure=True, exclude=unhealthy, delay_s=delay)


def cancel_asked(events: Sequence[dict[str, Any]]) -> bool:
    """Whether `hope launch cancel` was said since the run was submitted last, from the log of events."""
    last = next((event["event"] for event in reversed(events) if event["event"] in ("submitted", "cancelled")), None)
    return last == "cancelled"


def failures_before(events: Sequence[dict[str, Any]]) -> tuple[Failure, ...]:
    """The starts of a run that failed since it was submitted last, from the log of events."""
    found: list[Failure] = []
    for event in events:
        if event["event"] == "submitted":
            found = []
        elif event["event"] == "ended" and event.get("failure"):
            found.append(Failure(int(event["step"]), float(event["time"])))
    return tuple(found)
