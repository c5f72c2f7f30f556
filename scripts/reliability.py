"""What a run survives: faults made on purpose on a Slurm cluster of its own, measured, and the result compared.

    python -m scripts.reliability [--scenario NAME …] [--seeds 3] [--out FILE]

Needs Slurm (`make setup-slurm`) and root. Each scenario submits a small Hope to two nodes, makes one thing go wrong at
a step that the seed chooses, waits until the run is complete, and compares every tensor of its last checkpoint with
those of a run that nothing happened to. A line of JSON for each; a table in Markdown at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.places import read_lines
from scripts.slurm_bench import (
    EVERY,
    LONG,
    STEPS,
    Bench,
    Failed,
    Run,
    bench_in,
    same_checkpoint,
    slurm_is_here,
)


@dataclass
class Measured:
    """One repetition of one scenario. Seconds since the fault; None where there is nothing to measure."""

    scenario: str
    seed: int
    fault_step: int | None = None
    """The last step that was logged before the fault."""

    detected_s: float | None = None
    """Until the supervisor (or Slurm) acted."""

    recovered_s: float | None = None
    """Until the next start logged its first step."""

    steps_lost: int | None = None
    """Logged before the fault and trained again."""

    starts: int = 0
    same: bool | None = None
    """Whether the last checkpoint is that of an uninterrupted run, bit for bit."""

    notes: list[str] = field(default_factory=list)


def fault_step(seed: int) -> int:
    """After which step the fault comes: in mid-period of some level, between two scheduled saves."""
    return random.Random(seed).randint(EVERY + 2, 2 * EVERY - 2)


# The scenarios: each makes its fault and returns when the run is complete


def measure(run: Run, measured: Measured, fault: Callable[[], None], at: int, noticed: Callable[[], Any]) -> float:
    """Make the fault after step `at`, and fill in what came of it. Returns the time of the fault."""
    run.reach(at)
    starts = len(run.events("started"))
    before = time.time()
    measured.fault_step = run.step()
    fault()
    run.wait("the fault to be noticed", noticed)
    measured.detected_s = round(time.time() - before, 1)
    begun = run.wait("the next start", lambda: run.events("started")[starts:])[0]
    first = run.wait("the first step after it", lambda: [row for row in run.rows() if row["time"] > begun["time"]][:1])[
        0
    ]
    measured.recovered_s = round(first["time"] - before, 1)
    # What was logged and is not in the checkpoint that the next start goes on from is trained again.
    logged = [row for file in run.run_dir.glob("metrics*.jsonl") for row in read_lines(file)]
    reached = max(row["step"] for row in logged if row["time"] < begun["time"])
    measured.steps_lost = max(reached - int(begun["from_step"]), 0)
    return before


def ended(run: Run) -> Callable[[], Any]:
    """Noticed when a start has noted its end."""
    count = len(run.events("ended"))
    return lambda: run.events("ended")[count:]


def stop_signal(bench: Bench, seed: int, measured: Measured) -> Run:
    """USR1 to the batch script, as before a time limit."""
    run = bench.submit(f"signal-{seed}", f"seed={seed}")
    job = run.jobs[0]
    measure(run, measured, lambda: run.slurm.signal_script(job, "USR1"), fault_step(seed), ended(run))
    return run


def preemption(bench: Bench, seed: int, measured: Measured) -> Run:
    """A job of a higher partition wants all nodes."""
    run = bench.submit(f"preemption-{seed}", f"seed={seed}")
    script = bench.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 4\n")

    def fault() -> None:
        options = ("-p", "urgent", "-N4", "--exclusive", "-t", "1", "-o", "/dev/null")
        run.slurm.submit(str(script), *options)

    measure(run, measured, fault, fault_step(seed), lambda: run.events("asked") or run.events("ended"))
    return run


def killed_rank(bench: Bench, seed: int, measured: Measured) -> Run:
    """`kill -9` of one rank."""
    run = bench.submit(f"kill-{seed}", f"seed={seed}")
    rank = seed % 2
    measure(run, measured, lambda: os.kill(run.rank(rank)["pid"], signal.SIGKILL), fault_step(seed), ended(run))
    return run


def lost_node(bench: Bench, seed: int, measured: Measured) -> Run:
    """`kill -9` of a slurmd: the node is lost to Slurm, and its rank goes on as an orphan."""
    run = bench.submit(f"node-{seed}", f"seed={seed}", *LONG)
    node = "n1" if seed % 2 else "n2"
    job = run.jobs[0]

    def noticed() -> bool:
        found = run.slurm.job(job)
        return found is not None and (found.restarts > 0 or found.state != "RUNNING")

    measure(run, measured, lambda: bench.cluster.kill_node(node), fault_step(seed), noticed)
    measured.notes.append(f"{node} lost; went on on {', '.join(run.events('ranks')[-1]['nodes'])}")
    return run


def drained_node(bench: Bench, seed: int, measured: Measured) -> Run:
    """A node is drained: the job goes on on it, and is elsewhere after its next stop."""
    run = bench.submit(f"drain-{seed}", f"seed={seed}")

    def fault() -> None:
        run.slurm.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        run.slurm.signal_script(run.jobs[0], "USR1")

    measure(run, measured, fault, fault_step(seed), ended(run))
    nodes = run.events("ranks")[-1]["nodes"]
    if "n2" in nodes:
        raise Failed(f"n2 is drained and was used again: {nodes}")
    measured.notes.append(f"went on on {', '.join(nodes)}")
    return run


def hang(bench: Bench, seed: int, measured: Measured) -> Run:
    """SIGSTOP of one rank: the others wait for it, and nothing fails."""
    run = bench.submit(f"hang-{seed}", f"seed={seed}")
    rank = seed % 2
    measure(
        run,
        measured,
        lambda: os.kill(run.rank(rank)["pid"], signal.SIGSTOP),
        fault_step(seed),
        lambda: run.events("hang"),
    )
    dumps = sorted((run.places.start(str(run.events("hang")[0]["start"])) / "stacks").glob("*.txt"))
    for number, dump in enumerate(dumps):
        if "MainThread" not in dump.read_text():
            raise Failed(f"no stack of rank {number}: {dump.read_text()}")
    if len(dumps) != 2:
        raise Failed(f"{len(dumps)} stacks of 2 ranks")
    measured.notes.append("stacks of both ranks")
    return run


def full_disk(bench: Bench, seed: int, measured: Measured, starts: int = 1) -> Run:
    """The run directory's disk is full until so many starts of the job have ended by it."""
    name = f"disk{starts}-{seed}"
    place = bench.folder / name
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120M", "tmpfs", str(place)], check=True)
    try:
        more = ("checkpoint.every=2", f"train.tokens={256 * STEPS}")
        run = bench.submit(name, f"seed={seed}", f"dir={place}/run", *more)
        filler = place / "filler"

        def fault() -> None:
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(b"x" * 65536)
                    file.flush()

        def noticed() -> bool:
            job = run.slurm.job(run.jobs[0])
            enough = job is not None and (job.restarts >= starts or (starts == 1 and bool(run.events("ended"))))
            if enough:
                filler.unlink(missing_ok=True)
            return enough

        measure(run, measured, fault, fault_step(seed), noticed)
        run.complete()
        shutil.copytree(place / "run", bench.folder / "runs" / name)
        return Run(bench, bench.folder / "runs" / name, run.jobs)
    finally:
        bench.cluster.settle()
        subprocess.run(["umount", "-l", str(place)], check=False)


