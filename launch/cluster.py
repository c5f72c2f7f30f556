"""A job of Slurm's, from inside: its nodes, its steps, its own requeue."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hope_train.parallel.slurm import address_of, rendezvous_port
from launch.client import Slurm, SlurmError
from launch.parse import node_names
from launch.places import say
from launch.request import Request
from launch.site import Site

TRIES = 10
"""Of an order to a controller that does not answer."""


class SlurmBackend:
    """The job that this process is in. See `launch.supervise.Backend`."""

    def __init__(self, request: Request, slurm: Slurm | None = None) -> None:
        """Reads SLURM_…; raises KeyError outside a job."""
        self.request, self.slurm = request, slurm or Slurm()
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        # One task of an array has the array's own number: an order that names it so is meant for all of them.
        self.job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.start = f"{os.environ['SLURM_JOB_ID']}.{self.restart}"

    def nodes(self) -> list[str]:
        """In Slurm's order."""
        return node_names(os.environ["SLURM_JOB_NODELIST"])

    def address(self, node: str) -> str:
        """As Slurm knows it."""
        return address_of(node)

    def port(self, attempt: int) -> int:
        """By job, restart and attempt."""
        return rendezvous_port(os.environ, attempt)

    def run(
        self, nodes: Sequence[str], per_node: int, command: Sequence[str], name: str, log: Path
    ) -> subprocess.Popen[bytes]:
        """A job step. Output of srun itself goes to `log`; that of the tasks to where they send it."""
        order = step_order(self.request.site, nodes, per_node, command, name, os.environ.get("SLURM_CPUS_PER_TASK"))
        with log.open("ab") as output:
            return subprocess.Popen(
                order, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def kill(self, step: subprocess.Popen[bytes], name: str) -> None:
        """Through Slurm, which reaches every process of the step; then srun itself."""
        with suppress(SlurmError):
            found = self.slurm.steps(self.job).get(name)
            if found is not None:
                self.slurm.kill_step(found)
        try:
            step.wait(60)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(step.pid, signal.SIGKILL)
            step.wait()

    def state(self) -> tuple[str, bool]:
        """Asked until the controller answers; RUNNING if it never does."""
        for _ in range(TRIES):
            with suppress(SlurmError):
                job = self.slurm.job(self.job)
                if job is None:
                    return "CANCELLED", False
                if job.restarts > self.restart:
                    return "REQUEUED", job.preempted  # it waits for its next start, or has it
                # A job that is being ended is COMPLETING, whatever ends it.
                late = job.reason == "TimeLimit" and job.state != "RUNNING"
                return "TIMEOUT" if late else job.state, job.preempted
            time.sleep(3)
        return "RUNNING", False

    def ends(self) -> float | None:
        """By the job's time limit."""
        with suppress(SlurmError):
            job = self.slurm.job(self.job)
            return None if job is None or job.limit_s is None else job.end
        return None

    def requeue(self, exclude: Sequence[str], delay_s: int) -> None:
        """Back into the queue. A job can be kept from nodes only while it waits, so that comes after; Slurm ends this
        process soon, and leaves it time for that.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if not self._insist(lambda: self.slurm.requeue(self.job)):
            self.request.places.note("not requeued", start=self.start)
            say("the job could not be requeued: hope launch resubmit goes on with the run")
            return
        fields: dict[str, str] = {}
        if exclude:
            already = self.request.site.exclude
            fields["ExcNodeList"] = ",".join([*exclude, *([already] if already else [])])
        if delay_s:
            fields["StartTime"] = f"now+{delay_s}"
        if fields:
            self._insist(lambda: self.slurm.update(self.job, **fields))

    def wait_for_slurm(self) -> None:
        """Ending by ourselves now would end the job as completed."""
        time.sleep(3600)

    def _insist(self, order: Callable[[], None]) -> bool:
        for attempt in range(TRIES):
            try:
                order()
                return True
            except SlurmError as error:
                say(f"{error} (attempt {attempt + 1})")
                time.sleep(1)
        return False


def step_order(
    site: Site, nodes: Sequence[str], per_node: int, command: Sequence[str], name: str, cpus_per_node: str | None
) -> list[str]:
    """The command line of a job step, inside the site's container where that is the ranks'.

    cpus_per_node: what the job was given; srun does not take that over by itself.
    """
    order = [
        "srun",
        f"--job-name={name}",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * per_node}",
        f"--ntasks-per-node={per_node}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--overlap",
        *([f"--cpus-per-task={max(int(cpus_per_node) // per_node, 1)}"] if cpus_per_node else []),
        *site.srun_extra,
    ]
    if site.container is None or name == "hope-stacks":
        return [*order, *command]
    container = site.container
    if container.runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        return [*order, f"--container-image={container.image}", *mounts, *command]
    binds = [part for mount in container.mounts for part in ("--bind", mount)]
    return [*order, "apptainer", "exec", "--nv", *binds, container.image, *command]
