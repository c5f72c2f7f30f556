"""From a configuration and a mesh to a model and an optimizer that are spread over it: the engine `native`.

One process gets the plain model and pays for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from data_pipelines.batches import Batch, BatchSource
from hope_train.config.mesh import check_supported, micro_batches
from hope_train.config.train import TrainConfig
from hope_train.config.tree import RunConfig
from hope_train.evaluate.scoring import Shares
from hope_train.levels.build import build_optimizer
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.report import StepReport
from hope_train.levels.schedule import LevelPlan, canonical_name, level_of, set_name
from hope_train.model.hope import HopeModel, build_model
from hope_train.parallel import weights
from hope_train.parallel.data import DataParallel
from hope_train.parallel.inputs import watch_layers
from hope_train.parallel.layouts import Layouts, layouts_of
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.micro import split_rows
from hope_train.parallel.pipeline import Pipeline
from hope_train.parallel.ranks import MeshRanks
from hope_train.parallel.rows import Rows
from hope_train.parallel.sharded import ShardedData
from hope_train.parallel.stages import StageModel
from hope_train.parallel.tensor import TensorParallel
from hope_train.parallel.wholes import mesh_wholes
from hope_train.plan.gathering import kept_gathered

State = dict[str, dict[str, Tensor]]
"""As `checkpoint.tensors.State`: by shard set and name."""


@dataclass(frozen=True)
class SpreadModel:
    """A model on a mesh without an optimizer, and how it is spread where ranks have only parts of it."""

    model: HopeModel
    tensor: TensorParallel | None = None
    sharded: ShardedData | None = None
    layouts: Layouts | None = None

    def held(self) -> dict[str, Tensor]:
        """This rank's part of every parameter, live, by name in the unsharded model."""
        if self.sharded is not None:
            return self.sharded.weights
        return {canonical_name(name): parameter for name, parameter in self.model.named_parameters()}

    @property
    def tied(self) -> Tensor | None:
        """This rank's part of a tied matrix, if another pipeline rank has a copy of it."""
        elsewhere = isinstance(self.model, StageModel) and self.model.tied_with is not None
        return self.held()["embed.weight"] if elsewhere else None


