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
from hope_train.config.train import TrainConfig
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.scoring import Shares
from hope_train.levels.build import build_optimizer
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.report import StepReport
from hope_train.levels.schedule import LevelPlan, canonical_name, level_of, set_name
from hope_train.model.hope import HopeModel, build_model
from hope_train.optim.dgd import SumRanks
from hope_train.optim.mixed import MixedRule
from hope_train.parallel import collectives
from hope_train.parallel.data import DataParallel
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.micro import micro_batches
from hope_train.parallel.plan import Split, split_of_module
from hope_train.parallel.ranks import MeshRanks
from hope_train.parallel.rows import Rows
from hope_train.parallel.tensor import TensorParallel
from hope_train.parallel.wholes import mesh_wholes

State = dict[str, dict[str, Tensor]]
"""As `checkpoint.tensors.State`: by shard set and name."""


@dataclass
class Engine:
    """A model on its mesh. Every rank has one and calls the same methods in the same order."""

    mesh: Mesh
    model: HopeModel
    optimizer: LevelOptimizer
    tensor: TensorParallel | None = None
    """None where every rank has the whole model."""

    data: DataParallel | None = None
    """None where one rank trains on the whole batch (or several on the same)."""

    check_collectives: bool = False

    # A step

    def batch(self, source: BatchSource, index: int) -> Batch:
        """This rank's rows of global batch `index`."""
        return source.batch(index, self.mesh.data_rank, self.mesh.sizes.dp)

    def total_scored(self, scored: int) -> int:
        """Scored tokens of the whole batch, from those of each rank's rows."""
        if self.data is None:
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
        parts = list(micro_batches(batch, train.micro_batch_size, device))
        sums = []
        for number, (tokens_BT, targets_BT, starts_BT) in enumerate(parts):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16"):
                nll, _ = self.model.loss(tokens_BT, targets_BT, starts_BT, train.loss_chunk)
            if number == len(parts) - 1 and self.data is not None:
                self.data.arm()
            (nll / max(scored, 1)).backward()
            sums.append(nll.detach())
        self.finish_backward()
        return self.all_rows(torch.stack(sums).double())

    def zero_grad(self) -> None:
        """Drop the gradients of the step."""
        self.optimizer.zero_grad()

    def finish_backward(self) -> None:
        """Complete this step's gradients: those of the sets of period 1 are then whole on every rank."""
        if self.tensor is not None:
            self.tensor.finish_backward()
        if self.data is not None:
            self.data.finish()

    def all_rows(self, mine_M: Tensor) -> Tensor:
        """Figures of the micro-batches of every rank, in the order of the batch, from those of this one."""
        if self.data is None:
            return mine_M
        whole_M = mine_M.new_zeros(self.mesh.sizes.dp * len(mine_M))
        whole_M[self.mesh.data_rank * len(mine_M) :][: len(mine_M)] = mine_M
        dist.all_reduce(whole_M, group=self.data.group)
        return whole_M

    def check(self, report: StepReport) -> None:
        """With parallel.check_collectives: raises RuntimeError unless this step's traffic was what the periods say."""
        if self.check_collectives and self.data is not None:
            due = [name for name, part in report.sets.items() if part.due]
            self.data.check(due, report.applied)

    # Evaluation

    def shares(self) -> Shares:
        """How windows are dealt out to the ranks that hold whole models."""
        return shares_of(self.mesh)

    # Checkpoints

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of every parameter that it holds, live, under the unsharded model's names."""
        return {canonical_name(name): tensor.detach() for name, tensor in self.model.state_dict().items()}

    def loaded(self) -> None:
        """The tensors of `weights` and of the optimizer's state have been read from a checkpoint."""
        self.optimizer.ranks.changed([part.name for part in self.optimizer.plan.sets])

    def wrap(self, state: State) -> State:
        """The same tensors as parts of whole ones, for a checkpoint that any layout can read."""
        if self.tensor is None:
            return state
        return {name: self.tensor.wrap(tensors) for name, tensors in state.items()}

    def rows(self) -> Rows:
        """How accumulators that ranks hold each for itself lie in a checkpoint."""
        return Rows(self.mesh, self.tensor)


