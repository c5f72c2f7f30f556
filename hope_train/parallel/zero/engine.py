"""The engine `deepspeed`: DeepSpeed's ZeRO for data parallelism, megatron-core's layers for tensor parallelism."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from data_pipelines.batches import Batch
from hope_train.config.mesh import deepspeed_tree
from hope_train.config.train import TrainConfig
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.scoring import Shares
from hope_train.levels.build import build_kind
from hope_train.levels.report import StepReport
from hope_train.parallel.engine import DataShares, Engine, SpreadModel, State, build_spread_model
from hope_train.parallel.fragments import Fragment, Run
from hope_train.parallel.layouts import parameter_of
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.micro import split_rows
from hope_train.parallel.rows import Rows
from hope_train.parallel.zero import megatron, own
from hope_train.parallel.zero.entry import Entry, announce, gather_in_steps
from hope_train.parallel.zero.flat import Flat
from hope_train.parallel.zero.levels import Called, ZeroLevels, ZeroRanks


@dataclass
class ZeroEngine(Engine):
    """A model under DeepSpeed on its mesh. `data` is None: gradients are ZeRO's business."""

    deepspeed: Any = None
    """DeepSpeed's engine."""

    stage: int = 0
    flat: Flat | None = None
    """Where this rank's runs of the parameters lie; None with stage 0, in which it has them whole."""

    held: Mapping[str, Tensor] = field(default_factory=dict)
    """What the optimizer steps: this rank's runs of the parameters, or the parameters, by name."""

    runs: Mapping[str, Run] = field(default_factory=dict)
    """What they are parts of."""

    context_length: int = 1
    """Tokens of a sample."""

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that train on different samples."""
        return self.mesh.data_group()

    @property
    def collectors(self) -> int:
        """One: what a level collects has been reduced at every step."""
        return 1

    def forward_backward(self, batch: Batch, scored: int, train: TrainConfig) -> Tensor:
        """As `Engine.forward_backward`. With stages 2 and 3 gradients travel after every micro-batch."""
        parts = list(split_rows(batch, train.micro_batch_size, self.mesh.device))
        # ZeRO takes the mean over the ranks, and what is wanted is their sum.
        scale = self.mesh.sizes.dp / max(scored, 1)
        sums = []
        for number, (tokens_BT, targets_BT, starts_BT) in enumerate(parts):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(parts) - 1)
            nll, _ = self.deepspeed(
                "loss", tokens_BT, targets_BT, starts_BT, train.loss_chunk, autocast=train.precision == "bf16"
            )
            self.deepspeed.backward(nll * scale, scale_wrt_gas=False)
            sums.append(nll.detach())
        return self.all_rows(torch.stack(sums).double())

    def zero_grad(self) -> None:
        """ZeRO drops its gradients with every step."""

    def check(self, report: StepReport) -> None:
        """Nothing to compare: every gradient travels at every step."""

    def shares(self) -> Shares:
        """With stage 3 every rank has to run the model equally often."""
        if (group := self.data_group) is None:
            return Shares()
        mesh = self.mesh
        return DataShares(mesh.data_rank, mesh.sizes.dp, group, mesh.device, lockstep=self.stage == 3)

    def weights(self) -> dict[str, Tensor]:
        """This rank's runs of the fp32 weights, live."""
        return {name: tensor.detach() for name, tensor in self.held.items()}

    def loaded(self) -> None:
        """Bring the weights that were read into the model."""
        if self.flat is not None:
            self.flat.changed()

    def wrap(self, state: State) -> State:
        """As parts of the whole tensors."""
        return {name: {key: self._wrap(key, tensor) for key, tensor in part.items()} for name, part in state.items()}

    def _wrap(self, entry: str, tensor: Tensor) -> Tensor:
        _, parameter = parameter_of(entry)
        if parameter not in self.runs or tensor.ndim == 0:  # counters are the same on every rank
            return tensor
        return Fragment(tensor.view(-1), self.runs[parameter])

    def rows(self) -> Rows:
        """Stacked accumulators that the native engine has written."""
        return AllRows(self.mesh, runs=self.runs)

    def save_own(self, folder: Path, tag: str, step: int, tokens: int) -> None:
        """DeepSpeed's own save of the weights and the optimizer's state, into `<folder>/<tag>`; all ranks call it.

        step, tokens: global batches and training tokens consumed. Raises OSError or RuntimeError, where it failed.
        """
        # DeepSpeed counts the steps of this process; these are the run's.
        self.deepspeed.global_steps, self.deepspeed.skipped_steps = step, self.optimizer.skipped
        self.deepspeed.global_samples = tokens // self.context_length
        own.save(
            self.deepspeed, folder, tag, own.client_state(self.optimizer, step, tokens, self.model.config.vocab_size)
        )

    def close(self) -> None:
        """Let go of DeepSpeed's and megatron-core's groups."""
        self.deepspeed.destroy()
        forget_groups()


