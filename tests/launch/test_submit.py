"""Submitting to a real controller: what is queued, and what is refused with nothing queued."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hope_train import cli
from launch.places import Places
from launch.request import read_request
from scripts.slurm_bench import Bench


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
    "more nodes than the partition has": (["--partition", "short", "--nodes", "2"], "partition short has 1 nodes"),
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


def test_a_controller_that_is_gone_is_one_line(bench: Bench, hope: Hope, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real client and no controller: Slurm's own tools give up by themselves, or are given up."""
    file = bench.folder / "nobody.conf"
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    port = next(line for line in conf.splitlines() if line.startswith("SlurmctldPort="))
    file.write_text(conf.replace(port, "SlurmctldPort=9\nMessageTimeout=2"))
    (bench.folder / "bad.yaml").write_text(json.dumps(bench.site))
    monkeypatch.setenv("SLURM_CONF", str(file))
    done = hope("submit", "run.yaml", "name=bad", "--site", "bad.yaml", check=False)
    assert done.returncode == 2
    assert "Slurm does not answer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_submitted_is_kept(bench: Bench, hope: Hope) -> None:
    """Code, configuration, script and request lie in the run directory; a second submission is refused meanwhile."""
    first = blocker(bench, "hope-kept")
    run = bench.submit("kept", "seed=7", "--nodes", "1", "--ranks-per-node", "2", "--dependency", "singleton")
    try:
        places = Places(run.run_dir)
        request = read_request(places.submission(1) / "request.json")
        assert request.load().seed == 7
        assert request.load().run_dir == str(run.run_dir)
        assert (request.ranks_per_node, request.elastic, request.chain) == (2, False, False)
        assert (Path(request.code["folder"]) / "launch" / "supervise.py").is_file()
        assert "#SBATCH --dependency=singleton\n" in (places.submission(1) / "job.sh").read_text()
        again = hope("submit", "run.yaml", "name=kept", "--site", "kept.site.yaml", "--nodes", "2", check=False)
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


def test_a_run_that_cannot_be_found_is_one_line(hope: Hope) -> None:
    for command in ("status", "logs", "cancel", "requeue", "resubmit", "history"):
        done = hope(command, "nobody", check=False)
        assert done.returncode == 2
        assert "'nobody' is no run directory" in done.stderr
