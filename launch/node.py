"""One node of a job under torchrun: sends all output to this node's log, and becomes torchrun.

`python -m launch.node START SPEC`: the specification is what the supervisor wrote.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from launch.places import read_json
from launch.rank import log_to, node_name


def main() -> None:
    """Does not return."""
    start = Path(sys.argv[1])
    log_to(start / f"{node_name()}.log")
    command = torchrun(read_json(start / "spec.json"), start, int(os.environ.get("SLURM_NODEID", "0")))
    os.execv(command[0], command)


def torchrun(spec: dict[str, Any], start: Path, node: int) -> list[str]:
    """The command line of a node's torchrun. Rank 0 is on node 0, whose address Slurm told: nothing is looked up.

    Should another job's torchrun have the port, then this one's nodes write under a name of their own there.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={spec['nodes']}",
        f"--nproc-per-node={spec['ranks_per_node']}",
        f"--node-rank={node}",
        f"--master-addr={spec['address']}",
        f"--master-port={spec['port']}",
        f"--rdzv-id={hashlib.sha256(str(start).encode()).hexdigest()[:16]}",
        "--max-restarts=0",
        f"--shutdown-timeout={spec['shutdown_s']}",
        "-m",
        "launch.rank",
        str(start),
        *spec["command"],
    ]


if __name__ == "__main__":
    main()