def full_disk_for_long(bench: Bench, seed: int, measured: Measured) -> Run:
    """Two more starts find the disk full."""
    run = full_disk(bench, seed, measured, starts=3)
    measured.notes.append("until the third restart")
    return run


def cancelled(bench: Bench, seed: int, measured: Measured) -> Run:
    """`scancel`: the job must not come back. Resubmitted afterwards, the run goes on."""
    run = bench.submit(f"cancel-{seed}", f"seed={seed}")
    run.reach(fault_step(seed))
    measured.fault_step = run.step()
    before = time.time()
    run.slurm.cancel(run.jobs[0])
    run.wait("the job to be gone", lambda: run.state(run.jobs[0]) is None)
    measured.detected_s = round(time.time() - before, 1)
    time.sleep(10)
    if len(run.events("started")) != 1 or run.state(run.jobs[0]) is not None:
        raise Failed(f"a cancelled job came back\n{run.everything()}")
    measured.notes.append("stayed cancelled; resubmitted by hand")
    bench.hope("launch", "resubmit", str(run.run_dir))
    run.jobs = [str(run.events("submitted")[-1]["job"])]
    return run


def time_limit(bench: Bench, seed: int, measured: Measured) -> Run:
    """The job's own time limit of two minutes, with a signal 30 s before it."""
    run = bench.submit(f"limit-{seed}", f"seed={seed}", *LONG, "--time", "2")
    run.wait("the signal", lambda: run.events("asked"))
    before = float(run.events("asked")[0]["time"])
    measured.fault_step = run.step()
    first = run.wait("the end of the start", lambda: run.events("ended"))[0]
    measured.detected_s = round(first["time"] - before, 1)
    begun = run.wait("the next start", lambda: run.events("started")[1:])[0]
    row = run.wait("its first step", lambda: [row for row in run.rows() if row["time"] > begun["time"]][:1])[0]
    measured.recovered_s, measured.steps_lost = round(row["time"] - before, 1), 0
    measured.notes.append(f"saved at step {first['step']}; `{first['reason']}`")
    return run


