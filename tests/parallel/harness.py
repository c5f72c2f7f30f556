"""Ranks spawned once for many jobs: a job is a function of this repository, run by as many ranks as it wants.

Every job has a process group of its own (gloo, a file store) and a hard timeout; when it strikes, or a rank fails, the
error shows what every rank wrote, the stacks of all of its threads included. A rank does each job in a fork of itself,
which has all modules loaded: groups and meshes stay in torch's caches for as long as a process lives, and each of
them has threads and sockets (hundreds of both after a few dozen jobs in one process).
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0
"""Seconds that a job may take; none takes a tenth of it."""


def rank_environment() -> dict[str, str]:
    """The environment of a rank: one thread, and no WikiText but what a test's own configuration names."""
    inherited = {key: value for key, value in os.environ.items() if key != "HOPE_WIKITEXT"}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Gang:
    """Processes that wait for jobs. Close it when done."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.jobs = folder, 0
        self.processes = []
        for rank in range(ranks):
            with (folder / f"rank_{rank}.txt").open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.parallel.harness", str(folder), str(rank)],
                        cwd=ROOT,
                        env=rank_environment(),
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        text=True,
                        start_new_session=True,
                    )
                )

    def run(self, function: Callable[..., Any], ranks: int, timeout: float = TIMEOUT, **arguments: Any) -> list[Any]:
        """Call `function(**arguments)` on the first `ranks` ranks, in one process group; what each returned.

        The arguments are plain data. Raises AssertionError when a rank fails or the job takes too long; the gang is
        lost then.
        """
        self.jobs += 1
        place = f"{function.__module__}:{function.__qualname__}"
        job = {"number": self.jobs, "ranks": ranks, "function": place, "arguments": arguments, "timeout": timeout}
        assert ranks <= len(self.processes), f"a gang of {len(self.processes)} cannot run a job of {ranks}"
        for process in self.processes[:ranks]:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
        results = [self.folder / f"result_{self.jobs}_{rank}.pt" for rank in range(ranks)]
        deadline = time.monotonic() + timeout
        while not all(result.exists() for result in results):
            dead = [rank for rank, process in enumerate(self.processes[:ranks]) if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise AssertionError(self._autopsy(f"rank {dead} ended" if dead else f"{place} hangs ({timeout} s)"))
            time.sleep(0.01)
        outcomes = [torch.load(result, weights_only=False) for result in results]
        failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(outcomes) if text is not None]
        if failures:
            raise AssertionError(f"{place} failed\n" + "\n".join(failures))
        return [value for _, value in outcomes]

    def alive(self) -> bool:
        """Whether all ranks can take another job."""
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            self._kill(process)
            process.wait()

    @staticmethod
    def _kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)  # its fork too

    def _autopsy(self, what: str) -> str:
        for process in self.processes:
            if process.poll() is None:
                self._kill(process, signal.SIGABRT)  # faulthandler writes where every thread is
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            self._kill(process)
        texts = [(self.folder / f"rank_{rank}.txt").read_text(errors="replace") for rank in range(len(self.processes))]
        return "\n".join([what, *(f"rank {rank}:\n{text[-6000:]}" for rank, text in enumerate(texts))])


def serve(folder: Path, rank: int) -> None:
    """A rank's life: one job after another, each in a fork, until the gang is closed or a fork dies."""
    signal.signal(signal.SIGABRT, signal.SIG_IGN)  # meant for the fork, which shows its stacks
    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module(job["function"].partition(":")[0])  # here, so that all later forks have it too
        if (fork := os.fork()) == 0:
            work(folder, rank, job)
        status = os.waitpid(fork, 0)[1]
        if status:
            sys.exit(f"the fork of job {job['number']} ended with exit code {os.waitstatus_to_exitcode(status)}")


def work(folder: Path, rank: int, job: dict[str, Any]) -> NoReturn:
    """Do one job and end the process."""
    module, _, name = job["function"].partition(":")
    outcome: tuple[str | None, Any]
    faulthandler.enable()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
    # A rank that fails leaves the others waiting for it: they are given up after this long.
    faulthandler.dump_traceback_later(job["timeout"], exit=True)
    try:
        if job["ranks"] > 1:
            store = f"file://{folder}/store_{job['number']}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job["ranks"])
        outcome = (None, getattr(importlib.import_module(module), name)(**job["arguments"]))
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        outcome = (traceback.format_exc(), None)
    result = folder / f"result_{job['number']}_{rank}.pt"
    torch.save(outcome, result.with_suffix(".tmp"))
    result.with_suffix(".tmp").replace(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the farewells of libraries, which wait for threads and other ranks


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]), int(sys.argv[2]))
