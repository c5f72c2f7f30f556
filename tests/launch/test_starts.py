"""Other ways of starting, with real training: srun, arrays, one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.places import read_json
from scripts.slurm_bench import Bench, Run, same_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_srun_starts_the_ranks_itself(bench: Bench) -> None:
    """No torchrun: two tasks on each of two nodes, stopped and requeued, to the bits of a torchrun of four."""
    more = ("parallel.dp_replicate=2", "train.micro_batch_size=2")
    try:
        run = bench.submit("by-srun", "seed=5", *more, "--launcher", "srun", "--ranks-per-node", "2")
        run.reach(12)
        run.slurm.signal_script(run.jobs[0], "USR1")
        run.complete()
        assert len(run.events("started")) == 2
        ranks = [run.rank(number) for number in range(4)]
        assert [rank["node"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
        bench.hope("launch", "local", "run.yaml", "name=by-torchrun", "seed=5", *more, "--ranks", "4")
        assert same_checkpoint(run.run_dir, bench.folder / "runs" / "by-torchrun")
    finally:
        bench.cluster.settle()


def test_hope_train_under_srun_needs_nothing_of_ours(bench: Bench) -> None:
    """`srun hope train …` in a script of one's own."""
    script = bench.folder / "own.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=1 --cpus-per-task=2 --mem=2000M -t 5\n"
        f"cd {bench.folder}\nunset HOPE_WIKITEXT\nexport OMP_NUM_THREADS=1\n"
        f"srun --cpus-per-task=2 {sys.executable} -m hope_train.cli train run.yaml name=own seed=0\n"
    )
    run = Run(bench, bench.folder / "runs" / "own", [])
    try:
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        command = ["sbatch", "--parsable", "-o", str(bench.folder / "own.out"), str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        run.jobs = [done.stdout.strip()]
        run.complete()
        assert read_json(run.run_dir / "environment.json")["processes"] == 2
        assert same_checkpoint(run.run_dir, bench.reference(0))
    finally:
        bench.cluster.settle()


def test_a_sweep_trains_every_task(bench: Bench) -> None:
    """Two runs of one array, at the same time, each in a directory of its own; one is requeued and the other is not."""
    more = ("parallel.tp=1", "--nodes", "1", "--grid", "seed=0,1", "train.tokens=5120")
    try:
        sweep = bench.submit("array", *more)
        runs = [Run(bench, bench.folder / "runs" / f"array-{task}", [f"{sweep.jobs[0]}_{task}"]) for task in (0, 1)]
        runs[1].reach(3)
        bench.hope("launch", "requeue", f"{sweep.jobs[0]}_1")
        for task, run in enumerate(runs):
            run.complete()
            assert [row["step"] for row in run.rows()] == list(range(1, 21))
            assert len(run.events("started")) == 1 + task
            assert f"seed: {task}\n" in (run.run_dir / "config.yaml").read_text()
        assert runs[0].rows()[0]["loss"] != runs[1].rows()[0]["loss"]
        statuses = json.loads(bench.hope("launch", "status", sweep.jobs[0], "--json").stdout)
        assert [status["stopped"] for status in statuses] == ["completed", "completed"]
    finally:
        bench.cluster.settle()


def on_this_machine(name: str) -> list[str]:
    """`hope launch local` with two ranks."""
    options = ["run.yaml", f"name={name}", "seed=0", "--ranks", "2"]
    return [sys.executable, "-m", "hope_train.cli", "launch", "local", *options]


def test_one_machine_without_slurm(bench: Bench) -> None:
    """A killed rank is started again in place, and the result is that of a run to which nothing happened."""
    environment = {key: text for key, text in os.environ.items() if not key.startswith(("SLURM", "HOPE"))}
    environment |= {
        "PYTHONPATH": os.getcwd(),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    command = on_this_machine("here")
    run = Run(bench, bench.folder / "runs" / "here", [])
    process = subprocess.Popen(command, cwd=bench.folder, env=environment)
    try:
        run.reach(14)
        os.kill(run.rank(1)["pid"], signal.SIGKILL)
        run.wait("the second start", lambda: len(run.events("started")) == 2)
        assert process.wait(200) == 0
    finally:
        process.kill()
    assert run.events("ended")[0]["failure"]
    assert same_checkpoint(run.run_dir, bench.reference(0))


def test_ctrl_c_saves_and_the_same_command_goes_on(bench: Bench) -> None:
    environment = {key: text for key, text in os.environ.items() if key != "HOPE_WIKITEXT"} | {
        "PYTHONPATH": os.getcwd()
    }
    command = on_this_machine("twice")
    run = Run(bench, bench.folder / "runs" / "twice", [])
    process = subprocess.Popen(command, cwd=bench.folder, env=environment)
    try:
        run.reach(5)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 0
        assert read_json(run.run_dir / "STOPPED.json")["reason"] == "signal"
        assert not run.events("ended")[0]["failure"]
        assert subprocess.run(command, cwd=bench.folder, env=environment, timeout=200, check=False).returncode == 0
    finally:
        process.kill()
    assert same_checkpoint(run.run_dir, bench.reference(0))
