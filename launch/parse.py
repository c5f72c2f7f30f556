"""What Slurm's programs print, as plain values: `scontrol -o`, `squeue -o`, `sacct -P`, and the JSON of any version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hope_train.errors import UserError

NOTHING = {"", "(null)", "N/A", "None", "none", "Unknown", "UNKNOWN", "NONE", "INVALID"}
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "RESIZING", "STAGE_OUT"}

QUEUE_FORMAT = "%A|%F|%K|%T|%P|%D|%N|%l|%S|%e|%E|%r|%j"
"""For `squeue -h -o`. The name is last: it may hold anything."""

ACCOUNT_FORMAT = "JobIDRaw,State,ExitCode,Start,End,NNodes,NodeList"
"""For `sacct -n -P -D -X -o`. Fields that every version knows: one that is unknown has sacct refuse them all."""


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it; None where it does not say."""

    id: str
    state: str
    name: str = ""
    reason: str | None = None
    partition: str | None = None
    nodes: int = 0
    node_list: str | None = None
    restarts: int = 0
    limit_s: int | None = None
    start: float | None = None
    """Seconds since 1970; of a job that waits: when Slurm expects it to start."""

    end: float | None = None
    """Of a running job: when its time is up."""

    preempted: bool = False
    """Its nodes are wanted by another job: it has been told, and will be requeued or killed."""

    array: str | None = None
    """`<job>_<task>` for a task of an array."""

    dependency: str | None = None
    comment: str | None = None
    exit_code: str | None = None

    @property
    def handle(self) -> str:
        """What to call it by in an order. A task's own number may be its array's too, and then means all tasks."""
        return self.array or self.id

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def records(text: str) -> list[dict[str, str]]:
    """The lines of `scontrol -o show …` as mappings. Values may hold spaces and equal signs."""
    found = []
    for line in text.splitlines():
        parts = re.split(r"(?:^|\s+)([A-Z][A-Za-z0-9_/:.\-]*)=", line.strip())
        if len(parts) > 2:
            found.append({key: value.strip() for key, value in zip(parts[1::2], parts[2::2], strict=True)})
    return found


def job_of_record(record: Mapping[str, str]) -> Job:
    """A job in `scontrol -o show job`."""
    task = value(record.get("ArrayTaskId"))
    array = record.get("ArrayJobId")
    return Job(
        id=record["JobId"],
        state=state(record.get("JobState", "")),
        name=record.get("JobName", ""),
        reason=value(record.get("Reason")),
        partition=value(record.get("Partition")),
        nodes=int(re.match(r"\d*", record.get("NumNodes", ""))[0] or 0),  # type: ignore[index]
        node_list=value(record.get("NodeList")),
        restarts=int(record.get("Restarts", "0")),
        limit_s=duration(record.get("TimeLimit", "")),
        start=moment(record.get("StartTime")),
        end=moment(record.get("EndTime")),
        preempted=value(record.get("PreemptTime")) is not None,
        array=f"{array}_{task}" if array and task else None,
        dependency=value(record.get("Dependency")),
        comment=value(record.get("Comment")),
        exit_code=value(record.get("ExitCode")),
    )


def queue_jobs(text: str) -> list[Job]:
    """The lines of `squeue -h -o QUEUE_FORMAT`."""
    found = []
    for line in text.splitlines():
        fields = line.split("|", 12)
        if len(fields) < 13:
            continue
        job, array, task, status, partition, nodes, names, limit, start, end, depends, reason, name = fields
        found.append(
            Job(
                id=job,
                state=state(status),
                name=name,
                reason=value(reason),
                partition=value(partition),
                nodes=int(nodes) if nodes.isdigit() else 0,
                node_list=value(names),
                limit_s=duration(limit),
                start=moment(start),
                end=moment(end),
                array=f"{array}_{task}" if value(task) else None,
                dependency=value(depends),
            )
        )
    return found


def account_rows(text: str) -> list[dict[str, str]]:
    """The lines of `sacct -n -P -D -X -o ACCOUNT_FORMAT`: one for every start of a job."""
    names = ACCOUNT_FORMAT.split(",")
    return [dict(zip(names, line.split("|"), strict=False)) for line in text.splitlines() if "|" in line]


