"""The process that stays with a start of a run, on the job's first node (or this machine): no torch, no model.

It claims the run directory, checks the nodes, starts the ranks, turns signals into a stop file, notices when nothing
moves any more, and decides what becomes of the job. What Slurm is asked to do is in `launch/cluster.py`.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hope_train.checkpoint.fence import claim, claimed_by
from hope_train.errors import UserError
from launch.decide import Decision, Evidence, Failure, cancel_asked, decide, failures_before
from launch.health import sick_nodes, together_problem
from launch.layout import Layout, elastic_layout, fixed_layout
from launch.parse import counted
from launch.places import BY_SUPERVISOR, STOP, Event, forget_stop, read_json, say, write_json
from launch.request import Request, read_request
from launch.watch import Watch

POLL_S = 0.5
ASK_EVERY_S = 60.0
"""Seconds between two questions to Slurm's controller about the time limit."""

EARLY_S = 120.0
"""A signal that comes so long before it should is still the time limit's: Slurm sends it up to a minute early."""

RECORDED = ("SLURM_", "NCCL_", "GLOO_", "CUDA_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "MASTER_", "HOPE_", "PYTHONPATH")
"""Beginnings of the variables that are kept of a start; others may hold secrets."""

LAST_SECONDS = 4.0
"""That a run has to save after its time limit, before it is ended and requeued from an older checkpoint."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Backend(Protocol):
    """Where the ranks run."""

    start: str
    """`<job>.<restart>`."""

    def nodes(self) -> list[str]:
        """The nodes of this start."""

    def address(self, node: str) -> str:
        """Where the others reach it."""

    def port(self, attempt: int) -> int:
        """A port that no other start uses."""

    def run(
        self, nodes: Sequence[str], per_node: int, command: Sequence[str], name: str, log: Path
    ) -> subprocess.Popen[bytes]:
        """Start `per_node` tasks of a command on each node."""

    def kill(self, step: subprocess.Popen[bytes], name: str) -> None:
        """End a step and everything in it, at once."""

    def state(self) -> tuple[str, bool]:
        """(the job's state, whether its nodes are wanted by another job)."""

    def ends(self) -> float | None:
        """When the job's time is up, in seconds since 1970."""

    def requeue(self, exclude: Sequence[str], delay_s: int) -> None:
        """Start the job again, elsewhere than on these nodes."""

    def wait_for_slurm(self) -> None:
        """Until this process is ended from outside."""


class Supervisor:
    """One start of a run."""

    def __init__(self, request: Request, backend: Backend, signals: Path | None = None) -> None:
        """`signals`: a file in which the job script notes what it was sent."""
        self.request, self.backend, self.signals = request, backend, signals
        self.places, self.survive = request.places, request.site.survive
        self.folder = self.places.start(backend.start)
        self.asked: str | None = None
        self.got: set[str] = set()
        self.ends: float | None = None
        self.looked = time.monotonic()
        self.terminated: float | None = None
        self.begun = time.time()
        self.claimed = False

    def run(self) -> int:
        """From the claim to the decision. Returns the exit code of the job. Raises UserError."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda got, _: self.got.add(signal.Signals(got).name.removeprefix("SIG")))
        try:
            found = self._supervise()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            found = replace(self._evidence(exit_code=1), no_space=True)
        if isinstance(found, Evidence):
            survive = self.survive
            found = decide(found, survive.max_failures, self.request.chain, survive.disk_full_delay_s)
        return self._carry_out(found)

    def _supervise(self) -> Evidence | Decision:
        if self._finished():
            return Decision("finish", "completed already")
        if cancel_asked(self.places.events()):  # too late for the start before, which went back to the queue
            return Decision("finish", "cancelled: `hope launch resubmit` goes on with the run")
        self.folder.mkdir(parents=True, exist_ok=True)
        probe_space(self.places.folder)
        claim(self.places.run_dir, self.backend.start)
        self.claimed = True
        forget_stop(self.places.run_dir, BY_SUPERVISOR)
        nodes = self.backend.nodes()
        write_json(self.folder / "environment.json", recorded_environment())
        self.places.note("started", start=self.backend.start, nodes=nodes, from_step=self.places.newest_step())
        self.ends, self.looked = self.backend.ends(), time.monotonic()
        sick = self._check_health(nodes)
        if sick is not None:
            self.places.note("unhealthy", start=self.backend.start, nodes=sick)
            say(f"start {self.backend.start}: not healthy: {sick}")
            healthy = [node for node in nodes if node not in sick]
            if self.request.elastic and sick.keys() <= set(nodes) and len(healthy) >= self.request.site.node_range[0]:
                nodes, sick = healthy, None  # enough are left
        if sick is None:
            return self._train(self._layout(len(nodes)), nodes)
        return self._evidence(unhealthy=tuple(sick))

    # Before the ranks

    def _finished(self) -> bool:
        return self.places.is_complete(self.request.load().train.total_steps)

    def _check_health(self, nodes: list[str]) -> dict[str, str] | None:
        """Nodes that must not be used, and why; None where all may be."""
        rules = self.request.site.health
        if not rules.enabled:
            return None
        cpu = self.request.load().train.device == "cpu"
        spec = {
            "rules": rules.model_dump(mode="json"),
            "gpus": 0 if cpu else self.request.gpus_per_node,
            "nodes": len(nodes),
            "address": self.backend.address(nodes[0]),
            "port": self.backend.port(1),
        }
        write_json(self.folder / "health.json", spec)
        command = [sys.executable, "-m", "launch.health", str(self.folder)]
        step = self.backend.run(nodes, 1, command, "hope-health", self.folder / "srun.log")
        deadline = time.monotonic() + rules.timeout_s
        while step.poll() is None and time.monotonic() < deadline and not self._signals() & {"TERM"}:
            time.sleep(POLL_S)
        if step.poll() is None:
            self.backend.kill(step, "hope-health")
        sick = sick_nodes(self.folder / "health", nodes)
        if sick and "TERM" not in self.got:
            return sick
        problem = together_problem(self.folder / "health", nodes)
        return {"all of them together": problem} if problem else None

    def _layout(self, nodes: int) -> Layout:
        config, ranks = self.request.load(), self.request.ranks_per_node
        if self.request.elastic:
            return elastic_layout(config, nodes, ranks)
        return fixed_layout(config, nodes, ranks)

    # The ranks

    def _train(self, layout: Layout, nodes: list[str]) -> Evidence:
        used, idle = nodes[: layout.nodes], nodes[layout.nodes :]
        site, backend = self.request.site, self.backend
        train = [self.request.config]
        if self.request.elastic:
            train.append("parallel.dp_replicate=auto")
        spec = {
            "start": backend.start,
            "nodes": layout.nodes,
            "ranks_per_node": layout.ranks_per_node,
            "address": backend.address(used[0]),
            "port": backend.port(0),
            "shutdown_s": site.shutdown_s,
            "command": train,
        }
        write_json(self.folder / "spec.json", spec)
        self.places.note(
            "ranks", start=backend.start, ranks=layout.ranks, mesh=str(layout.sizes), nodes=used, idle=idle
        )
        say(f"start {backend.start}: {counted(layout.ranks, 'rank')} on {', '.join(used)}, {layout.sizes}")
        if idle:
            say(f"idle: {', '.join(idle)}, which the batch cannot be divided among")
        folder = str(self.folder)
        if site.launcher == "torchrun":
            command, per_node = [sys.executable, "-m", "launch.node", folder], 1
        else:
            command, per_node = [sys.executable, "-m", "launch.rank", folder, *train], layout.ranks_per_node
        step = backend.run(used, per_node, command, "hope-train", self.folder / "srun.log")
        watch = Watch(self.places.run_dir, self.folder / "heartbeat", self.survive)
        hung: str | None = None
        while step.poll() is None:
            time.sleep(POLL_S)
            self._answer_signals()
            if self._out_of_time():  # the requeue comes first: what is left of the job is Slurm's to end
                return self._evidence(exit_code=128 + signal.SIGTERM)
            hung = watch.hang()
            if hung is not None:
                self._dump(hung, watch.idle_s, used)
                backend.kill(step, "hope-train")
                break
        code = step.wait()
        return self._evidence(hung=hung, exit_code=code)

    def _signals(self) -> set[str]:
        """All that this process or its job script was sent."""
        if self.signals is not None:
            with suppress(OSError):
                self.got |= set(self.signals.read_text(encoding="ascii").split())
        return self.got

    def _answer_signals(self) -> None:
        got = self._signals()
        if self.asked is None and ("USR1" in got or self._left_s() < self.survive.lead_s):
            self.ends, self.looked = self.backend.ends(), time.monotonic()
            self._ask("time limit" if self._left_s() < self.survive.lead_s + EARLY_S else "requeue asked for")
        elif self.asked is None and "TERM" in got and self.backend.state()[1]:
            self._ask("preempted")

    def _left_s(self) -> float:
        """Seconds to the time limit, which may be moved while the job runs."""
        if time.monotonic() - self.looked > ASK_EVERY_S:
            self.ends, self.looked = self.backend.ends(), time.monotonic()
        return math.inf if self.ends is None else self.ends - time.time()

    def _out_of_time(self) -> bool:
        """Whether Slurm is ending the job for its time limit, and the run has had its last seconds to save. Slurm ends
        this process too, after its KillWait (30 s by default): until then the job can still be requeued.
        """
        if "TERM" not in self._signals():
            return False
        if self.terminated is None:
            self.terminated = time.monotonic() if self.backend.state()[0] == "TIMEOUT" else math.inf
        return time.monotonic() - self.terminated > LAST_SECONDS

    def _ask(self, why: str) -> None:
        """Have the run save and stop, at a step's end and on all ranks together."""
        self.asked = why
        self.places.note("asked", start=self.backend.start, why=why)
        say(f"start {self.backend.start}: {why}: the run is asked to save and stop")
        text = f"{BY_SUPERVISOR}{self.backend.start}: {why}\n"
        try:
            (self.places.run_dir / STOP).write_text(text, encoding="utf-8")
        except OSError as error:  # an empty one would be taken for a person's, by the next start too
            with suppress(OSError):
                (self.places.run_dir / STOP).unlink()
            say(f"start {self.backend.start}: {STOP} cannot be written ({error.strerror})")

    def _dump(self, phase: str, idle_s: float, nodes: Sequence[str]) -> None:
        """Every rank's stacks, before anything is ended."""
        self.places.note("hang", start=self.backend.start, phase=phase, idle_s=round(idle_s, 1))
        say(f"start {self.backend.start}: nothing has moved for {idle_s:.0f} s in phase {phase}")
        command = [sys.executable, "-m", "launch.stacks", str(self.folder)]
        step = self.backend.run(nodes, 1, command, "hope-stacks", self.folder / "srun.log")
        try:
            step.wait(90)
        except subprocess.TimeoutExpired:
            self.backend.kill(step, "hope-stacks")

    # After the ranks

    def _evidence(self, hung: str | None = None, exit_code: int = 0, unhealthy: tuple[str, ...] = ()) -> Evidence:
        stopped = self.places.stopped()
        fresh = stopped.get("time", 0.0) >= self.begun
        state, preempted = self.backend.state()
        first = read_json(self.folder / "ranks" / "0.json")
        no_space = False
        try:
            probe_space(self.places.folder)
        except OSError as error:
            no_space = error.errno in NO_SPACE
        said = str((stopped.get("detail") if fresh else None) or first.get("error") or "")
        events = self.places.events()
        return Evidence(
            job_state=state,
            preempted=preempted,
            terminated="TERM" in self._signals(),
            cancelled=cancel_asked(events),
            asked=self.asked,
            stopped=stopped.get("reason") if fresh else None,
            detail=said,
            exit_code=exit_code,
            first_code=first.get("exit"),
            hung=hung,
            unhealthy=unhealthy,
            step=self.places.newest_step(),
            no_space=no_space,
            failures=failures_before(events) + (self._unnoted(events) if no_space else ()),
            time=time.time(),
        )

    def _unnoted(self, events: Sequence[Event]) -> tuple[Failure, ...]:
        """Earlier starts of this job that found no space even to note that they were there."""
        job, _, restart = self.backend.start.rpartition(".")
        noted = {event.get("start") for event in events}
        missing = sum(f"{job}.{number}" not in noted for number in range(int(restart)))
        return (Failure(self.places.newest_step(), time.time()),) * missing

    def _carry_out(self, decision: Decision) -> int:
        if self.claimed and claimed_by(self.places.run_dir) not in (self.backend.start, None):
            decision = Decision("leave", "another start has taken the run over", 1)
        self._note_end(decision)
        say(f"start {self.backend.start}: {decision.reason}: {decision.action}")
        if decision.action == "requeue":
            self.backend.requeue(self._excluded(), decision.delay_s)
        elif decision.action == "wait":
            self.backend.wait_for_slurm()
        return decision.code

    def _excluded(self) -> list[str]:
        """Every node that was found sick since the run was submitted last."""
        found: dict[str, None] = {}
        for event in self.places.events():
            if event["event"] == "submitted":
                found.clear()
            elif event["event"] == "ended":
                found |= dict.fromkeys(event.get("exclude", ()))
        return list(found)

    def _note_end(self, decision: Decision) -> None:
        self.places.note(
            "ended",
            start=self.backend.start,
            action=decision.action,
            reason=decision.reason,
            failure=decision.failure,
            exclude=[node for node in decision.exclude if node in self.backend.nodes()],
            step=self.places.newest_step(),
        )


def probe_space(folder: Path) -> None:
    """Raises OSError where a file of a megabyte cannot be written."""
    probe = folder / f".space-{os.uname().nodename}-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):
            probe.unlink()


def recorded_environment() -> dict[str, object]:
    """What a start found: interpreter, host, and the variables that launchers, links and devices listen to."""
    chosen = {key: text for key, text in sorted(os.environ.items()) if key.startswith(RECORDED)}
    return {"python": sys.executable, "host": os.uname().nodename, "kernel": os.uname().release, "variables": chosen}


def main() -> int:
    """The command of a job script: `python -m launch.supervise REQUEST SIGNALS`. Returns the job's exit code."""
    from launch.cluster import SlurmBackend

    try:
        request = read_request(Path(sys.argv[1]))
        return Supervisor(request, SlurmBackend(request), Path(sys.argv[2])).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
