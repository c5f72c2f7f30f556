"""Is this node fit to train on? `python -m launch.health START`, one task per node; it writes what it found.

The check of the nodes together (a small all-reduce) comes last, so that a node that hangs in it has said the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.places import read_json, write_json
from launch.rank import log_to, node_name
from launch.site import Health

GIB = 2**30


def main() -> int:
    """Check this node. Returns 0; what is wrong stands in the report."""
    start = Path(sys.argv[1])
    log_to(start / f"{node_name()}.log")
    spec = read_json(start / "health.json")
    rules = Health.model_validate(spec["rules"])
    report = start / "health" / f"{node_name()}.json"
    problems = list(local_problems(rules, spec["gpus"], start))
    write_json(report, {"node": node_name(), "problems": problems, "together": None})
    if rules.all_reduce and spec["nodes"] > 1:
        together = all_reduce_problem(spec)
        write_json(report, {"node": node_name(), "problems": problems, "together": together or "ok"})
    return 0


def local_problems(rules: Health, gpus: int, start: Path) -> Iterator[str]:
    """What this node lacks by itself, in words."""
    there = gpu_count() if gpus else 0
    if there < gpus:
        yield f"{there} GPUs answer, {gpus} are wanted"
    free = free_memory()
    if free is not None and free < rules.min_memory_gib * GIB:
        yield f"{free / GIB:.1f} GiB of memory free, {rules.min_memory_gib:g} are wanted"
    for folder in rules.disks:
        yield from disk_problems(Path(folder), rules.min_disk_gib)
    skew = clock_skew(start)
    if abs(skew) > rules.max_clock_skew_s:
        yield f"its clock is {skew:+.0f} s off the file system's"
    if rules.command is not None:
        yield from command_problems(rules.command, rules.timeout_s)


def gpu_count() -> int:
    """GPUs whose driver answers."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def free_memory() -> int | None:
    """Bytes of memory that can be had; None where Linux does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def disk_problems(folder: Path, wanted_gib: float) -> Iterator[str]:
    """Whether a node-local folder can be written and has space."""
    try:
        free = shutil.disk_usage(folder).free
        probe = folder / f".hope-health-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        yield f"{folder}: {error.strerror or error}"
        return
    if free < wanted_gib * GIB:
        yield f"{folder} has {free / GIB:.1f} GiB free, {wanted_gib:g} are wanted"


def clock_skew(start: Path) -> float:
    """Seconds by which this clock is ahead of the file system's."""
    probe = start / "health" / f".clock-{node_name()}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    skew = time.time() - probe.stat().st_mtime
    probe.unlink()
    return skew


def command_problems(command: str, timeout_s: float) -> Iterator[str]:
    """The site's own check."""
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        yield f"{command}: {error}"
        return
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()
        yield f"{command}: exit code {done.returncode}" + (f": {last[-1]}" if last else "")


def all_reduce_problem(spec: dict[str, Any]) -> str | None:
    """Sum a small tensor over one process per node; what went wrong, or None."""
    import torch
    import torch.distributed as dist

    rank, nodes = int(os.environ.get("SLURM_PROCID", "0")), spec["nodes"]
    cuda = spec["gpus"] > 0 and torch.cuda.is_available()
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{spec['address']}:{spec['port']}",
            rank=rank,
            world_size=nodes,
            timeout=timedelta(seconds=spec["rules"]["timeout_s"]),
        )
        tensor = torch.full((1024,), float(rank + 1), device="cuda" if cuda else "cpu")
        dist.all_reduce(tensor)
        wanted = nodes * (nodes + 1) / 2
        wrong = not bool((tensor == wanted).all())
        dist.destroy_process_group()
        return f"the all-reduce gave {tensor[0].item()}, not {wanted}" if wrong else None
    except Exception as error:
        return f"all-reduce: {' '.join(str(error).split())[:300]}"


def sick_nodes(folder: Path, nodes: list[str]) -> dict[str, str]:
    """Nodes that are not healthy, and why, by their reports; one without a report did not answer.

    A failed all-reduce alone names no node unless some did not come back from it while others did.
    """
    found: dict[str, str] = {}
    reports = {node: read_json(folder / f"{node}.json") for node in nodes}
    back = [node for node, report in reports.items() if report.get("together") == "ok"]
    for node, report in reports.items():
        if not report:
            found[node] = "did not answer"
        elif report["problems"]:
            found[node] = "; ".join(report["problems"])
        elif back and report["together"] != "ok":
            found[node] = report["together"] or "did not come back from the all-reduce"
    return found


def together_problem(folder: Path, nodes: list[str]) -> str | None:
    """What the nodes could not do together, where none of them is to blame by itself."""
    said = {str(read_json(folder / f"{node}.json").get("together")) for node in nodes}
    return None if said <= {"ok", "None"} else json.dumps(sorted(said - {"ok", "None"}))


if __name__ == "__main__":
    sys.exit(main())
