"""Submitting to a real controller: what is queued, and what is refused with nothing queued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hope_train import cli
from launch.places import Places
from launch.request import read_request
from scripts.slurm_bench import STEPS, Bench


@dataclass
class Said:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


Hope = Callable[..., Said]


@pytest.fixture
def hope(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hope:
    """`hope launch …` in this process, from the bench's folder."""
    monkeypatch.chdir(bench.folder)
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(bench.folder / "state"))

    def call(*arguments: str, check: bool = True) -> Said:
        code = cli.run(["launch", *arguments])
        said = Said(code, *capsys.readouterr())
        assert code == 0 or not check, said.stderr
        return said

    return call


def queued(bench: Bench) -> list[str]:
    return bench.cluster.slurm.call("squeue", "-h", "-t", "all", "-o", "%i %T").split("\n")


def test_a_dry_run_prints_the_script_and_writes_nothing(bench: Bench, hope: Hope) -> None:
    before = queued(bench)
    (bench.folder / "dry.yaml").write_text(json.dumps({**bench.site, "nodes": "2-4"}))
    done = hope("submit", "run.yaml", "name=dry", "--site", "dry.yaml", "--dry-run", "--time", "15")
    assert done.stdout.startswith("#!/usr/bin/env bash\n")
    assert "#SBATCH --nodes=2-4\n" in done.stdout
    assert "#SBATCH --time=15\n" in done.stdout
    assert not (bench.folder / "runs" / "dry").exists()
    assert queued(bench) == before
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_slurm_says_when_it_would_start(bench: Bench, hope: Hope) -> None:
    before = queued(bench)
    (bench.folder / "test.yaml").write_text(json.dumps(bench.site))
    done = hope("submit", "run.yaml", "name=test", "--site", "test.yaml", "--test-only")
    assert "to start at" in done.stdout
    assert not (bench.folder / "runs" / "test").exists()
    assert queued(bench) == before


def blocker(bench: Bench, name: str) -> str:
    """A job that runs until it is cancelled, for others to wait for."""
    script = bench.folder / "blocker.sh"
    script.write_text("#!/bin/bash\nexec sleep 600\n")
    return bench.cluster.slurm.submit(str(script), "-o", "/dev/null", "-J", name)


