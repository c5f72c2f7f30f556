"""This process's place in the mesh of a run: its coordinates, its groups, its device."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.parallel.team import Team

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "tp")
"""Of the device mesh, from the slowest to the fastest varying."""


@dataclass(frozen=True)
class Mesh:
    """One process needs neither a device mesh nor process groups: everything is None or 1 there."""

    sizes: MeshSizes
    device: torch.device
    device_mesh: DeviceMesh | None = None
    team: Team = field(default_factory=Team)

    def coordinate(self, dimension: str) -> int:
        """This rank's place along `pp`, `dp_replicate`, `dp_shard` or `tp`."""
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(dimension)

    def group(self, dimension: str) -> ProcessGroup | None:
        """The ranks that differ from this one in that coordinate alone. None where it is the only one."""
        if self.device_mesh is None or getattr(self.sizes, dimension) == 1:
            return None
        return self.device_mesh.get_group(dimension)

    def data_group(self) -> ProcessGroup | None:
        """The ranks that train on different samples. None where this is the only one."""
        if self.sizes.dp_shard == 1 or self.device_mesh is None:
            return self.group("dp_replicate")
        if self.sizes.dp_replicate == 1:
            return self.group("dp_shard")
        return self.device_mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()

    def parts(self, *dimensions: str) -> DeviceMesh:
        """The mesh of the ranks that hold parts of one parameter, along these dimensions in this order."""
        assert self.device_mesh is not None
        if list(dimensions) == [name for name in DIMENSIONS if name in dimensions]:
            return self.device_mesh[dimensions]
        order = (*(name for name in DIMENSIONS if name not in dimensions), *dimensions)
        ranks = self.device_mesh.mesh.permute(*(DIMENSIONS.index(name) for name in order))
        return DeviceMesh(self.device.type, ranks, mesh_dim_names=order)[dimensions]

    @property
    def data_rank(self) -> int:
        """Which of `sizes.dp` parts of a batch this rank trains on."""
        return self.coordinate("dp_replicate") * self.sizes.dp_shard + self.coordinate("dp_shard")


def world_size() -> int:
    """Processes of this job, by the environment that torchrun (or a launcher like it) makes. Raises UserError."""
    return dist.get_world_size() if dist.is_initialized() else _told("WORLD_SIZE", default=1, least=1)


def process_rank() -> int:
    """This process's number in the job. Raises UserError."""
    return dist.get_rank() if dist.is_initialized() else _told("RANK", default=0, least=0)


def _told(name: str, default: int, least: int) -> int:
    """A number that a launcher has put into the environment."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} in the environment is not a launcher's: start with torchrun, or unset {name}")
    return int(text)


def open_mesh(config: RunConfig, device: torch.device, training: bool = True) -> Mesh:
    """Join the other processes of the job; one process alone joins nobody.

    training: False where a model is only measured: see `resolve_mesh`.

    Raises UserError where the configuration does not fit the world, or this process has no device.
    """
    sizes = resolve_mesh(config, world_size(), training)
    if sizes.world == 1:
        return Mesh(sizes, device)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    device = join(device, timeout)
    shape = (sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.tp)
    device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=DIMENSIONS)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Mesh(sizes, device, device_mesh, Team(dist.get_rank(), sizes.world, control))


def join(device: torch.device, timeout: timedelta | None = None) -> torch.device:
    """Make the process group of all processes, if there is none yet. Returns this process's device.

    Raises UserError for an environment that is not a launcher's, and for a process without a GPU of its own.
    """
    if device.type == "cuda":
        device = own_gpu()
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={world_size()} is set and {missing[0]} is not: start with torchrun --nproc-per-node N, or "
                "unset WORLD_SIZE for one process"
            )
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return device


def close_mesh() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_gpu() -> torch.device:
    """The GPU of this process among those of its node. Raises UserError if there is none for it."""
    place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= there:
        raise UserError(
            f"process {place} of this node has no GPU: there are {there}; start torchrun with --nproc-per-node {there}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
