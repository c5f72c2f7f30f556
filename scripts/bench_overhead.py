"""Rows `overhead` of `make bench-parallel`: what parallelism costs where there is only one rank to share with."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any
from unittest import mock

Row = dict[str, Any]

OVERHEADS: dict[str, tuple[str, ...] | None] = {
    "as launched": None,
    "data parallelism": ("dp_replicate",),
    "tensor parallelism": ("tp",),
    "both": ("dp_replicate", "tp"),
}
"""Dimensions of the mesh that are made to work although they are 1. None: what `torchrun --nproc-per-node 1` gets."""


def mesh_of_one(dimensions: tuple[str, ...] | None) -> Any:
    """A mesh of this rank alone, as a launcher's environment makes it or with everything that several ranks have.

    Sharding and pipelines of one rank are other engines than the plain one and cannot be engaged.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from hope_train.config.mesh import MeshSizes
    from hope_train.parallel.mesh import DIMENSIONS, Mesh
    from hope_train.parallel.team import Team

    class MeshOfOne(Mesh):
        def group(self, dimension: str) -> Any:
            assert self.device_mesh is not None
            return self.device_mesh.get_group(dimension) if dimensions and dimension in dimensions else None

    device_mesh = init_device_mesh("cpu", (1, 1, 1, 1), mesh_dim_names=DIMENSIONS)
    return MeshOfOne(MeshSizes(), torch.device("cpu"), device_mesh, Team(0, 1, dist.group.WORLD))


def launched_mesh(config: Any) -> Any:
    """The mesh of a rank that a launcher started alone."""
    import torch

    from hope_train.parallel.mesh import open_mesh

    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        return open_mesh(config, torch.device("cpu"))


def overhead(kind: str, config: Any, source: Any, steps: int, plain_first: bool) -> Row:
    """One process's figures for the row of this kind; a process group of one rank is there.

    Both sides in one process, step by step in turn; CPU time of the process, median of the ratios of neighbours.

    plain_first: which side's memory is allocated first.
    """
    import torch

    from hope_train.config.mesh import MeshSizes
    from hope_train.parallel.engine import build_engine
    from hope_train.parallel.mesh import Mesh
    from hope_train.train.step import optimizer_step

    dimensions = OVERHEADS[kind]
    builders = {
        "plain": lambda: build_engine(config, Mesh(MeshSizes(), torch.device("cpu"))),
        "engaged": lambda: build_engine(
            config, launched_mesh(config) if dimensions is None else mesh_of_one(dimensions)
        ),
    }
    sides = {name: builders[name]() for name in (builders if plain_first else reversed(builders))}
    assert (sides["engaged"].spread.tensor is not None) == ("tp" in (dimensions or ()))
    assert (sides["engaged"].data is not None) == ("dp_replicate" in (dimensions or ()))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(steps + 2):
        for name in sides if index % 2 else reversed(sides):
            start = time.process_time()
            loss, _, _ = optimizer_step(sides[name], source, config.train, index, measure=False)
            if index >= 2:  # the first ones allocate
                seconds[name].append(time.process_time() - start)
            losses[name].append(loss)
    difference = max(abs(a - b) / b for a, b in zip(losses["engaged"], losses["plain"], strict=True))
    assert difference < 1e-5, f"the two sides do not train alike: {difference}"
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["engaged"], strict=True)]
    return {
        "row": "overhead",
        "kind": kind,
        "steps": steps,
        "plain_s": statistics.median(seconds["plain"]),
        "engaged_s": statistics.median(seconds["engaged"]),
        "share": statistics.median(ratios) - 1,
    }


def joined(rows: list[Row]) -> Row:
    """One row of those of several processes: their mean, since where a process's memory lies is luck, and the shares of
    all, which say how much of it there was."""
    if failed := [row for row in rows if "error" in row]:
        return failed[0]
    means = {key: statistics.mean(row[key] for row in rows) for key in ("plain_s", "engaged_s", "share")}
    return {**rows[0], **means, "shares": [round(row["share"], 4) for row in rows]}
