"""The mesh of a run in numbers: resolved from the configuration and the world, and checked against the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hope_train.config.deepspeed import merged, required
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each dimension. The last dimension varies fastest: tp ranks are neighbours."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that train on different samples, whether their parameters are whole or sharded."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        return f"pp {self.pp} x dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x tp {self.tp}"


def resolve_mesh(config: RunConfig, world: int, training: bool = True) -> MeshSizes:
    """The mesh of `world` ranks that the configuration asks for, with everything that it divides checked.

    training: False leaves the batch and its length out: a model is only measured.

    Raises UserError, with the number to change, where the world, the model or the batch does not fit the mesh.
    """
    sizes = _sizes(config, world)
    _check_tensor_parallel(config, sizes.tp)
    _check_pipeline(config, sizes.pp)
    if training:
        _check_engine(config, sizes)
        check_supported(config, sizes)
        _check_batch(config, sizes)
        _check_micro_batches(config, sizes)
    return sizes


def micro_batches(config: RunConfig, sizes: MeshSizes) -> int:
    """Micro-batches that every data-parallel rank runs in a step, on a batch of full size."""
    train = config.train
    return train.batch_tokens // (sizes.dp * train.micro_batch_size * train.context_length)


def micro_batches_of(config: RunConfig, sizes: MeshSizes) -> tuple[int, ...]:
    """`micro_batches` on every size that a batch has in the run, from the first to the full one."""
    return tuple(rows // (sizes.dp * config.train.micro_batch_size) for rows in config.train.batches.sizes)


def parts_per_rank(config: RunConfig) -> int:
    """Consecutive pipeline parts that a rank holds under the configured schedule."""
    schedule = config.parallel.schedule
    return {"interleaved_1f1b": config.parallel.stages_per_rank, "zbv": 2}.get(schedule, 1)


def deepspeed_tree(config: RunConfig, sizes: MeshSizes) -> dict[str, Any]:
    """What DeepSpeed is given for this run. Raises UserError where a user's own file contradicts the run's."""
    settings = config.parallel.deepspeed
    micro = config.train.micro_batch_size
    return merged(settings, required(settings, micro, micro_batches(config, sizes), sizes.dp))


def _sizes(config: RunConfig, world: int) -> MeshSizes:
    parallel = config.parallel
    fixed = parallel.pp * parallel.dp_shard * parallel.tp
    product = f"parallel.pp*dp_shard*tp = {parallel.pp}*{parallel.dp_shard}*{parallel.tp} = {fixed}"
    if parallel.dp_replicate == "auto":
        if world % fixed:
            raise UserError(
                f"{_ranks(world)} cannot be divided by {product}: start a multiple of {fixed} processes, or make "
                f"these a divisor of {world}"
            )
        return MeshSizes(parallel.pp, world // fixed, parallel.dp_shard, parallel.tp)
    sizes = MeshSizes(parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.tp)
    if sizes.world != world:
        raise UserError(
            f"the mesh {sizes} has {_ranks(sizes.world)}, the job has {world}: start {sizes.world} processes, or say "
            "parallel.dp_replicate=auto"
        )
    return sizes


def check_supported(config: RunConfig, sizes: MeshSizes) -> None:
    """Raises UserError for what the engine `native` cannot train on this mesh."""
    rules = config.optimizer
    if rules.rest_from_period is not None and sizes.dp_shard > 1 and rules.name not in ("adamw", "sgd", "dgd"):
        # Portions are cut by what a rank holds; where rows do not divide ranks would cut them at different places.
        raise UserError(
            f"optimizer.name={rules.name} needs all ranks for a matrix, and with parallel.dp_shard above 1 they wake "
            "resting states at different times: set optimizer.rest_from_period=null"
        )
    if rules.name == "dgd" and config.train.compile == "model":
        raise UserError(
            "optimizer.name=dgd reads the inputs of linear layers, which train.compile=model compiles away: set "
            "train.compile=memory or none"
        )
    if rules.name == "dgd" and sizes.pp > 1 and config.parallel.schedule == "zbv":
        raise UserError(
            "optimizer.name=dgd makes the gradients of a layer's inputs and weights together, which "
            "parallel.schedule=zbv takes apart: set another schedule"
        )
    if config.train.compile == "model" and sizes.pp * sizes.tp * sizes.dp_shard > 1:
        raise UserError(
            "train.compile=model compiles across the exchanges of tensor parallelism and the gathers of sharding, and "
            "is untested in pipelines: set train.compile=memory or none with parallel.tp, pp or dp_shard above 1"
        )


def _check_engine(config: RunConfig, sizes: MeshSizes) -> None:
    """What the engine `deepspeed` cannot do and the native one can."""
    if config.parallel.engine != "deepspeed":
        return
    settings, rules = config.parallel.deepspeed, config.optimizer
    native = "or parallel.engine=native"
    if sizes.pp > 1:
        raise UserError(f"parallel.engine=deepspeed has no pipelines: set parallel.pp=1, {native}")
    if sizes.dp_shard > 1:
        raise UserError(
            "parallel.engine=deepspeed shards by ZeRO, over all data-parallel ranks: set parallel.dp_shard=1 and "
            f"parallel.deepspeed.stage, {native}"
        )
    if sizes.tp > 1 and config.model.vocab_size % sizes.tp:
        raise UserError(
            f"parallel.engine=deepspeed: megatron-core divides a vocabulary evenly, and model.vocab_size="
            f"{config.model.vocab_size} has no {sizes.tp} equal parts: change one of them, {native}"
        )
    used = {rules.name, rules.vectors, rules.embeddings, rules.memories}
    if used != {"adamw"} or rules.matrix_lr_scale != 1.0:
        other = next(iter(sorted(used - {"adamw"})), "adamw with matrix_lr_scale")
        raise UserError(
            f"parallel.engine=deepspeed steps flat runs of numbers, which have no matrices: {other} cannot work on "
            f"them; set optimizer.name=adamw (and vectors, embeddings, memories), {native}"
        )
    if config.parallel.check_collectives:
        raise UserError(
            "parallel.check_collectives counts the native engine's reductions; under parallel.engine=deepspeed every "
            "gradient is reduced at every step: set parallel.check_collectives=false"
        )
    if config.train.compile == "model":
        raise UserError(
            "train.compile=model is untested under parallel.engine=deepspeed: set train.compile=memory or none, "
            f"{native}"
        )
    if settings.offload_optimizer and settings.stage == 0:
        raise UserError("parallel.deepspeed.offload_optimizer=true needs ZeRO: set parallel.deepspeed.stage=1, 2 or 3")
    if settings.offload_parameters and settings.stage != 3:
        raise UserError("parallel.deepspeed.offload_parameters=true needs parallel.deepspeed.stage=3")


def _check_tensor_parallel(config: RunConfig, tp: int) -> None:
    if tp == 1:
        return
    model = config.model
    widths = {f"model.cms.levels[{place}].width": level.width for place, level in enumerate(model.cms.levels)}
    if model.mlp_width is not None:
        widths["model.mlp_width"] = model.mlp_width
    for name, size in {"model.n_heads": model.n_heads, **widths}.items():
        if size % tp:
            raise UserError(f"{name}={size} cannot be divided among parallel.tp={tp} ranks: change one of them")
    if model.arch == "hope" and not model.memory.in_proj:
        raise UserError(
            f"model.memory.in_proj=false slices the residual stream, which parallel.tp={tp} does not split: set "
            "model.memory.in_proj=true, or parallel.tp=1"
        )
    share = -(-model.vocab_size // tp)
    if share * (tp - 1) >= model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} leaves the last of parallel.tp={tp} ranks without a token: lower "
            "parallel.tp"
        )


def _check_pipeline(config: RunConfig, pp: int) -> None:
    if pp == 1:
        return
    layers, parallel = config.model.n_layers, config.parallel
    parts = pp * parts_per_rank(config)
    if parallel.layers_per_stage is not None:
        wanted = list(parallel.layers_per_stage)
        if len(wanted) != parts:
            raise UserError(
                f"parallel.layers_per_stage={wanted} names {len(wanted)} parts: parallel.pp={pp} with "
                f"parallel.schedule={parallel.schedule} needs {parts}"
            )
        if sum(wanted) != layers:
            raise UserError(
                f"parallel.layers_per_stage={wanted} holds {sum(wanted)} layers, model.n_layers is {layers}: change "
                "one of them"
            )
    elif parts > layers:
        raise UserError(
            f"model.n_layers={layers} cannot fill {parts} pipeline parts (parallel.pp={pp} with "
            f"parallel.schedule={parallel.schedule}): lower parallel.pp, or take a schedule with one part per rank"
        )


def _check_batch(config: RunConfig, sizes: MeshSizes) -> None:
    train, tp = config.train, sizes.tp
    divided = config.parallel.engine == "native" and config.parallel.sequence_parallel
    if divided and train.context_length % tp:
        raise UserError(
            f"train.context_length={train.context_length} cannot be divided among parallel.tp={tp} ranks: change one "
            "of them, or set parallel.sequence_parallel=false"
        )
    step, ramp = sizes.dp * train.micro_batch_size, train.batch_ramp
    counts = {
        "train.batch_tokens": train.batch_tokens,
        "train.batch_ramp.start_tokens": ramp.start_tokens,
        "train.batch_ramp.increment_tokens": ramp.increment_tokens,
    }
    for name, tokens in counts.items():
        if tokens is not None and (rows := tokens // train.context_length) % step:
            raise UserError(
                f"{name}={tokens} is {rows} sequences, which {sizes.dp} data-parallel ranks cannot share in "
                f"micro-batches of train.micro_batch_size={train.micro_batch_size}: make {name} a multiple of "
                f"{step * train.context_length}, or change train.micro_batch_size"
            )


def _check_micro_batches(config: RunConfig, sizes: MeshSizes) -> None:
    schedule, pp, counts = config.parallel.schedule, sizes.pp, micro_batches_of(config, sizes)
    if pp == 1:
        return
    names = ["train.batch_tokens"]
    if len(counts) > 1:
        names = [f"train.batch_ramp.{name}" for name in ("start_tokens", "increment_tokens")]
    if schedule == "1f1b" and (count := counts[0]) < pp:
        raise UserError(
            f"parallel.schedule=1f1b cannot run {count} micro-batches over parallel.pp={pp} stages: lower "
            f"train.micro_batch_size, raise {names[0]}, or set parallel.schedule=gpipe"
        )
    for count in counts if schedule == "interleaved_1f1b" else ():
        if count % (rounds := max(1, count // pp)):
            raise UserError(
                f"parallel.schedule=interleaved_1f1b runs {count} micro-batches over parallel.pp={pp} in {rounds} "
                f"rounds, which do not divide them: make {' and '.join(names)} give a multiple of {pp} micro-batches"
            )


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
