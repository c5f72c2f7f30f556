"""Slurm's output as plain values: lines of 22.05.8 as recorded, and the JSON shapes of old and new versions."""

from __future__ import annotations

import json

import pytest

from hope_train.errors import UserError
from launch.parse import (
    account_rows,
    duration,
    job_of_record,
    jobs_of_json,
    moment,
    node_names,
    queue_jobs,
    records,
    show_duration,
    state,
)

# `scontrol -o show job` of 22.05.8, a task of an array that was requeued and waits; shortened.
JOB = (
    "JobId=12 ArrayJobId=11 ArrayTaskId=3 JobName=hope-a b=c UserId=root(0) Priority=4294901759 Nice=0 Account=(null) "
    "QOS=(null) JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:00:03 TimeLimit=1-00:10:00 TimeMin=N/A SubmitTime=2026-11-25T09:21:05 "
    "StartTime=2026-11-25T09:21:06 EndTime=Unknown PreemptTime=None Partition=train NodeList=(null) NumNodes=2-4 "
    "NumCPUs=2 Comment=hope:/data/a=b Command=/data/a.sh Power="
)


def test_a_job_of_scontrol() -> None:
    (record,) = records(JOB + "\n")
    job = job_of_record(record)
    assert (job.id, job.array, job.name) == ("12", "11_3", "hope-a b=c")
    assert (job.state, job.reason, job.restarts, job.nodes, job.node_list) == ("PENDING", "BeginTime", 2, 2, None)
    assert (job.limit_s, job.end, job.preempted, job.comment) == (87000, None, False, "hope:/data/a=b")
    assert job.start == moment("2026-11-25T09:21:06")
    assert job.active


def test_a_preempted_job_says_so() -> None:
    (record,) = records(JOB.replace("PreemptTime=None", "PreemptTime=2026-11-25T09:22:00"))
    assert job_of_record(record).preempted


def test_values_may_hold_spaces_and_signs() -> None:
    (record,) = records("NodeName=n1 OS=Linux 6.1 #1 SMP State=DOWN* Reason=Not responding [slurm@2026-11-25T09:00:00]")
    assert record["OS"] == "Linux 6.1 #1 SMP"
    assert record["Reason"] == "Not responding [slurm@2026-11-25T09:00:00]"


def test_lines_of_squeue() -> None:
    text = (
        "7|7|N/A|RUNNING|train|2|n[1-2]|30:00|2026-11-25T09:00:00|2026-11-25T09:30:00|(null)|None|a|b\n"
        "9|8|1|PENDING|train|1||UNLIMITED|N/A|N/A|afterok:7|Dependency|c\nbroken\n"
    )
    one, two = queue_jobs(text)
    assert (one.id, one.array, one.name, one.node_list, one.limit_s) == ("7", None, "a|b", "n[1-2]", 1800)
    assert (two.array, two.limit_s, two.start, two.dependency, two.reason) == (
        "8_1",
        None,
        None,
        "afterok:7",
        "Dependency",
    )


def test_rows_of_the_accounting() -> None:
    (row,) = account_rows("12|FAILED|1:0|2026-11-25T09:00:00|2026-11-25T09:10:00|2|n[1-2]\n")
    assert (row["State"], row["ExitCode"], row["NodeList"]) == ("FAILED", "1:0", "n[1-2]")


OLD = {  # 22.05 (data parser 0.0.38): bare values
    "job_id": 1,
    "job_state": "RUNNING",
    "state_reason": "None",
    "name": "a",
    "partition": "train",
    "node_count": 2,
    "nodes": "n[1-2]",
    "time_limit": 10,
    "start_time": 1795598465,
    "end_time": 1795599065,
    "preempt_time": 0,
    "restart_cnt": 1,
    "array_job_id": 0,
    "array_task_id": None,
    "comment": "",
    "exit_code": 0,
}


def number(value: int | None) -> dict[str, object]:
    return {"set": value is not None, "infinite": False, "number": value or 0}


NEW = OLD | {  # 23.11 and later: numbers say whether they are set, states are lists
    "job_state": ["RUNNING", "COMPLETING"],
    "node_count": number(2),
    "time_limit": number(10),
    "start_time": number(1795598465),
    "end_time": number(1795599065),
    "preempt_time": number(None),
    "array_job_id": number(0),
    "array_task_id": number(None),
    "exit_code": {"status": ["SUCCESS"], "return_code": number(0)},
}
MIXED = NEW | {"job_state": "RUNNING", "start_time": 1795598465, "end_time": 1795599065, "preempt_time": 0}  # 23.02
ACCOUNTS = {  # `sacct --json`: nested
    "job_id": 1,
    "name": "a",
    "partition": "train",
    "state": {"current": ["RUNNING"], "reason": "None"},
    "allocation_nodes": 2,
    "nodes": "n[1-2]",
    "time": {"limit": number(10), "start": 1795598465, "end": 1795599065},
    "restart_cnt": 1,
    "array": {"job_id": 0, "task_id": number(None)},
    "comment": {"administrator": "", "job": "", "system": ""},
    "exit_code": {"status": "SUCCESS", "return_code": 0},
}


@pytest.mark.parametrize("tree", [OLD, NEW, MIXED, ACCOUNTS], ids=["22.05", "23.11", "23.02", "sacct"])
def test_json_of_all_versions_says_the_same(tree: dict[str, object]) -> None:
    (job,) = jobs_of_json(json.dumps({"errors": [], "jobs": [tree]}))
    assert (job.id, job.state, job.reason, job.partition, job.nodes) == ("1", "RUNNING", None, "train", 2)
    assert (job.limit_s, job.start, job.end, job.restarts) == (600, 1795598465, 1795599065, 1)
    assert (job.preempted, job.array, job.comment, job.exit_code) == (False, None, None, "0")


def test_a_limit_without_end_is_none() -> None:
    tree = NEW | {"time_limit": {"set": False, "infinite": True, "number": 0}}
    assert jobs_of_json(json.dumps({"jobs": [tree]}))[0].limit_s is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("Slurm is down", "cannot be read"), ('{"errors": [{"error": "no such job"}]}', "no such job")],
)
def test_what_is_no_answer_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        jobs_of_json(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-02:03", 93780),
        ("7-00:00:00", 604800),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_durations(text: str, seconds: int | None) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("seconds", [0, 59, 3600, 86399, 86400, 694861])
def test_durations_are_read_as_they_are_written(seconds: int) -> None:
    assert duration(show_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,07],m", ["n1", "n2", "n3", "n07", "m"]),
        ("gpu-[08-10]-a", ["gpu-08-a", "gpu-09-a", "gpu-10-a"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert node_names(text) == names


@pytest.mark.parametrize(("text", "name"), [("CANCELLED by 0", "CANCELLED"), ("RUNNING+", "RUNNING"), ("", "UNKNOWN")])
def test_states(text: str, name: str) -> None:
    assert state(text) == name