def jobs_of_json(text: str) -> list[Job]:
    """Jobs in the output of `squeue --json`, `scontrol show job --json` or `sacct --json`, of any version.

    Raises UserError for what is not JSON, or reports an error.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"Slurm's JSON cannot be read: {error}") from None
    errors = tree.get("errors") or []
    if errors:
        first = errors[0]
        raise UserError(f"Slurm says: {first.get('error') or first.get('description') or first}")
    return [_job_of_tree(item) for item in tree.get("jobs") or []]


def _job_of_tree(tree: Mapping[str, Any]) -> Job:
    """Until 22.05 values stood bare; later numbers are {set, infinite, number} and states are lists; sacct nests."""
    times = tree.get("time") if isinstance(tree.get("time"), Mapping) else {}
    states = tree.get("job_state", tree.get("state"))
    if isinstance(states, Mapping):
        states = states.get("current")
    if isinstance(states, list):
        states = states[0] if states else ""
    reason = tree.get("state_reason")
    if reason is None and isinstance(tree.get("state"), Mapping):
        reason = tree["state"].get("reason")
    limit = plain(tree.get("time_limit", times.get("limit") if times else None))
    task = plain(tree.get("array_task_id", (tree.get("array") or {}).get("task_id")))
    array = plain(tree.get("array_job_id", (tree.get("array") or {}).get("job_id")))
    nodes = plain(tree.get("node_count", tree.get("allocation_nodes")))
    exit_code = tree.get("exit_code")
    if isinstance(exit_code, Mapping):
        exit_code = plain(exit_code.get("return_code", exit_code))
    return Job(
        id=str(plain(tree.get("job_id"))),
        state=state(str(states)),
        name=str(tree.get("name", "")),
        reason=value(reason),
        partition=value(tree.get("partition")),
        nodes=int(nodes or 0),
        node_list=value(str(tree.get("nodes") or "")),
        restarts=int(plain(tree.get("restart_cnt")) or 0),
        limit_s=None if limit is None else int(limit) * 60,
        start=plain(tree.get("start_time", times.get("start") if times else None)) or None,
        end=plain(tree.get("end_time", times.get("end") if times else None)) or None,
        preempted=bool(plain(tree.get("preempt_time"))),
        array=f"{array}_{task}" if array and task is not None else None,
        dependency=value(tree.get("dependency")),
        comment=value(_comment(tree.get("comment"))),
        exit_code=None if exit_code is None else str(exit_code),
    )


def _comment(comment: Any) -> str | None:
    return comment.get("job") if isinstance(comment, Mapping) else comment


def plain(number: Any) -> Any:
    """A number that newer versions wrap as {set, infinite, number}; None where it is not set or has no end."""
    if isinstance(number, Mapping):
        if not number.get("set", True) or number.get("infinite"):
            return None
        return number.get("number")
    return number


def value(text: str | None) -> str | None:
    """None for Slurm's many words for nothing."""
    return None if text is None or text in NOTHING else text


def state(text: str) -> str:
    """`CANCELLED by 1000` is CANCELLED, `RUNNING+` is RUNNING."""
    words = text.split()
    return words[0].rstrip("+*").upper() if words else "UNKNOWN"


def moment(text: str | None) -> float | None:
    """`2026-11-25T09:21:05`, in this machine's time zone, as seconds since 1970."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except ValueError:
        return None


def duration(text: str) -> int | None:
    """Seconds of Slurm's `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`.

    None for UNLIMITED and for what is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *rest = (None if part is None else int(part) for part in match.groups())
    numbers = [number for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def counted(number: int, thing: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def show_duration(seconds: float) -> str:
    """As Slurm writes it: `1-02:03:04`."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def node_names(text: str) -> list[str]:
    """The names in Slurm's `n[1-3,07],gpu-[a,b]-x`, in order."""
    return [name for part in _parts(text) for name in _expand(part)]


def _parts(text: str) -> Iterator[str]:
    depth, part = 0, ""
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield part
            part = ""
        else:
            part += letter
    if part:
        yield part


def _expand(part: str) -> Iterator[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if match is None:
        yield part
        return
    for item in match[2].split(","):
        low, sign, high = item.partition("-")
        numbers = range(int(low), int(high) + 1) if sign and low.isdigit() and high.isdigit() else None
        names = [item] if numbers is None else [f"{number:0{len(low)}d}" for number in numbers]
        for name in names:
            for rest in _expand(match[3]):
                yield match[1] + name + rest