@dataclass
class Engine:
    """A model on its mesh. Every rank has one and calls the same methods in the same order."""

    mesh: Mesh
    spread: SpreadModel
    optimizer: LevelOptimizer
    data: DataParallel | ShardedData | None = None
    """None where one rank trains on the whole batch (or several on the same)."""

    pipeline: Pipeline | None = None
    """None where every rank has all layers."""

    check_collectives: bool = False

    @property
    def model(self) -> HopeModel:
        """The model, or this rank's part of it."""
        return self.spread.model

    @property
    def data_group(self) -> ProcessGroup | None:
        """The ranks that train on different samples. None where there is one."""
        return None if self.data is None else self.data.group

    @property
    def collectors(self) -> int:
        """Data-parallel ranks of which each holds what it has collected itself of a slow level's gradients."""
        return self.mesh.sizes.dp

    # A step

    def batch(self, source: BatchSource, index: int) -> Batch:
        """This rank's rows of global batch `index`."""
        return source.batch(index, self.mesh.data_rank, self.mesh.sizes.dp)

    def total_scored(self, scored: int) -> int:
        """Scored tokens of the whole batch, from those of each rank's rows."""
        if self.data_group is None:
            return scored
        return self.mesh.team.total(scored) * self.mesh.sizes.dp // self.mesh.sizes.world

    def forward_backward(self, batch: Batch, scored: int, train: TrainConfig) -> Tensor:
        """Forward and backward of this rank's rows; afterwards the step's gradients are complete.

        Args:
            scored: targets of the whole global batch that are scored: what the summed loss is divided by, so that the
                gradient is the mean over all of them, however they are cut.

        Returns:
            The summed negative log-likelihood (nats, float64) of each micro-batch of all ranks, in the order of the
            batch; the same on every rank.
        """
        device = self.mesh.device
        if self.data is not None:
            self.data.begin()
        if self.pipeline is not None:
            sums_M = self.pipeline.forward_backward(batch, scored, self._before_backward)
            self.finish_backward()
            return self.all_rows(sums_M.double())
        parts = list(split_rows(batch, train.micro_batch_size, device))
        sums = []
        for number, (tokens_BT, targets_BT, starts_BT) in enumerate(parts):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16"):
                nll, _ = self.model.loss(tokens_BT, targets_BT, starts_BT, train.loss_chunk)
            self._before_backward(last=number == len(parts) - 1)
            (nll / max(scored, 1)).backward()
            sums.append(nll.detach())
        self.finish_backward()
        return self.all_rows(torch.stack(sums).double())

    def _before_backward(self, last: bool) -> None:
        if self.data is not None:
            self.data.before_backward(last)

    def zero_grad(self) -> None:
        """Drop the gradients of the step."""
        self.optimizer.zero_grad()
        if self.data is not None:
            self.data.zero_grad()

    def finish_backward(self) -> None:
        """Complete this step's gradients: those of the sets of period 1 are then whole, or this rank's rows of them."""
        if isinstance(self.data, ShardedData):
            self.data.finish()
        if (tensor := self.spread.tensor) is not None:
            replicated = [held for name, held in self.spread.held().items() if tensor.is_replicated(name)]
            grads = [self.optimizer.ranks.gradient(held) for held in replicated]
            tensor.finish_backward([grad for grad in grads if grad is not None])
        if self.pipeline is not None and (tied := self.spread.tied) is not None:
            self.pipeline.add_tied(tied)
        if isinstance(self.data, DataParallel):
            self.data.finish()

    def all_rows(self, mine_M: Tensor) -> Tensor:
        """Figures of the micro-batches of every rank, in the order of the batch, from those of this one."""
        if (group := self.data_group) is None:
            return mine_M
        whole_M = mine_M.new_zeros(self.mesh.sizes.dp * len(mine_M))
        whole_M[self.mesh.data_rank * len(mine_M) :][: len(mine_M)] = mine_M
        dist.all_reduce(whole_M, group=group)
        return whole_M

    def check(self, report: StepReport) -> None:
        """With parallel.check_collectives: raises RuntimeError unless this step's traffic was what the periods say."""
        if self.check_collectives and self.data is not None:
            due = [name for name, part in report.sets.items() if part.due]
            self.data.check(due, report.applied)

    # Evaluation

    def shares(self) -> Shares:
        """How windows are dealt out to the ranks that hold whole models."""
        return shares_of(self.mesh, self.model)

    # Checkpoints

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of every parameter that it holds, live, under the unsharded model's names."""
        return {name: tensor.detach() for name, tensor in self.spread.held().items()}

    def loaded(self) -> None:
        """The tensors of `weights` and of the optimizer's state have been read from a checkpoint."""
        self.optimizer.ranks.changed([part.name for part in self.optimizer.plan.sets])

    def wrap(self, state: State) -> State:
        """The same tensors as parts of whole ones, for a checkpoint that any layout can read."""
        layouts = self.spread.layouts
        return state if layouts is None else {name: layouts.wrap(tensors) for name, tensors in state.items()}

    def rows(self) -> Rows:
        """How accumulators that ranks hold each for itself lie in a checkpoint."""
        return Rows(self.mesh, self.spread.tensor)

    # The end

    def close(self) -> None:
        """The run is over: let go of what others would stumble over."""


class DataShares(Shares):
    """Windows dealt out to the ranks of a data-parallel group."""

    def __init__(
        self, rank: int, ranks: int, group: ProcessGroup, device: torch.device, lockstep: bool = False
    ) -> None:
        self.rank, self.ranks, self.group, self.device = rank, ranks, group, device
        self.lockstep = lockstep

    def join(self, values: list[float]) -> list[float]:
        """One reduction, exact: all addends but one are zero."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        found: list[float] = total.tolist()
        return found


class PipelineShares(Shares):
    """Every rank of a pipeline runs the same windows, and the one with the last part has their scores."""

    def __init__(self, inner: Shares, model: StageModel, device: torch.device) -> None:
        self.rank, self.ranks, self.lockstep = inner.rank, inner.ranks, inner.lockstep
        self.inner, self.model, self.device = inner, model, device

    def join(self, values: list[float]) -> list[float]:
        """Those of the last part's ranks."""
        total = torch.tensor(self.inner.join(values), dtype=torch.float64, device=self.device)
        dist.broadcast(total, group=self.model.group, group_src=self.model.last_rank)
        found: list[float] = total.tolist()
        return found


def shares_of(mesh: Mesh, model: HopeModel) -> Shares:
    """How windows are dealt out over a mesh."""
    shares = Shares()
    if (group := mesh.data_group()) is not None:
        shares = DataShares(mesh.data_rank, mesh.sizes.dp, group, mesh.device, lockstep=mesh.sizes.dp_shard > 1)
    return PipelineShares(shares, model, mesh.device) if isinstance(model, StageModel) else shares


