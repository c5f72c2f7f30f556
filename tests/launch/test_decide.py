"""What becomes of a job: every rule, and which comes first."""

from __future__ import annotations

import itertools

import pytest

from launch.decide import WINDOW_S, Evidence, Failure, cancel_asked, decide, failures_before

CRASH = Evidence(exit_code=1, first_code=1, step=10, time=1e6)


@pytest.mark.parametrize(
    ("evidence", "action", "said"),
    [
        (Evidence(job_state="CANCELLED", terminated=True), "leave", "cancelled"),
        (Evidence(job_state="CANCELLED", asked="time limit", stopped="signal"), "leave", "cancelled"),
        (Evidence(stopped="completed"), "finish", "completed"),
        (Evidence(stopped="completed", preempted=True, terminated=True), "finish", "completed"),
        (Evidence(preempted=True, terminated=True, stopped="signal", asked="preempted"), "wait", "preempted"),
        (Evidence(preempted=True, exit_code=1), "wait", "preempted"),
        (Evidence(job_state="REQUEUED", terminated=True), "leave", "ended by Slurm"),
        (Evidence(job_state="NODE_FAIL", terminated=True), "leave", "ended by Slurm"),
        (Evidence(asked="time limit", stopped="signal"), "requeue", "time limit"),
        (Evidence(job_state="TIMEOUT", terminated=True, asked="time limit", stopped="signal"), "requeue", "time limit"),
        (
            Evidence(job_state="TIMEOUT", terminated=True, asked="time limit", exit_code=9),
            "requeue",
            "not done in time",
        ),
        (Evidence(cancelled=True, asked="time limit", stopped="signal"), "finish", "stopped on request (cancelled)"),
        (Evidence(cancelled=True, preempted=True, terminated=True, stopped="signal"), "finish", "cancelled"),
        (Evidence(cancelled=True, hung="step"), "finish", "cancelled"),
        (Evidence(cancelled=True, job_state="COMPLETING", terminated=True), "finish", "cancelled"),
        (Evidence(asked="time limit", exit_code=1), "requeue", "without saving"),
        (Evidence(stopped="signal", detail="STOP file"), "finish", "STOP file"),
        (Evidence(terminated=True, exit_code=1), "finish", "SIGTERM"),
        (Evidence(stopped="nan", first_code=3), "finish", "not finite"),
        (Evidence(first_code=2, exit_code=1), "finish", "wrong input"),
        (Evidence(first_code=2, exit_code=1, detail="no file x"), "finish", "wrong input (no file x)"),
        (Evidence(stopped="error", first_code=2, detail="No space left"), "requeue", "No space left"),
        (Evidence(stopped="error", first_code=1, detail="KeyError: x"), "requeue", "KeyError"),
        (Evidence(hung="step"), "requeue", "hang in phase step"),
        (Evidence(unhealthy=("n2",)), "requeue", "n2"),
        (Evidence(exit_code=137), "requeue", "137"),
    ],
)
def test_rules(evidence: Evidence, action: str, said: str) -> None:
    decision = decide(evidence, max_failures=3)
    assert decision.action == action
    assert said in decision.reason


def test_nothing_is_requeued_that_is_cancelled_or_finished() -> None:
    """Over the product of everything else that may have happened at the same time."""
    for preempted, terminated, asked, hung, code in itertools.product(
        (False, True), (False, True), (None, "time limit"), (None, "step"), (0, 1, 2)
    ):
        more = {"preempted": preempted, "terminated": terminated, "asked": asked, "hung": hung, "first_code": code}
        for stopped in (None, "signal", "nan", "error", "completed"):
            cancelled = Evidence(job_state="CANCELLED", stopped=stopped, **more)  # type: ignore[arg-type]
            assert decide(cancelled, 3).action == "leave"
            assert decide(Evidence(cancelled=True, stopped=stopped, **more), 3).action == "finish"  # type: ignore[arg-type]
        done = Evidence(stopped="completed", **more)  # type: ignore[arg-type]
        assert decide(done, 3).action == "finish"


def test_a_chain_s_next_job_goes_on_instead_of_a_requeue() -> None:
    decision = decide(Evidence(asked="time limit", stopped="signal"), 3, chain=True)
    assert (decision.action, decision.code) == ("finish", 0)


def test_a_crash_is_requeued_unless_nothing_advanced_since_the_one_before() -> None:
    assert decide(CRASH, 3).action == "requeue"
    ahead = Evidence(**vars(CRASH) | {"failures": (Failure(5, 1e6 - 60),)})
    assert decide(ahead, 3).action == "requeue"
    same = Evidence(**vars(CRASH) | {"failures": (Failure(10, 1e6 - 60),)})
    assert decide(same, 3).action == "finish"
    assert "nothing advanced" in decide(same, 3).reason
    assert decide(same, 3).failure


def test_crashes_are_bounded_within_a_day() -> None:
    recent = tuple(Failure(step, 1e6 - 60) for step in (1, 2, 3))
    assert decide(Evidence(**vars(CRASH) | {"failures": recent}), 3).action == "finish"
    assert decide(Evidence(**vars(CRASH) | {"failures": recent}), 4).action == "requeue"
    old = tuple(Failure(step, 1e6 - WINDOW_S - 1) for step in (1, 2, 3))
    assert decide(Evidence(**vars(CRASH) | {"failures": old}), 3).action == "requeue"
    assert decide(CRASH, 0).action == "finish"


@pytest.mark.parametrize(
    "evidence",
    [Evidence(unhealthy=("n2",), step=10), Evidence(stopped="error", first_code=2, detail="No space left", step=10)],
    ids=["sick node", "full disk"],
)
def test_what_is_not_the_run_s_fault_may_happen_again_at_the_same_step(evidence: Evidence) -> None:
    once = Evidence(**vars(evidence) | {"failures": (Failure(10, 0.0),)})
    assert decide(once, 3).action == "requeue"
    often = Evidence(**vars(evidence) | {"failures": (Failure(10, 0.0),) * 3})
    assert decide(often, 3).action == "finish"


def test_sick_nodes_are_left_out_and_a_full_disk_is_given_time() -> None:
    assert decide(Evidence(unhealthy=("n2", "n5")), 3).exclude == ("n2", "n5")
    full = Evidence(stopped="error", first_code=2, detail="No space left")
    assert decide(full, 3, disk_full_delay_s=300).delay_s == 300


def test_a_cancellation_stands_until_the_run_is_submitted_again() -> None:
    events = [{"event": "submitted"}, {"event": "started"}]
    assert not cancel_asked(events)
    events += [{"event": "cancelled"}, {"event": "ended"}]
    assert cancel_asked(events)
    assert not cancel_asked([*events, {"event": "submitted"}])


def test_failures_count_from_the_last_submission() -> None:
    events = [
        {"event": "submitted", "time": 0.0},
        {"event": "ended", "time": 1.0, "failure": True, "step": 4},
        {"event": "submitted", "time": 2.0},
        {"event": "ended", "time": 3.0, "failure": True, "step": 8},
        {"event": "ended", "time": 4.0, "failure": False, "step": 9},
        {"event": "ended", "time": 5.0, "failure": True, "step": 12},
    ]
    assert failures_before(events) == (Failure(8, 3.0), Failure(12, 5.0))