MISTAKES = {
    "no such partition": (["--partition", "trian"], "did you mean train?"),
    "more nodes than there are": (["--nodes", "9"], "has 4 nodes"),
    "more nodes than the partition has": (["--partition", "short", "--nodes", "2"], "partition short has 1 node,"),
    "more GPUs than a node has": (["--gpus-per-node", "16"], "have 8 GPUs"),
    "a mesh that does not fit": (["--ranks-per-node", "3"], "the mesh does not fit 2 nodes of 3 ranks"),
    "a batch that does not fit": (["--nodes", "4", "--ranks-per-node", "4"], "cannot share"),
    "a time limit that is too short": (["--time", "1"], "leaves no time to train"),
    "a time limit that is too long": (
        ["--partition", "short", "--nodes", "1", "--time", "60", "parallel.tp=1"],
        "allows",
    ),
    "a disk of this machine": (["dir=/dev/shm/hope"], "a disk of this machine alone"),
    "an unknown key": (["train.tokenz=1"], "unknown key"),
    "a sweep without runs": (["--array", "0-3"], "--sweep FILE or --grid"),
    "a dependency that is none": (["--dependency", "afterok:soon"], "ependency"),
    "an array that runs backwards": (["--grid", "seed=1,2", "--array", "1-0"], "write it as Slurm does"),
    "a task that does not fit": (["--grid", "parallel.tp=2,3"], "task 1 of the sweep: the mesh does not fit"),
    "a task with an unknown key": (["--grid", "seed=1", "--grid", "sead=1,2"], "task 0 of the sweep (seed=1 sead=1)"),
    "nodes that are no number": (["--nodes", "five"], "command line: nodes=five"),
    "a tokenizer that is not there": (["data.tokenizer=nowhere.model"], "data.tokenizer: nowhere.model is not there"),
    "text that is not there": (["data.sources=[{path: nowhere.txt}]"], "data.sources.0: nowhere.txt is not there"),
    "a site file that is not there": (["--site", "nowhere.yaml"], "no site file"),
    "a device that is too small": (["--device", "l4", "model.d_model=16384", "model.n_heads=64"], "does not fit"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_queued(bench: Bench, hope: Hope, mistake: str) -> None:
    before = queued(bench)
    options, said = MISTAKES[mistake]
    site = [] if "--site" in options else ["--site", "bad.yaml"]
    (bench.folder / "bad.yaml").write_text(json.dumps(bench.site))
    done = hope("submit", "run.yaml", "name=bad", *site, *options, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert queued(bench) == before
    assert not list((bench.folder / "runs" / "bad").glob("launch/submissions/*"))


def test_a_run_that_is_complete_is_not_submitted_again(bench: Bench, hope: Hope) -> None:
    before = queued(bench)
    run_dir = bench.folder / "runs" / "done"
    run_dir.mkdir(parents=True)
    (bench.folder / "done.yaml").write_text(json.dumps(bench.site))
    command = ("submit", "run.yaml", "name=done", "--site", "done.yaml", "--test-only")
    (run_dir / "STOPPED.json").write_text(json.dumps({"reason": "completed", "step": STEPS - 1}))
    hope(*command)  # trained to an end that is no longer its last step
    (run_dir / "STOPPED.json").write_text(json.dumps({"reason": "completed", "step": STEPS}))
    done = hope(*command, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {run_dir.resolve()} is complete, step {STEPS} of {STEPS}: choose another name= or dir= for a new run\n"
    )
    hope(*command, "--grid", "seed=1,2")  # tasks of a sweep have directories of their own
    assert queued(bench) == before


@pytest.mark.parametrize("hangs", [False, True])
def test_a_controller_that_is_gone_or_hangs_is_one_line(
    bench: Bench, hope: Hope, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """A real client without a controller that answers: Slurm's own tools give up by themselves, or are given up."""
    file = bench.folder / "nobody.conf"
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    port = next(line for line in conf.splitlines() if line.startswith("SlurmctldPort="))
    file.write_text(conf.replace(port, f"{port if hangs else 'SlurmctldPort=9'}\nMessageTimeout=2"))
    (bench.folder / "bad.yaml").write_text(json.dumps(bench.site))
    monkeypatch.setenv("SLURM_CONF", str(file))
    controller = int((bench.cluster.folder / "run" / "slurmctld.pid").read_text())
    if hangs:
        os.kill(controller, signal.SIGSTOP)
    try:
        done = hope("submit", "run.yaml", "name=bad", "--site", "bad.yaml", check=False)
    finally:
        os.kill(controller, signal.SIGCONT)
    assert done.returncode == 2
    assert "Slurm does not answer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_submitted_is_kept(bench: Bench, hope: Hope) -> None:
    """Code, configuration, script and request lie in the run directory; a second submission is refused meanwhile."""
    first = blocker(bench, "hope-kept")
    place = f"dir={bench.folder}/runs/all of {{name}}"  # what Slurm would take for another option
    more = ("--nodes", "1", "--ranks-per-node", "2", "--dependency", "singleton")
    run = bench.submit("kept", "seed=7", place, *more)
    try:
        places = Places(run.run_dir)
        request = read_request(places.submission(1) / "request.json")
        assert request.load().seed == 7
        assert request.load().run_dir == str(run.run_dir)
        assert (request.ranks_per_node, request.elastic, request.chain) == (2, False, False)
        assert (Path(request.code["folder"]) / "launch" / "supervise.py").is_file()
        assert "#SBATCH --dependency=singleton\n" in (places.submission(1) / "job.sh").read_text()
        output = places.submission(1) / f"job-{run.jobs[0]}.out"
        assert f"StdOut={output} " in bench.cluster.slurm.call("scontrol", "-o", "show", "job", run.jobs[0])
        again = hope("submit", "run.yaml", "name=kept", place, "--site", "kept.site.yaml", "--nodes", "2", check=False)
        assert again.returncode == 2
        assert f"has job {run.jobs[0]} already" in again.stderr
        status = json.loads(hope("status", run.jobs[0], "--json").stdout)
        assert status["job"] == run.jobs[0]
        assert status["run_dir"] == str(run.run_dir)
        assert status["total_steps"] == 40
    finally:
        hope("cancel", run.jobs[0])
        bench.cluster.slurm.cancel(first)
    assert hope("cancel", run.jobs[0], check=False).returncode == 2


def test_a_sweep_is_an_array_of_runs(bench: Bench, hope: Hope) -> None:
    """Held by a dependency, so that nothing is trained."""
    first = blocker(bench, "blocker")
    try:
        options = ("--dependency", f"afterok:{first}", "--grid", "optimizer.lr=1e-3,2e-3", "--grid", "seed=1,2")
        run = bench.submit("sweep", *options, "--array", "0-3%2")
        (job,) = run.jobs
        requests = [read_request(path) for path in sorted(run.places.submission(1).glob("request-*.json"))]
        assert [Path(request.run_dir).name for request in requests] == [f"sweep-{number}" for number in range(4)]
        chosen = [(request.load().optimizer.lr, request.load().seed) for request in requests]
        assert chosen == [(1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2)]
        statuses = json.loads(hope("status", str(run.run_dir), "--json").stdout)
        assert [status["run"] for status in statuses] == [f"sweep-{number}" for number in range(4)]
        assert bench.cluster.slurm.job(f"{job}_3") is not None
    finally:
        bench.cluster.settle()


def test_a_sweep_is_one_thing_and_its_tasks_are_too(
    bench: Bench, hope: Hope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled whole; resubmitted whole or one task alone, from any folder. Held, so that nothing is trained."""
    sweep = bench.submit("held", "--grid", "seed=1,2,3", "--array", "0,2", site={"extra": ["--hold"]})
    (home, job), tasks = (str(sweep.run_dir), sweep.jobs[0]), [Path(f"{sweep.run_dir}-{task}") for task in range(3)]

    def waiting() -> list[str]:
        text = bench.cluster.slurm.call("squeue", "-h", "-r", "-t", "PD", "-n", "hope-held", "-o", "%K")
        return sorted(text.split())

    try:
        assert waiting() == ["0", "2"]
        assert not Places(tasks[1]).events()  # nobody asked for it
        assert [status["run"] for status in json.loads(hope("status", job, "--json").stdout)] == ["held-0", "held-2"]
        assert json.loads(hope("history", home, "--json").stdout) == []
        assert "name one of its runs (held-0, held-2)" in hope("logs", home, check=False).stderr
        monkeypatch.chdir(tmp_path)
        assert hope("cancel", home).stdout.count("is cancelled") == 2
        assert waiting() == []
        (tasks[2] / "STOP").write_text("cancelled\n")  # to a start that ended before it could obey
        hope("resubmit", str(tasks[2]))
        assert waiting() == ["2"]
        assert not (tasks[2] / "STOP").exists()
        assert f"\ncd {bench.folder} " in (sweep.places.submission(2) / "job.sh").read_text()
        hope("cancel", str(tasks[2]))
        hope("resubmit", home)
        assert waiting() == ["0", "2"]
        requests = [read_request(sweep.places.submission(3) / f"request-{task}.json") for task in range(3)]
        assert [request.load().seed for request in requests] == [1, 2, 3]
    finally:
        bench.cluster.settle()


def test_of_a_chain_all_jobs_are_queued_or_none(
    bench: Bench, hope: Hope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm stops answering after the first one."""
    before = queued(bench)
    real = shutil.which("sbatch")
    (tmp_path / "sbatch").write_text(
        f'#!/bin/bash\n[[ "$*" == *--test-only* ]] || echo x >>{tmp_path}/calls\n'
        f'[ ! -e {tmp_path}/calls ] || [ $(wc -l <{tmp_path}/calls) -lt 2 ] || exit 1\nexec {real} "$@"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (bench.folder / "half.yaml").write_text(json.dumps({**bench.site, "extra": ["--hold"]}))
    done = hope("submit", "run.yaml", "name=half", "--site", "half.yaml", "--chain", "3", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    assert [line for line in queued(bench) if line not in before and "CANCELLED" not in line] == []


def test_a_run_that_cannot_be_found_is_one_line(hope: Hope) -> None:
    for command in ("status", "logs", "cancel", "requeue", "resubmit", "history"):
        done = hope(command, "nobody", check=False)
        assert done.returncode == 2
        assert "'nobody' is no run directory" in done.stderr
