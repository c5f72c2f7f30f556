"""`hope train` on several ranks, one of which is killed by its own hand (SIGKILL) at its n-th event.

An event is whatever a kill may fall between: a file below the run directory is opened, flushed, renamed or removed, a
folder made or removed, an exchange with other ranks begins, the optimizer is about to step. As a program: a server that
has everything imported and forks the ranks of each job, so that processes which are really killed start in no time.
"""

from __future__ import annotations

import faulthandler
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
from typing import Any

from tests.parallel.harness import ROOT, rank_environment

TIMEOUT = 100.0
"""Seconds that a job may take; none takes a fifth of it."""

Job = dict[str, Any]


class Server:
    """Starts jobs; a job is one `hope train` on so many ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.log = folder / "server.txt"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.train.kill_ranks", str(folder)],
                cwd=ROOT,
                env=rank_environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, config: Path, overrides: list[str], ranks: int, **point: Any) -> Job:
        """One job to its end.

        Args:
            point: `rank`, `number`: that rank is killed at its event of this number; `all`: and the others at the same
                moment, instead of a while (`after` seconds) later. `count`: nobody is, and events are counted.

        Returns:
            `codes` (exit codes, -9 for a kill), `events` (of each rank, with `count`), `killed_at` (the label of the
            event), `output`.
        """
        self.jobs += 1
        job = {"number": self.jobs, "config": str(config), "overrides": overrides, "ranks": ranks, "point": point}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        result, deadline = self.folder / f"result_{self.jobs}.json", time.monotonic() + TIMEOUT + 30
        while not result.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"the server hangs:\n{self.log.read_text()}"
            time.sleep(0.01)
        found: Job = json.loads(result.read_text())
        assert not found["hangs"], f"hangs:\n{found['output']}"
        return found

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()


def watch(run_dir: str, happened: Callable[[str], None]) -> None:
    """Call `happened` at each event of this process, from now on, with what it is."""
    import torch.distributed as dist

    from hope_train.levels.optimizer import LevelOptimizer

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            place = arguments[0]
            if isinstance(place, str | os.PathLike) and os.fspath(place).startswith(run_dir):
                writes = event != "open" or (isinstance(arguments[1], str) and arguments[1].strip("rbt") != "")
                if writes or arguments[1] is None:
                    happened(f"{event} {os.path.relpath(place, run_dir)}")

    def before(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            happened(name)
            return plain(*arguments, **options)

        setattr(owner, name, counted)

    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        before(dist, name)
    before(os, "fsync")
    before(LevelOptimizer, "step")
    sys.addaudithook(heard)


def rank_of_job(job: Job, rank: int, folder: Path) -> int:
    """The life of one rank, in a process of its own; its exit code."""
    import torch.distributed as dist

    from hope_train.errors import UserError
    from hope_train.train import loop
    from hope_train.train.run import train_command

    point, labels = job["point"], []
    run_dir = next(text.partition("=")[2] for text in job["overrides"] if text.startswith("dir="))

    def happened(label: str) -> None:
        labels.append(label)
        if point.get("rank") == rank and len(labels) == point["number"] + 1:
            with open(folder / f"killed_{job['number']}.txt", "w") as file:
                file.write(label)
            os.killpg(0, signal.SIGKILL) if point.get("all") else os.kill(os.getpid(), signal.SIGKILL)

    plain, begun = loop.take_step, []

    def first_step(*arguments: Any, **options: Any) -> Any:
        if not begun:  # opening a run is nothing that could be lost
            begun.append(True)
            watch(run_dir, happened)
        return plain(*arguments, **options)

    loop.take_step = first_step
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
    store = f"file://{folder}/store_{job['number']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job["ranks"])
    try:
        code = train_command(job["config"], job["overrides"], "auto", force_config=False, as_json=False)
    except UserError as error:
        print(f"error: {error}")
        code = 2
    if point.get("count"):
        (folder / f"events_{job['number']}_{rank}.json").write_text(json.dumps(labels))
    return code


def fork(job: Job, rank: int, folder: Path, group: int) -> int:
    """A new process for a rank; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, group)
        output = os.open(folder / f"rank_{job['number']}_{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable()
        code = rank_of_job(job, rank, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_job(job: Job, folder: Path) -> Job:
    """Fork the ranks, wait for them as a launcher does: when one has died, the others are killed."""
    ranks, point = job["ranks"], job["point"]
    children: dict[int, int] = {}
    group = 0
    for rank in range(ranks):
        child = fork(job, rank, folder, group)
        group = group or child
        with suppress(OSError):
            os.setpgid(child, group)
        children[child] = rank
    codes: dict[int, int] = {}
    deadline, hangs = time.monotonic() + TIMEOUT, False
    while len(codes) < ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > deadline and not hangs:
                hangs = True
                for other in children.keys() - codes.keys():
                    os.kill(other, signal.SIGABRT)  # faulthandler writes where every thread is
            time.sleep(0.005)
            continue
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] != 0 and not hangs:
            time.sleep(point.get("after", 0.0))
            for other in children.keys() - codes.keys():
                os.kill(other, signal.SIGKILL)
    texts = [(folder / f"rank_{job['number']}_{rank}.txt").read_text(errors="replace") for rank in range(ranks)]
    killed = folder / f"killed_{job['number']}.txt"
    return {
        "codes": [codes[child] for child, _ in sorted(children.items(), key=lambda pair: pair[1])],
        "hangs": hangs,
        "output": "\n".join(f"rank {rank}:\n{text[-4000:]}" for rank, text in enumerate(texts)),
        "killed_at": killed.read_text() if killed.exists() else None,
        "events": [json.loads((folder / f"events_{job['number']}_{rank}.json").read_text()) for rank in range(ranks)]
        if point.get("count")
        else None,
    }


def serve(folder: Path) -> None:
    """One job after another until the input ends."""
    import torch
    import torch.distributed.checkpoint

    import hope_train.train.run  # noqa: F401 - forked processes have it

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        found = run_job(job, folder)
        result = folder / f"result_{job['number']}.json"
        result.with_suffix(".tmp").write_text(json.dumps(found))
        result.with_suffix(".tmp").replace(result)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
