"""Sharded data parallelism by set: FSDP2 for what changes at every step, gathers of their own for slow levels.

Every rank of a sharding group holds some rows of each parameter, with their optimizer state. Three kinds of units:

* What has period 1 (the core, a fast level): FSDP2 gathers it around its use and reduce-scatters its gradient once per
  step, in the last backward.
* A slow level that is *kept* (`plan/gathering.py`): plain parameters of the model, whole on every rank, that FSDP2 does
  not know of. It is gathered once, after its update.
* A slow level that is not kept: FSDP2 gathers it around its use, and is never asked to reduce its gradient.

Whichever it is, a slow level's gradients stay whole on their rank, where the optimizer collects them, and are
reduce-scattered once, when its period ends. The optimizer holds plain tensors that share the shards' storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hope_train.levels.schedule import level_of, set_name
from hope_train.model.hope import HopeModel
from hope_train.parallel import collectives
from hope_train.parallel.data import Traffic, check_traffic, sum_tensors, width
from hope_train.parallel.shards import Pending, Unit, cut, finish_sums
from hope_train.parallel.stages import StageModel

ENTRIES = ("hidden", "step", "initial_state")
"""Methods of the model, besides `forward`, that the trainer and the evaluation enter by. In a pipeline they are
`StageModel.ENTRIES`."""


@dataclass(eq=False)
class Held:
    """A parameter of the model and this rank's rows of it."""

    name: str
    """In the unsharded model."""

    set: str
    owner: nn.Module
    leaf: str
    shape: tuple[int, ...]
    """Before sharding (after tensor parallelism)."""

    kept: bool
    """Whole in the model at all times."""

    shard: Tensor
    """What the optimizer holds."""

    unsharded: Tensor | None = None
    """What the model computes with. Under FSDP2 it is known from the first forward on."""