STUCK_DISK = """\
# Python runs this when it starts: a disk that stands still while the run is asked to stop.
import os, time
if "RANK" in os.environ:
    flush, run_dir = os.fsync, os.environ["STUCK_DISK"]
    def fsync(file):
        while os.path.exists(f"{run_dir}/STOP"):
            time.sleep(0.1)
        flush(file)
    os.fsync = fsync
"""


def late_save(bench: Bench, seed: int, measured: Measured) -> Run:
    """The save before the time limit is not done when the time is up. Seconds since then."""
    disk = bench.folder / "stuck-disk"
    disk.mkdir(exist_ok=True)
    (disk / "sitecustomize.py").write_text(STUCK_DISK)
    name = f"late-{seed}"
    stuck = {"PYTHONPATH": str(disk), "STUCK_DISK": str(bench.folder / "runs" / name)}
    site = {"environment": {**bench.site["environment"], **stuck}, "survive": {"save_s": 300}}
    run = bench.submit(name, f"seed={seed}", *LONG, "--time", "2", site=site)
    run.wait("the signal", lambda: run.events("asked"))
    job = run.slurm.job(run.jobs[0])
    assert job is not None
    assert job.end is not None
    first = run.wait("the end of the start", lambda: run.events("ended"))[0]
    measured.detected_s = round(first["time"] - job.end, 1)
    measured.fault_step = run.step()
    if first["action"] != "requeue" or "the save was not done in time" not in first["reason"]:
        raise Failed(f"another end: {first}")
    kept = run.places.newest_step()
    bench.hope("checkpoint", "verify", str(run.run_dir))
    run.slurm.update(run.jobs[0], TimeLimit="20")  # once is enough
    begun = run.wait("the next start", lambda: run.events("started")[1:])[0]
    if begun["from_step"] != kept:
        raise Failed(f"went on from step {begun['from_step']}, the newest checkpoint was of {kept}")
    row = run.wait("its first step", lambda: [row for row in run.rows() if row["time"] > begun["time"]][:1])[0]
    measured.recovered_s = round(row["time"] - job.end, 1)
    measured.steps_lost = measured.fault_step - kept
    told = bench.hope("launch", "history", str(run.run_dir), "--json").stdout
    if "the save was not done in time" not in json.loads(told)[0]["end"]:
        raise Failed(f"history does not say it: {told}")
    measured.notes.append(f"went on from step {kept}")
    return run


def chain(bench: Bench, seed: int, measured: Measured) -> Run:
    """Three jobs one after the other; the first two are told to stop as at a time limit."""
    run = bench.submit(f"chain-{seed}", f"seed={seed}", "--chain", "3")
    measure(run, measured, lambda: run.slurm.signal_script(run.jobs[0], "USR1"), 10 + seed % 5, ended(run))
    run.reach(24 + seed % 5)
    run.slurm.signal_script(run.jobs[1], "USR1")
    run.wait("the third job", lambda: len(run.events("started")) == 3)
    used = [str(event["start"]).rpartition(".")[0] for event in run.events("started")]
    if used != run.jobs:
        raise Failed(f"the starts {used} are not those of the jobs {run.jobs}")
    return run


