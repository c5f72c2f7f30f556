"""How a run is spread over devices: the mesh, and what travels on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section
from hope_train.config.deepspeed import DeepSpeedConfig


class ParallelConfig(Section):
    """A mesh pp x dp_replicate x dp_shard x tp. One process alone needs none of it."""

    engine: Literal["native", "deepspeed"] = "native"
    """Who spreads the run over the mesh: this project's own engine on torch, or DeepSpeed's ZeRO over megatron-core's
    layers (no pp, no dp_shard; only optimizer.name=adamw). Checkpoints are the same."""

    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """engine=deepspeed: ZeRO."""

    pp: int = Field(1, ge=1)
    """Pipeline stages: layers are cut into this many consecutive parts, one per group of ranks."""

    dp_replicate: int | Literal["auto"] = "auto"
    """Copies of the (maybe sharded) model that train on different samples. auto: what the world leaves for it."""

    dp_shard: int = Field(1, ge=1)
    """Ranks over which each copy's parameters, gradients and optimizer state are sharded (FSDP2); with dp_replicate
    above 1 this is HSDP, and 1 is plain data parallelism."""

    tp: int = Field(1, ge=1)
    """Tensor parallelism: heads, hidden widths and the vocabulary are split over this many ranks."""

    sequence_parallel: bool = True
    """tp with engine=native: norms, CMS inputs and the residual stream are split along the tokens between the split
    products."""

    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv"] = "1f1b"
    """pp: order of the micro-batches (torch.distributed.pipelining)."""

    stages_per_rank: int = Field(2, ge=2)
    """pp: consecutive parts per rank of interleaved_1f1b; zbv always has 2, the others 1."""

    layers_per_stage: tuple[int, ...] | None = None
    """pp: layers of each part from the first to the last. null: balanced by cost."""

    keep_gathered: Literal["auto", "always", "never"] = "auto"
    """dp_shard: whether a level that is not due stays gathered between its updates. auto: it does, slowest level
    first, while `keep_gathered_gib` lasts."""

    keep_gathered_gib: float = Field(8.0, ge=0.0)
    """dp_shard: memory per device that gathered levels and their accumulators may take with keep_gathered=auto, GiB."""

    check_collectives: bool = False
    """Count the data-parallel collectives of every level and stop when they are not one per period (debugging)."""

    timeout_s: float = Field(1800.0, gt=0.0)
    """A collective that takes longer ends the run."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if isinstance(self.dp_replicate, int) and self.dp_replicate < 1:
            raise ValueError(f"dp_replicate={self.dp_replicate}: at least 1, or auto")
        if self.layers_per_stage is not None and any(layers < 1 for layers in self.layers_per_stage):
            raise ValueError(f"layers_per_stage={list(self.layers_per_stage)}: every part needs at least one layer")
        return self
