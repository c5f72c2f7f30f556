"""Chosen ranks of a large mesh built one after the other in this process: shapes without storage, groups without peers.

The model is on torch's meta device and the process group is torch's fake one, so that 512 ranks need neither memory nor
processes. What is built is what the engine would build: the tensor-parallel plan, the stage's layers, FSDP2's shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.model.hope import HopeModel
from hope_train.optim.kinds import kind_of, rule_of
from hope_train.optim.rule import make_rule
from hope_train.optim.wholes import Wholes
from hope_train.parallel.engine import shard
from hope_train.parallel.mesh import DIMENSIONS, Mesh
from hope_train.parallel.shards import Unit
from hope_train.parallel.stages import StageModel
from hope_train.parallel.tensor import TensorParallel

Place = tuple[int, int, int, int]
"""Coordinates along `DIMENSIONS`."""


@dataclass(frozen=True)
class Held:
    """What one rank holds."""

    place: Place
    shapes: dict[str, tuple[int, ...]]
    """After tensor and pipeline parallelism, before sharding, under the unsharded model's names."""

    numbers: dict[str, int]
    """Parameters after sharding, padding included."""

    state: int
    """Bytes that the update rules keep."""


def build_ranks(config: RunConfig, sizes: MeshSizes, places: Sequence[Place]) -> Iterator[Held]:
    """What the ranks at `places` of the mesh hold. Needs no other process and next to no memory.

    Raises UserError inside a distributed job.
    """
    if dist.is_initialized():
        raise UserError("a dry run plays every rank itself: start it as one process, not under torchrun")
    shape = tuple(getattr(sizes, name) for name in DIMENSIONS)
    for place in places:
        rank = 0
        for coordinate, size in zip(place, shape, strict=True):
            rank = rank * size + coordinate
        with fake_group(rank, sizes.world):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
            yield _build(config, sizes, mesh, place)


@contextmanager
def fake_group(rank: int, world: int) -> Iterator[None]:
    """A process group in which this process is rank `rank` of `world` and collectives do nothing."""
    # Under torch's testing tools, though made for this: it comes with every torch this project allows.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _build(config: RunConfig, sizes: MeshSizes, mesh: DeviceMesh, place: Place) -> Held:
    with torch.device("meta"):
        model: HopeModel = HopeModel(config.model) if sizes.pp == 1 else StageModel(config, place[0])
    if sizes.tp > 1:
        TensorParallel(model, mesh["tp"], config.parallel.sequence_parallel)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if sizes.dp_shard > 1:
        shard(model, config, Mesh(sizes, torch.device("cpu"), mesh))
        numbers = dict(_padded(model, sizes.dp_shard))
    else:
        numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Held(place, shapes, numbers, _state_bytes(config, shapes, numbers))


class _NamedWholes(Wholes):
    """Whole shapes of parameters whose shards have lost theirs."""

    def __init__(self, shapes: dict[torch.Tensor, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return self.shapes[parameter]


def _state_bytes(config: RunConfig, shapes: dict[str, tuple[int, ...]], numbers: dict[str, int]) -> int:
    """What the rules keep of parameters that have so many numbers on this rank."""
    with torch.device("meta"):
        whole = {name: tuple(p.shape) for name, p in HopeModel(config.model).named_parameters()}
    owned = {name: torch.empty(count, device="meta") for name, count in numbers.items()}
    rule = make_rule(config.optimizer, _NamedWholes({tensor: whole[name] for name, tensor in owned.items()}))
    total = 0
    for name, tensor in owned.items():
        group = {"rule": rule_of(config.optimizer, kind_of(name, len(shapes[name])))}
        total += sum(entry.nbytes for entry in rule.initial_state(tensor, group).values() if entry.ndim)
    return total


def _padded(model: nn.Module, ranks: int) -> Iterator[tuple[str, int]]:
    """Names and the numbers that a rank stores of each, padding included: FSDP2's, or of a level that is kept whole
    the rows that the optimizer holds."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        group = module._get_fsdp_state()._fsdp_param_group
        for held in group.fsdp_params if group is not None else ():
            yield names.pop(held.sharded_param), held._sharded_param_data.numel()
    for parameter, name in names.items():
        yield name, sum(Unit((tuple(parameter.shape),), 0, ranks).sizes)