@dataclass(frozen=True)
class AllRows(Rows):
    """Rows of which every rank takes the sum: its own run of it."""

    runs: Mapping[str, Run] = field(default_factory=dict)

    def mine(self, rows: int) -> range:
        """All of them."""
        return range(rows)

    def wrap(self, parameter: str, mine: Tensor, rows: int) -> Tensor:
        """[rows, n], or [rows, *shape] with stage 0."""
        return Fragment(mine.flatten(1), self.runs[parameter], rows)


def build_engine(config: RunConfig, mesh: Mesh, dtype: torch.dtype | None = None) -> ZeroEngine:
    """Model and optimizer of a run under DeepSpeed. Initial weights are, bit for bit, those of one process.

    dtype: of the parameters, which are always fp32 here.
    """
    assert dtype in (None, torch.float32), "parameters are fp32 under this engine"
    settings, tree = config.parallel.deepspeed, deepspeed_tree(config, mesh.sizes)
    deepspeed = open_deepspeed(mesh)
    unit = None
    if mesh.group("tp") is not None:
        megatron.open_groups(mesh.sizes.tp, timedelta(seconds=config.parallel.timeout_s))
        unit = megatron.ModelParallelUnit()
    spread = build_spread_model(config, mesh, tensor_parallel=megatron.MegatronParallel)
    held: dict[str, Tensor] = spread.held()
    names = {parameter: name for name, parameter in held.items()}
    whole = spread_shapes(spread)
    sizes = {name: parameter.numel() for name, parameter in held.items()}

    entry, called = Entry(spread.model), Called(held.values())
    if settings.stage == 3:
        announce(entry)
    try:
        wrapped, zero, _, _ = deepspeed.initialize(
            model=entry, optimizer=called, config=tree, mpu=unit, dist_init_required=False
        )
    except (ValidationError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        if settings.config is None:
            raise
        raise UserError(f"{settings.config}: DeepSpeed does not take it: {error}") from None
    flat = None
    if settings.stage > 0:
        flat = Flat(zero, names)
        held = dict(flat.parameters(held))
    if settings.stage == 3:
        gather_in_steps(entry)
        entry.lead_in()

    optimizer = build_kind(ZeroLevels, held.items(), config, ranks_of(mesh, spread, held, whole, flat))
    optimizer.attach(wrapped.step, called, flat)
    called.written = lambda: own.optimizer_state(optimizer, flat)
    runs = {}
    for name, (shape, dim) in whole.items():
        place = None if flat is None else flat.places[name]
        first, size = (0, sizes[name]) if place is None else (place.first, place.size)
        runs[name] = Run.of(shape, dim, mesh.coordinate("tp"), mesh.sizes.tp, first, first + size)
    return ZeroEngine(
        mesh,
        spread,
        optimizer,
        deepspeed=wrapped,
        stage=settings.stage,
        flat=flat,
        held=held,
        runs=runs,
        context_length=config.train.context_length,
    )


def spread_shapes(spread: SpreadModel) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """By name the shape of a parameter in the unsharded model, and its dimension that tensor parallelism divides."""
    if spread.tensor is None:
        return {name: (tuple(parameter.shape), None) for name, parameter in spread.held().items()}
    return {name: (layout.shape, layout.dim) for name, layout in spread.tensor.layouts.items()}


def ranks_of(
    mesh: Mesh,
    spread: SpreadModel,
    held: Mapping[str, Tensor],
    whole: Mapping[str, tuple[tuple[int, ...], int | None]],
    flat: Flat | None,
) -> ZeroRanks:
    """How the level optimizer asks the other ranks that hold parts of the model."""
    tensor = spread.tensor
    groups = [mesh.group("tp"), None if flat is None else mesh.data_group()]
    replicas = {} if tensor is None else {held[name]: tensor.ranks for name in held if tensor.is_replicated(name)}
    device = mesh.device if flat is None else flat.weights.device
    ranks = ZeroRanks(mesh.team, [group for group in groups if group], replicas, None, mesh.data_rank, device)
    ranks.dimensions_of = {held[name]: len(shape) for name, (shape, _) in whole.items()}
    return ranks


def open_deepspeed(mesh: Mesh) -> Any:
    """Import DeepSpeed, on this process's device and in its group of ranks, and let it speak of problems alone."""
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer versions of torch warn of at every call.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # On CPUs DeepSpeed would first compile, on every rank under one lock, an exchange that inference alone uses; a
    # compiler that was killed leaves the lock, and every later run waits for it without a word.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # one process, which DeepSpeed takes for a group of one
        backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    forget_groups()
    deepspeed.comm.init_distributed(dist_init_required=False)
    return deepspeed


def forget_groups() -> None:
    """Drop what the two libraries remember of the process groups of an earlier engine in this process."""
    from deepspeed.utils import groups

    megatron.close_groups()
    groups._release_process_group_references()