def build_spread_model(
    config: RunConfig,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    tensor_parallel: type[TensorParallel] = TensorParallel,
) -> SpreadModel:
    """The model with its initial weights.

    Args:
        dtype: of the parameters; None: fp32.
        tensor_parallel: who divides it.
    """
    whole = mesh.sizes.pp == mesh.sizes.dp_shard == 1 and mesh.group("tp") is None
    if mesh.device_mesh is None or whole:
        return SpreadModel(build_model(config.model, config.seed).to(mesh.device, dtype))
    with torch.device("meta"):
        if mesh.sizes.pp == 1:
            model = HopeModel(config.model).to(dtype=dtype)
        else:
            model = StageModel(config, mesh.coordinate("pp"), mesh.group("pp")).to(dtype=dtype)
    tensor = sharded = None
    if mesh.group("tp") is not None:
        tensor = tensor_parallel(model, mesh.device_mesh["tp"], config.parallel.sequence_parallel)
        if isinstance(model, StageModel):
            model.region = tensor.region
    if mesh.sizes.dp_shard > 1:
        sharded = shard(model, config, mesh)
        sharded.materialize(mesh.device)
    else:
        model.to_empty(device=mesh.device)

    def part(name: str, whole: Tensor) -> Tensor:
        local = whole if tensor is None else tensor.part(name, whole)
        return local if sharded is None else sharded.part(local)

    spread = SpreadModel(model, tensor, sharded, layouts_of(mesh, tensor, sharded))
    weights.fill(config.model, config.seed, spread.held(), part)
    if sharded is not None:
        sharded.changed(sharded.periods)
    return spread


def shard(model: HopeModel, config: RunConfig, mesh: Mesh) -> ShardedData:
    """Shard a model on `meta` over the mesh; slow levels stay whole as far as `parallel.keep_gathered` says."""
    periods = {part.name: part.period for part in LevelPlan.from_config(config).sets}
    numbers: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        if (level := level_of(name)) is not None:
            numbers[level] = numbers.get(level, 0) + parameter.numel()
    kept = kept_gathered(numbers, {level: periods[set_name(level)] for level in numbers}, config.parallel)
    shard_group, group = mesh.group("dp_shard"), mesh.data_group()
    assert mesh.device_mesh is not None
    assert shard_group is not None
    assert group is not None
    copies = ("dp_replicate",) if mesh.sizes.dp_replicate > 1 else ()
    fsdp_mesh = mesh.device_mesh[(*copies, "dp_shard")]
    return ShardedData(model, periods, kept, fsdp_mesh, shard_group, mesh.group("dp_replicate"), group)


def build_engine(config: RunConfig, mesh: Mesh, dtype: torch.dtype | None = None) -> Engine:
    """Model and optimizer of a run, spread over the mesh. Initial weights are, bit for bit, those of one process.

    Args:
        dtype: of the parameters; None: fp32.

    Raises:
        UserError: the engine cannot do what the configuration asks for.
    """
    check_supported(config, mesh.sizes)
    spread = build_spread_model(config, mesh, dtype)
    tensor, held = spread.tensor, spread.held()
    if mesh.device_mesh is None:
        optimizer = build_optimizer(held.items(), config)
        watch_layers(optimizer, spread.model, config, None)
        return Engine(mesh, spread, optimizer)
    data: DataParallel | ShardedData | None = spread.sharded
    if data is None and (data_group := mesh.data_group()) is not None:
        periods = {part.name: part.period for part in LevelPlan.from_config(config).sets}
        sets: dict[str, list[Tensor]] = {name: [] for name in periods}
        for name, parameter in held.items():
            sets[set_name(level_of(name))].append(parameter)
        late = tensor.replicated() if tensor is not None and tensor.region.sequence_parallel else []
        data = DataParallel(sets, periods, data_group, late if spread.tied is None else [*late, spread.tied])
    replicas = {} if tensor is None else {held[name]: tensor.ranks for name in held if tensor.is_replicated(name)}
    if spread.tied is not None:
        replicas[spread.tied] = 2
    parts = [group for name in ("tp", "dp_shard", "pp") if (group := mesh.group(name)) is not None]
    ranks = MeshRanks(mesh.team, parts, replicas, data, mesh.data_rank, mesh.device)

    def layout(name: str) -> tuple[tuple[int, ...], int | None]:
        if spread.layouts is None:
            return tuple(held[name].shape), None
        return spread.layouts.shapes[name], spread.layouts.tensor_dims.get(name)

    wholes = None if mesh.sizes.world == mesh.sizes.pp else mesh_wholes(held, mesh, layout)
    optimizer = build_optimizer(held.items(), config, ranks, wholes)
    watch_layers(optimizer, spread.model, config, tensor)
    pipeline = None
    if isinstance(spread.model, StageModel):
        pipeline = Pipeline(config, spread.model, micro_batches(config, mesh.sizes))
    return Engine(mesh, spread, optimizer, data, pipeline, config.parallel.check_collectives)
