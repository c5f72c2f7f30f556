"""On a real controller with real training: nodes that vary, and following a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from launch.places import read_json, read_lines
from scripts.slurm_bench import STEPS, Bench

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_nodes_that_vary(bench: Bench) -> None:
    """Four nodes, of which one is sick and the batch can use two; then one. Every batch is seen once, in its size."""
    more = ("parallel.tp=1", "train.micro_batch_size=1")
    slurm = bench.cluster.slurm
    try:
        health = {**bench.site["health"], "command": 'test "$SLURMD_NODENAME" != n1'}
        run = bench.submit("elastic", "seed=6", *more, "--nodes", "1-4", site={"health": health})
        run.reach(12)
        (first,) = run.events("ranks")
        assert (first["nodes"], first["idle"], first["ranks"]) == (["n2", "n3"], ["n4"], 2)
        for node in ("n3", "n4"):
            slurm.call("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
        slurm.signal_script(run.jobs[0], "USR1")
        run.complete()
        second = run.events("ranks")[-1]
        assert (second["nodes"], second["idle"], second["ranks"]) == (["n2"], [], 1)
        rows = run.rows()
        assert [(row["step"], row["tokens"]) for row in rows] == [(step, step * 256) for step in range(1, STEPS + 1)]
        bench.hope("launch", "local", "run.yaml", "name=fixed", "seed=6", *more, "--ranks", "1")
        expected = read_lines(bench.folder / "runs" / "fixed" / "metrics.jsonl")
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    finally:
        bench.cluster.settle()


def test_what_is_said_of_a_run(bench: Bench) -> None:
    """status, logs -f over a restart, history, cancel with a save."""
    run = bench.submit("followed", "seed=7", "train.tokens=102400")
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    try:
        run.reach(5)
        command = [sys.executable, "-m", "hope_train.cli", "launch", "logs", "-f", str(run.run_dir)]
        with (bench.folder / "followed.txt").open("w") as output:
            following = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        status = json.loads(bench.hope("launch", "status", run.jobs[0], "--json").stdout)
        assert (status["state"], status["total_steps"], status["restarts"]) == ("RUNNING", 400, 0)
        assert status["step"] >= 5
        assert status["tokens_per_s"] > 0
        assert status["estimated_end"] is not None
        assert "step" in bench.hope("launch", "status", run.jobs[0]).stdout
        bench.hope("launch", "requeue", run.jobs[0])
        run.wait("the next start", lambda: len(run.events("started")) == 2)
        restart = int(run.events("started")[1]["from_step"])
        run.reach(restart + 3)
        bench.hope("launch", "cancel", run.jobs[0])
        run.wait("the job to be gone", lambda: run.state(run.jobs[0]) is None)
        following.wait(30)
        text = (bench.folder / "followed.txt").read_text()
        assert f"== start {run.jobs[0]}.1" in text
        assert f"going on from {run.run_dir}/checkpoints/step_{restart:08d}" in text
        assert "signal (STOP file)" in text
        stopped = read_json(run.run_dir / "STOPPED.json")
        assert stopped["reason"] == "signal"
        assert stopped["step"] > restart
        history = json.loads(bench.hope("launch", "history", str(run.run_dir), "--json").stdout)
        assert [(row["start"], row["from_step"], row["to_step"]) for row in history] == [
            (f"{run.jobs[0]}.0", 0, restart),
            (f"{run.jobs[0]}.1", restart, stopped["step"]),
        ]
        assert "stopped on request" in history[-1]["end"]
    finally:
        bench.cluster.settle()
