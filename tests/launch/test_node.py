"""What a node of a job starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.node import torchrun

SPEC: dict[str, Any] = {
    "nodes": 2,
    "ranks_per_node": 4,
    "address": "10.0.0.7",
    "port": 20123,
    "shutdown_s": 30,
    "command": ["config.yaml", "seed=1"],
}


def test_a_node_s_torchrun() -> None:
    command = torchrun(SPEC, Path("/runs/a/launch/2.0"), 1)
    assert {"--nnodes=2", "--nproc-per-node=4", "--node-rank=1", "--max-restarts=0"} <= set(command)
    assert {"--master-addr=10.0.0.7", "--master-port=20123"} <= set(command)
    assert command[command.index("launch.rank") :] == ["launch.rank", "/runs/a/launch/2.0", "config.yaml", "seed=1"]


def test_nodes_of_one_start_share_a_name_in_the_store_and_no_other_has_it() -> None:
    names = {
        next(part for part in torchrun(SPEC, Path(start), node) if part.startswith("--rdzv-id="))
        for start in ("/runs/a/launch/2.0", "/runs/a/launch/2.1", "/runs/b/launch/2.0")
        for node in (0, 1)
    }
    assert len(names) == 3