class DataShares(Shares):
    """Windows dealt out to the ranks of a data-parallel group."""

    def __init__(self, rank: int, ranks: int, group: ProcessGroup, device: torch.device) -> None:
        self.rank, self.ranks, self.group, self.device = rank, ranks, group, device

    def join(self, values: list[float]) -> list[float]:
        """One reduction, exact: all addends but one are zero."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        found: list[float] = total.tolist()
        return found


def shares_of(mesh: Mesh) -> Shares:
    """How windows are dealt out over a mesh."""
    if (group := mesh.group("dp_replicate")) is None:
        return Shares()
    return DataShares(mesh.data_rank, mesh.sizes.dp, group, mesh.device)


def check_supported(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError for what this engine cannot train."""
    check_sizes(mesh)
    if config.optimizer.name == "dgd" and config.train.compile == "model":
        raise UserError(
            "optimizer.name=dgd reads the inputs of linear layers, which train.compile=model compiles away: set "
            "train.compile=memory or none"
        )
    if mesh.sizes.tp > 1 and config.train.compile == "model":
        raise UserError(
            "train.compile=model compiles across the exchanges of tensor parallelism: set train.compile=memory or none "
            "with parallel.tp above 1"
        )


def check_sizes(mesh: Mesh) -> None:
    """Raises UserError for a mesh that this engine cannot put a model on."""
    if mesh.sizes.pp > 1:
        raise UserError(f"parallel.pp={mesh.sizes.pp}: pipelines are not built yet; set parallel.pp=1 and use tp or dp")
    if mesh.sizes.dp_shard > 1:
        raise UserError(
            f"parallel.dp_shard={mesh.sizes.dp_shard}: sharded data parallelism is not built yet; set "
            "parallel.dp_shard=1 and use dp_replicate"
        )


def build_spread_model(
    config: RunConfig, mesh: Mesh, dtype: torch.dtype | None = None
) -> tuple[HopeModel, TensorParallel | None]:
    """The model alone, with its initial weights; and its parts, where ranks have only parts of it. Raises UserError."""
    check_sizes(mesh)
    tensor = None
    if mesh.device_mesh is None or mesh.group("tp") is None:
        model = build_model(config.model, config.seed).to(mesh.device, dtype)
    else:
        with torch.device("meta"):
            model = HopeModel(config.model)
        tensor = TensorParallel(model, mesh.device_mesh["tp"], config.parallel.sequence_parallel)
        tensor.fill(config.seed, mesh.device, dtype)
    return model, tensor


def watch_layers(optimizer: LevelOptimizer, model: HopeModel, config: RunConfig, tensor: TensorParallel | None) -> None:
    """Let a rule that makes gradients of its own see the inputs of linear layers."""

    def over_ranks(name: str) -> SumRanks | None:
        if tensor is None or split_of_module(name) is not Split.ROWWISE:
            return None
        return lambda partial: collectives.sum_over_ranks(partial, tensor.group)

    if isinstance(optimizer.rule, MixedRule):
        optimizer.rule.watch(model, config.train.batch_tokens, over_ranks)


def build_engine(config: RunConfig, mesh: Mesh, dtype: torch.dtype | None = None) -> Engine:
    """Model and optimizer of a run, spread over the mesh. Initial weights are, bit for bit, those of one process.

    Args:
        dtype: of the parameters; None: fp32.

    Raises:
        UserError: the engine cannot do what the configuration asks for.
    """
    check_supported(config, mesh)
    model, tensor = build_spread_model(config, mesh, dtype)
    if mesh.device_mesh is None:
        optimizer = build_optimizer(model.named_parameters(), config)
        watch_layers(optimizer, model, config, None)
        return Engine(mesh, model, optimizer)
    replicated = [] if tensor is None else tensor.replicated()
    data = None
    if (data_group := mesh.group("dp_replicate")) is not None:
        plan = LevelPlan.from_config(config)
        sets: dict[str, list[Tensor]] = {part.name: [] for part in plan.sets}
        for name, parameter in model.named_parameters():
            sets[set_name(level_of(name))].append(parameter)
        late = replicated if tensor is not None and tensor.region.sequence_parallel else []
        data = DataParallel(sets, {part.name: part.period for part in plan.sets}, data_group, late)
    ranks = MeshRanks(
        mesh.team,
        None if tensor is None else tensor.group,
        replicated,
        data,
        mesh.data_rank,
        mesh.device,
    )

    def layout(name: str) -> tuple[tuple[int, ...], int | None]:
        if tensor is None:
            return tuple(model.get_parameter(name).shape), None
        return tensor.layouts[name].shape, tensor.layouts[name].dim

    wholes = mesh_wholes(dict(model.named_parameters()), mesh, layout)
    optimizer = build_optimizer(model.named_parameters(), config, ranks, wholes)
    watch_layers(optimizer, model, config, tensor)
    return Engine(mesh, model, optimizer, tensor, data, config.parallel.check_collectives)
