"""Processes that `srun` started directly: their places in the job, told as torchrun would tell them. No torch."""

from __future__ import annotations

import re
import subprocess
import zlib
from collections.abc import Mapping, MutableMapping

from hope_train.errors import UserError

PORTS = (20000, 32768)
"""From where to where a rendezvous port is chosen: above what services use, below what systems hand out themselves."""


def adopt_step(environ: MutableMapping[str, str]) -> None:
    """Give a task of a job step with several tasks the variables RANK, WORLD_SIZE, MASTER_ADDR, … of a launcher.

    What a launcher inside the step (torchrun) has set already stays, and outside a job step nothing happens: a batch
    script is one process, however many tasks its job has.

    Raises UserError where Slurm does not say at which address rank 0's node is.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    if "SLURM_STEP_ID" not in environ or "RANK" in environ or "WORLD_SIZE" in environ or tasks in (None, "1"):
        return
    rank = environ["SLURM_PROCID"]
    local = tasks_of_node(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ["SLURM_NODEID"]))
    if "MASTER_ADDR" not in environ:
        # Task 0 is on the first node of the step (which need not be the first of the job, nor where srun was called).
        environ["MASTER_ADDR"] = address_of(first_node(environ["SLURM_STEP_NODELIST"]))
    environ.setdefault("MASTER_PORT", str(rendezvous_port(environ)))
    environ["RANK"] = rank
    environ["WORLD_SIZE"] = str(tasks)
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["LOCAL_WORLD_SIZE"] = str(local)
    environ["GROUP_RANK"] = environ["SLURM_NODEID"]


def rendezvous_port(environ: Mapping[str, str], attempt: int = 0) -> int:
    """A port that all tasks of a step agree on, another one for every start of the job.

    Jobs of two clusters that share a machine may have the same number: the cluster's name is part of it too.
    """
    job, restart = int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_RESTART_COUNT", "0"))
    step = environ.get("SLURM_STEP_ID", "0")
    number = job * 7919 + restart * 101 + attempt * 13 + (int(step) if step.isdigit() else 0)
    number += zlib.crc32(environ.get("SLURM_CLUSTER_NAME", "").encode())
    return PORTS[0] + number % (PORTS[1] - PORTS[0])


def tasks_of_node(text: str, node: int) -> int:
    """Tasks of one node in Slurm's `2(x3),1`: two on each of three nodes, then one."""
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeated or 1)
    return counts[node]


def first_node(nodes: str) -> str:
    """The first name in Slurm's `n[3-5,7],m1`."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]*)\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no node")
    stem, ranges, rest = match[1], match[2], match[3] or ""
    return stem if ranges is None else stem + re.split(r"[-,]", ranges)[0] + rest


def address_of(node: str) -> str:
    """The address of a node as Slurm knows it: names of nodes need not resolve, and localhost is never right."""
    try:
        done = subprocess.run(
            ["scontrol", "-o", "show", "node", node], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"the address of node {node} is not known (scontrol: {error}): set MASTER_ADDR to rank 0's node"
        ) from None
    match = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    if match is None:
        raise UserError(f"scontrol says no address of node {node}: set MASTER_ADDR to rank 0's node")
    return match[1]