def sick_node(bench: Bench, seed: int, measured: Measured) -> Run:
    """A node fails its health check: the run starts without it."""
    node = f"n{1 + seed % 2}"
    health = {**bench.site["health"], "command": f'test "$SLURMD_NODENAME" != {node}'}
    run = bench.submit(f"sick-{seed}", f"seed={seed}", site={"health": health})
    before = float(run.wait("the first start", lambda: run.events("started"))[0]["time"])
    found = run.wait("the check", lambda: run.events("unhealthy"))[0]
    measured.detected_s = round(found["time"] - before, 1)
    run.reach(1)
    measured.recovered_s, measured.steps_lost = round(run.rows()[0]["time"] - before, 1), 0
    nodes = run.events("ranks")[-1]["nodes"]
    if node in nodes:
        raise Failed(f"{node} is sick and was used: {nodes}")
    measured.notes.append(f"{node} left out, started on {', '.join(nodes)}")
    return run


SCENARIOS: dict[str, Callable[[Bench, int, Measured], Run]] = {
    "signal": stop_signal,
    "preemption": preemption,
    "killed rank": killed_rank,
    "lost node": lost_node,
    "drained node": drained_node,
    "hang": hang,
    "full disk": full_disk,
    "full disk for long": full_disk_for_long,
    "cancelled": cancelled,
    "time limit": time_limit,
    "late save": late_save,
    "chain": chain,
    "sick node": sick_node,
}


def run_scenario(bench: Bench, name: str, seed: int, starts: int | None = None) -> Measured:
    """One repetition. Raises Failed, also where the run did not take `starts` starts (None: any number)."""
    measured = Measured(name, seed)
    try:
        run = SCENARIOS[name](bench, seed, measured)
        run.complete()
        measured.starts = len(run.events("started"))
        if starts not in (None, measured.starts):
            raise Failed(f"{measured.starts} starts, not {starts}\n{run.everything()}")
        tokens = LONG if name in ("time limit", "late save", "lost node") else ()
        measured.same = same_checkpoint(run.run_dir, bench.reference(seed, *tokens))
    finally:
        bench.cluster.settle()
    return measured


def table(rows: list[Measured]) -> str:
    """Medians over the repetitions, with the largest in brackets."""
    lines = [
        "| fault | repetitions | noticed after, s | next step after, s | steps lost | same bits |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.scenario for row in rows):
        some = [row for row in rows if row.scenario == name]
        cells = [_spread([getattr(row, key) for row in some]) for key in ("detected_s", "recovered_s", "steps_lost")]
        same = f"{sum(bool(row.same) for row in some)} of {len(some)}"
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def _spread(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    middle, most = statistics.median(there), max(there)
    return f"{middle:g}" if middle == most else f"{middle:g} ({most:g})"


def main() -> int:
    """Run what the command line asks for. Returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS], help="default: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--first-seed", type=int, default=0, help="of these repetitions")
    parser.add_argument("--folder", type=Path, default=Path("/tmp") / f"hope-reliability-{os.getpid()}")
    parser.add_argument("--out", type=Path, help="append the lines of JSON here")
    parser.add_argument("--table", type=Path, help="only print the table of the lines in this file")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([Measured(**row) for row in read_lines(arguments.table)]))
        return 0
    if not slurm_is_here():
        print("error: no Slurm here, or not root: make setup-slurm", file=sys.stderr)
        return 2
    rows, failed = [], 0
    with bench_in(arguments.folder) as bench:
        for name in arguments.scenario or SCENARIOS:
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                try:
                    row = run_scenario(bench, name, seed)
                except Failed as error:
                    failed += 1
                    print(f"{name}, seed {seed}: FAILED: {error}", flush=True)
                    continue
                rows.append(row)
                failed += not row.same
                line = json.dumps(asdict(row))
                print(line, flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(line + "\n")
    print(table(rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