class ShardedData:
    """Gradients and weights of one model that is sharded over a group of ranks, with or without copies of the group.

    Call `before_backward` before every backward of a step and `finish` after the last.
    """

    def __init__(
        self,
        model: HopeModel,
        periods: Mapping[str, int],
        kept: Iterable[int],
        mesh: DeviceMesh,
        shard_group: ProcessGroup,
        replicas: ProcessGroup | None,
        group: ProcessGroup,
    ) -> None:
        """Shard a model on `meta`. Then `materialize`, and fill `weights`.

        Args:
            periods: by set.
            kept: levels that stay whole between their updates.
            mesh: of the sharding group; two-dimensional, copies first, where there are several.
            shard_group: the ranks that hold one copy of the model together.
            replicas: the ranks that hold the same rows; None: there is one copy.
            group: all ranks that train on different samples.
        """
        self.model, self.periods, self.kept = model, dict(periods), frozenset(kept)
        self.shard_group, self.replicas, self.group = shard_group, replicas, group
        self.rank, self.ranks = dist.get_rank(shard_group), dist.get_world_size(shard_group)
        self.step, self.run, self.gathers = Traffic(), Traffic(), Traffic()
        """Bytes reduced since the step began, and since the beginning; bytes gathered since the beginning."""
        self.step_gathers = Traffic()
        """Bytes gathered since the step began."""
        self._last = False
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._slow_units: list[FSDPModule] = []
        self._apply_fsdp(mesh)
        self.held: dict[str, Held] = {}

    # Building

    def _apply_fsdp(self, mesh: DeviceMesh) -> None:
        """Units as the plan counts them: every level of every block, the rest of the block, what is outside of them."""
        levels = [
            (number, level)
            for _, block in self.model.named_blocks()
            if block.cms is not None
            for number, level in enumerate(block.cms.levels)
        ]
        ignored = {p for number, level in levels if number in self.kept for p in level.parameters()}
        for number, level in levels:
            if number not in self.kept:
                self._unit(level, mesh, ignored, set_name(number))
                if self.periods[set_name(number)] > 1:
                    assert isinstance(level, FSDPModule)
                    self._slow_units.append(level)
                    level.register_forward_pre_hook(self._remember)
        for _, block in self.model.named_blocks():
            self._unit(block, mesh, ignored, set_name(None))
            for entry in ("step", "initial_state"):
                register_fsdp_forward_method(block, entry)
        self._unit(self.model, mesh, ignored, set_name(None))
        for entry in StageModel.ENTRIES if isinstance(self.model, StageModel) else ENTRIES:
            register_fsdp_forward_method(self.model, entry)

    def _unit(self, module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], name: str) -> None:
        fully_shard(module, mesh=mesh, ignored_params=ignored)
        assert isinstance(module, FSDPModule)
        # Losses are divided by the tokens of the whole batch: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_reduce_scatter(_ReduceScatter(self, name))  # type: ignore[arg-type]
        module.set_custom_all_gather(_AllGather(self, name))  # type: ignore[arg-type]

    def materialize(self, device: torch.device) -> None:
        """Allocate this rank's rows (and whole kept levels) on a device, without values."""
        self.model.to_empty(device=device)
        for name, parameter in self.model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            kept = not isinstance(parameter, DTensor)
            if isinstance(parameter, DTensor):
                local = parameter.to_local().detach()
            else:
                local = torch.empty_like(cut(parameter.detach(), self.rank, self.ranks))
            self.held[name] = Held(
                name=name,
                set=set_name(level_of(name)),
                owner=self.model.get_submodule(owner),
                leaf=leaf,
                shape=self._shapes[name],
                kept=kept,
                shard=nn.Parameter(local, requires_grad=parameter.requires_grad),
                unsharded=parameter if kept else None,
            )
        self._of = {held.shard: held for held in self.held.values()}
        self.sizes = {name: sum(self._reduced_bytes(unit) for unit in self._units(name)) for name in self.periods}
        """Bytes of one reduction of each set, copies included."""
        self.kept_sizes = {
            name: sum(self._gathered_bytes(unit) for unit in self._units(name)) for name in map(set_name, self.kept)
        }
        """Bytes of one gather of each set that is kept whole."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """This rank's rows of every parameter, live, by name."""
        return {name: held.shard for name, held in self.held.items()}

    def part(self, whole: Tensor) -> Tensor:
        """This rank's rows of a parameter."""
        return cut(whole, self.rank, self.ranks)

    # A step

    def before_backward(self, last: bool) -> None:
        """A backward follows; `last`: the step's last one, in which gradients of period 1 are summed."""
        self._last = last
        assert isinstance(self.model, FSDPModule)
        self.model.set_is_last_backward(last)
        self.model.set_requires_gradient_sync(last)
        for unit in self._slow_units:
            unit.set_requires_gradient_sync(False, recurse=False)

    def begin(self) -> None:
        """A step begins: its traffic is counted from here on."""
        self.step, self.step_gathers = Traffic(), Traffic()
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # an evaluation leaves the outermost unit gathered

    def finish(self) -> None:
        """Give the optimizer the gradients of period 1."""
        for held in self.held.values():
            if self.periods[held.set] == 1:
                grad = getattr(held.owner, held.leaf).grad
                held.shard.grad = None if grad is None else grad.to_local()

    def zero_grad(self) -> None:
        """Drop the gradients of the step wherever they are."""
        for held in self.held.values():
            held.shard.grad = getattr(held.owner, held.leaf).grad = None
            if held.unsharded is not None:
                held.unsharded.grad = None

    def gradient(self, shard: Tensor) -> Tensor | None:
        """Of this step: this rank's rows of the sum where the set has period 1, otherwise the whole of this rank's own
        samples."""
        held = self._of[shard]
        if self.periods[held.set] == 1:
            return shard.grad
        return None if held.unsharded is None else held.unsharded.grad

    def collects(self, shard: Tensor) -> Tensor:
        """A tensor like what `gradient` gives, for parameters of slow sets."""
        return shard.new_empty(()).expand(self._of[shard].shape)

    # Periods

    def close_period(self, name: str, accumulators: Sequence[Tensor]) -> list[Tensor]:
        """Sum what a slow set has collected; this rank's rows of the sums, in the order of the set's parameters."""
        waiting = iter(accumulators)
        pending: list[Pending] = []
        for helds in self._units(name):
            wholes = [next(waiting) for _ in helds]
            unit = self._unit_of(helds)
            pending.append(unit.start_sum(wholes, self.shard_group))
            self.count_reduction(name, unit.numel * wholes[0].element_size())
        return [shard for shards in finish_sums(pending, self.replicas) for shard in shards]

    def count_reduction(self, name: str, size: int) -> None:
        """Note a reduction of a set over the sharding group, and that of its result over the copies."""
        copies = 0 if self.replicas is None else size // self.ranks
        for traffic in (self.step, self.run):
            traffic.add(name, size + copies, 1 if self.replicas is None else 2)

    def reduce(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Sum whole accumulators in place over all ranks: for a checkpoint in mid-period."""
        size, calls = sum_tensors(tensors, self.group)
        for traffic in (self.step, self.run):
            traffic.add(name, size, calls)

    def changed(self, names: Iterable[str]) -> None:
        """Gather those of these sets that are kept whole: their shards have new values."""
        for name in names:
            for helds in self._units(name):
                if not helds[0].kept:
                    continue
                unit = self._unit_of(helds)
                wholes = [held.unsharded for held in helds if held.unsharded is not None]
                with torch.no_grad():
                    unit.gather([held.shard.detach() for held in helds], wholes, self.shard_group)
                self.count_gather(name, self._gathered_bytes(helds))

    def count_gather(self, name: str, size: int) -> None:
        """Note a gather of a set over the sharding group."""
        for traffic in (self.step_gathers, self.gathers):
            traffic.add(name, size)

    def check(self, due: Iterable[str], applied: bool) -> None:
        """As `DataParallel.check`; what is kept whole is gathered where it is due, and never else. Raises RuntimeError
        naming the set."""
        due = set(due)
        check_traffic(self.step, self.sizes, self.periods, due, applied)
        kept = {name: self.periods[name] for name in self.kept_sizes}
        check_traffic(self.step_gathers, self.kept_sizes, kept, due, applied, "gathered")

    # Units

    def _units(self, name: str) -> Iterator[list[Held]]:
        """The parameters of a set by the unit in which they travel, in the model's order."""
        units: dict[str, list[Held]] = {}
        for held in self.held.values():
            if held.set == name:
                place = ".".join(held.name.split(".")[:2]) if held.name.startswith("blocks.") else ""
                units.setdefault(place, []).append(held)
        yield from units.values()

    def _unit_of(self, helds: Sequence[Held]) -> Unit:
        return Unit(tuple(held.shape for held in helds), self.rank, self.ranks)

    def _reduced_bytes(self, helds: Sequence[Held]) -> int:
        size = self._unit_of(helds).numel * width(helds[0].shard, self.periods[helds[0].set])
        return size + (0 if self.replicas is None else size // self.ranks)

    def _gathered_bytes(self, helds: Sequence[Held]) -> int:
        return self._unit_of(helds).numel * helds[0].shard.element_size()

    def _remember(self, level: nn.Module, arguments: Any) -> None:
        """A level that FSDP2 has just gathered is about to compute: with these tensors, which it uses every time."""
        for held in self.held.values():
            if held.unsharded is None and not held.kept and self.periods[held.set] > 1:
                parameter = getattr(held.owner, held.leaf)
                if not isinstance(parameter, DTensor):
                    held.unsharded = parameter


@dataclass
class _Comm:
    """A collective of FSDP2 that is counted. (`torch.distributed.fsdp` takes any object with these methods.)"""

    data: ShardedData
    name: str

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for it."""
        return torch.empty(*size, dtype=dtype, device=device)


class _ReduceScatter(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self.data.count_reduction(self.name, input_tensor.numel() * input_tensor.element_size())
        return collectives.reduce_scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


class _AllGather(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Any:
        self.data.count_gather(self.name, output_tensor.numel() * output_tensor.element_size())
        return collectives.all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
