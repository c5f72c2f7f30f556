"""A thin client of Slurm's own programs. Whatever goes wrong is one line that says what to do."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hope_train.errors import UserError
from launch.parse import (
    ACCOUNT_FORMAT,
    QUEUE_FORMAT,
    Job,
    account_rows,
    duration,
    job_of_record,
    jobs_of_json,
    node_names,
    queue_jobs,
    records,
    value,
)

SILENT = ("Unable to contact", "onnection refused", "timed out", "Zero Bytes were transmitted")
"""In what Slurm's programs say when their controller is gone, or hangs."""


@dataclass(frozen=True)
class Partition:
    """Nodes that jobs are sent to by a common name."""

    name: str
    default: bool
    nodes: tuple[str, ...]
    max_nodes: int | None
    max_time_s: int | None
    up: bool


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    name: str
    address: str
    state: str
    gpus: int
    cpus: int
    memory_mib: int
    reason: str | None


class SlurmError(UserError):
    """Slurm refused, or could not be asked."""


class Slurm:
    """Asks and orders. Every call is one run of a program of Slurm's."""

    def __init__(self, timeout_s: float = 60.0, json: bool | None = None) -> None:
        """
        Args:
            timeout_s: how long a program may take before Slurm counts as not answering.
            json: read jobs from Slurm's JSON instead of its plain format. None: if HOPE_SLURM_JSON=1.
        """
        self.timeout_s = timeout_s
        self.json = os.environ.get("HOPE_SLURM_JSON") == "1" if json is None else json

    def call(self, *command: str) -> str:
        """What a program prints. Raises SlurmError."""
        return self._run(command)[0]

    def _run(self, command: Sequence[str]) -> tuple[str, str]:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.timeout_s, check=False, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise SlurmError(
                f"Slurm's {command[0]} is not on this machine's PATH: run this on a login node of the cluster "
                "(`hope launch local` needs no Slurm)"
            ) from None
        except subprocess.TimeoutExpired:
            raise SlurmError(
                f"Slurm does not answer: {command[0]} got nothing in {self.timeout_s:.0f} s; nothing was queued or "
                "changed as far as is known; ask `scontrol ping`, and try again"
            ) from None
        except OSError as error:
            raise SlurmError(f"{command[0]} cannot be run: {error.strerror}") from None
        if done.returncode != 0:
            raise SlurmError(_complaint(command[0], done.stderr or done.stdout))
        return done.stdout, done.stderr

    # Asking

    def job(self, job: str) -> Job | None:
        """A job that the controller still remembers (by default for five minutes after its end)."""
        try:
            if self.json:
                there = jobs_of_json(self.call("squeue", "--json", "--states=all", "-j", job))
                return next((one for one in there if job in (one.id, one.array)), None)
            found = records(self.call("scontrol", "-o", "show", "job", job))
        except SlurmError as error:
            if "nvalid job id" in str(error):
                return None
            raise
        return job_of_record(found[0]) if found else None

    def queue(self, jobs: Sequence[str]) -> list[Job]:
        """Which of these jobs wait or run."""
        if not jobs:
            return []
        try:
            text = self.call("squeue", "-h", "-r", "-t", "all", "-o", QUEUE_FORMAT, "-j", ",".join(jobs))
        except SlurmError as error:
            if "nvalid job id" in str(error):  # one job that is long gone
                return []
            raise
        return [job for job in queue_jobs(text) if job.active]

    def partitions(self) -> list[Partition]:
        """All that this user may see."""
        return [
            Partition(
                name=record["PartitionName"],
                default=record.get("Default") == "YES",
                nodes=tuple(node_names(value(record.get("Nodes")) or "")),
                max_nodes=int(record["MaxNodes"]) if record.get("MaxNodes", "").isdigit() else None,
                max_time_s=duration(record.get("MaxTime", "")),
                up=record.get("State", "UP") == "UP",
            )
            for record in records(self.call("scontrol", "-o", "show", "partition"))
        ]

    def nodes(self, names: str | None = None) -> list[Node]:
        """The nodes of the cluster, or those that Slurm's list `names` names."""
        text = self.call("scontrol", "-o", "show", "node", *([names] if names else []))
        return [
            Node(
                name=record["NodeName"],
                address=record.get("NodeAddr", record["NodeName"]),
                state=record.get("State", ""),
                gpus=_gpus(record.get("Gres", "")),
                cpus=int(record.get("CPUTot", "0")),
                memory_mib=int(record.get("RealMemory", "0")),
                reason=value(record.get("Reason")),
            )
            for record in records(text)
        ]

    def accounts(self, jobs: Sequence[str]) -> list[dict[str, str]]:
        """What the accounting knows of these jobs, one row for each start; nothing where there is no accounting."""
        if not jobs:
            return []
        command = ["sacct", "-n", "-P", "-D", "-X", "-S", "1970-01-01", "-o", ACCOUNT_FORMAT, "-j", ",".join(jobs)]
        try:
            return account_rows(self.call(*command))
        except SlurmError:
            return []

    def steps(self, job: str) -> dict[str, str]:
        """The running steps of a job: {name: `job.step`}."""
        text = self.call("squeue", "-h", "-s", "-j", job, "-o", "%i|%j")
        pairs = [line.split("|", 1) for line in text.splitlines() if "|" in line]
        return {name: step for step, name in pairs}

    # Ordering

    def submit(self, script: str, *options: str) -> str:
        """Queue a script; the job's id. Raises SlurmError with Slurm's own reason."""
        return self.call("sbatch", "--parsable", *options, script).strip().partition(";")[0]

    def test(self, script: str, *options: str) -> str:
        """When and where Slurm would start a script now, in its words; nothing is queued."""
        told = self._run(["sbatch", "--test-only", *options, script])[1]  # it says this on stderr
        return told.strip().splitlines()[-1].removeprefix("sbatch: ")

    def cancel(self, *jobs: str) -> None:
        """End jobs at once; they are not requeued."""
        self.call("scancel", *jobs)

    def signal_script(self, job: str, signal: str) -> None:
        """Signal the batch script alone: a signal to the steps would kill what has to be saved."""
        self.call("scancel", "--batch", "-s", signal, job)

    def kill_step(self, step: str) -> None:
        """End a step without asking it."""
        self.call("scancel", "-s", "KILL", step)

    def requeue(self, job: str) -> None:
        """Put a job back into the queue."""
        self.call("scontrol", "requeue", job)

    def release(self, job: str) -> None:
        """Let a held job run."""
        self.call("scontrol", "release", job)

    def update(self, job: str, **fields: str) -> None:
        """Change a job, as in `ExcNodeList="n3"`."""
        self.call("scontrol", "update", f"JobId={job}", *(f"{key}={text}" for key, text in fields.items()))

    def wait_state(self, job: str, states: set[str], seconds: float) -> Job | None:
        """Wait until a job is in one of these states; the job then, or as it is when the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.job(job)
            if found is None or found.state in states or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


def _gpus(gres: str) -> int:
    """`gpu:h200:8(S:0-1),nvme:1` has 8."""
    total = 0
    for part in gres.split(","):
        fields = part.partition("(")[0].split(":")
        if fields[0] == "gpu":
            total += int(fields[-1]) if fields[-1].isdigit() else 1
    return total


def _complaint(program: str, text: str) -> str:
    """The line of Slurm's that says why, without its prefixes."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix(f"{program}: ").removeprefix("error: ") for line in lines]
    best = [line for line in told if "Batch job submission failed" in line or "allocation failure" in line] or told[-1:]
    if any(sign in line for line in told for sign in SILENT):
        return f"Slurm does not answer: {told[-1]}; nothing was queued or changed; ask `scontrol ping`, and try again"
    return f"Slurm refuses ({program}): {best[0] if best else 'no reason given'}"
