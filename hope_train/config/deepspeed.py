"""Settings of the engine `deepspeed`, and the configuration that DeepSpeed itself is given. No torch, no DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hope_train.config.base import Section
from hope_train.errors import UserError


class DeepSpeedConfig(Section):
    """The engine `deepspeed`: ZeRO over data parallelism, megatron-core's layers for tensor parallelism."""

    stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over the data-parallel ranks: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters
    too."""

    offload_optimizer: bool = False
    """Stages 1 to 3: weights that are stepped, and the optimizer's state, are in host memory and stepped there."""

    offload_parameters: bool = False
    """Stage 3: parameters are in host memory while they are not used."""

    own_saves: bool = False
    """At every checkpoint DeepSpeed saves too, in its own layout (`<run>/deepspeed/<step>/`), for its tools and other
    programs. Checkpoints are waited for then, whatever checkpoint.async_save says. The run never goes on from these."""

    config: str | None = None
    """A DeepSpeed configuration file (JSON) to lay under what this engine sets. What it decides otherwise than this
    run's configuration is refused by name. null: none."""


Tree = dict[str, Any]

NOT_OURS = {
    "optimizer": "the optimizer is the run's: set the section optimizer",
    "scheduler": "each level has a schedule of its own: set optimizer.schedule",
    "fp16": "set train.precision=bf16",
    "bf16": "set train.precision",
    "bfloat16": "set train.precision",
    "amp": "set train.precision",
    "torch_autocast": "set train.precision",
    "data_types": "gradients and moments are fp32",
    "pipeline": "this engine has no pipelines: set parallel.engine=native and parallel.pp",
    "tensor_parallel": "set parallel.tp",
    "sequence_parallel_size": "this engine divides no sequences",
    "data_parallel_size": "it is what parallel.tp leaves of the ranks",
    "compression_training": "it changes the model",
    "data_efficiency": "it changes the data: set the section data",
    "curriculum_learning": "it changes the data: set the section data",
    "progressive_layer_drop": "it changes the model",
    "hybrid_engine": "it is for generation between steps",
    "zenflow": "it steps parameters at other times than their levels",
    "expert_parallel": "the model has no experts",
    "elasticity": "it changes the batch: set train.batch_tokens",
    "checkpoint": "checkpoints are the run's own: set the section checkpoint",
    "load_universal_checkpoint": "checkpoints are the run's own",
    "autotuning": "it starts runs of its own",
    "compile": "set train.compile",
}
"""Sections of DeepSpeed's configuration that decide what this run's configuration decides, and what to do instead."""

NOT_OURS_OF_ZERO = {
    "zenflow": "it steps parameters at other times than their levels",
    "zero_quantized_gradients": "gradients would be rounded",
    "zero_quantized_weights": "weights would be rounded",
    "zero_quantized_nontrainable_weights": "weights would be rounded",
    "zero_hpz_partition_size": "its second copies of the weights are not kept up when a checkpoint is read",
    "cpu_offload": "set parallel.deepspeed.offload_optimizer",
    "cpu_offload_param": "set parallel.deepspeed.offload_parameters",
    "elastic_checkpoint": "checkpoints are the run's own",
    "mics_shard_size": "its copies of the shards are not known to the norms",
}
"""As `NOT_OURS`, in its section `zero_optimization`."""


def required(settings: DeepSpeedConfig, micro_batch_size: int, micro_batches: int, data_ranks: int) -> Tree:
    """What the engine needs of DeepSpeed, in the words of its configuration file.

    Args:
        micro_batch_size: sequences of a micro-batch.
        micro_batches: of each data-parallel rank in a step.
        data_ranks: ranks that train on different samples.
    """
    zero: Tree = {"stage": settings.stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if settings.stage in (1, 2) and not settings.offload_optimizer:
        zero["compute_grad_norm"] = False
    if settings.stage == 3:
        # All parameters in one piece, so that the optimizer is called once a step and sees all of them.
        zero["sub_group_size"] = 10**15
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * data_ranks,
        "managed_gradient_accumulation": True,
        "gradient_allreduce_op": "mean",
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


WHY = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_tokens",
    "train_batch_size": "train.batch_tokens",
    "gradient_clipping": "train.clip_norm, which holds for each group of equal period",
    "zero_optimization.stage": "parallel.deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "parallel.deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.deepspeed.offload_parameters",
}
"""Where the run's configuration decides what a key of DeepSpeed's decides."""

DEFAULTS: Tree = {"steps_per_print": 10**9, "wall_clock_breakdown": False}
"""What a user's file may set otherwise."""


def merged(settings: DeepSpeedConfig, needed: Tree) -> Tree:
    """DeepSpeed's configuration: the user's file, if there is one, under what the engine needs.

    Raises UserError, with the key's name in the file, where the two decide differently.
    """
    if settings.config is None:
        return {**DEFAULTS, **needed}
    path = Path(settings.config).expanduser()
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"parallel.deepspeed.config={settings.config}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed.config={settings.config} is not JSON: {error}") from None
    if not isinstance(theirs, dict):
        raise UserError(f"parallel.deepspeed.config={settings.config}: a DeepSpeed configuration is an object {{…}}")
    zero = theirs.get("zero_optimization")
    for section, forbidden, prefix in (
        (theirs, NOT_OURS, ""),
        (zero if isinstance(zero, dict) else {}, NOT_OURS_OF_ZERO, "zero_optimization."),
    ):
        for key, instead in forbidden.items():
            if key in section and not _decides_nothing(section.pop(key)):
                raise UserError(f"{settings.config}: {prefix}{key} cannot be used with this engine: {instead}")
    for key, wanted in (
        ("offload_optimizer", settings.offload_optimizer),
        ("offload_param", settings.offload_parameters),
    ):
        _refuse_offload(settings.config, zero if isinstance(zero, dict) else {}, key, wanted)
    return {**DEFAULTS, **_without_auto(_laid_over(theirs, needed, settings.config))}


def _decides_nothing(value: Any) -> bool:
    """Whether a section of `NOT_OURS` is left to others, or off; sizes are off at 0 and 1."""
    if isinstance(value, dict):
        return not value or value.get("enabled") in (False, "auto")
    return value in (None, "auto") or value is False or (value in (0, 1) and value is not True)


def _without_auto(tree: Tree) -> Tree:
    """What says "auto", and is not decided here, is left to DeepSpeed's defaults."""
    left = {key: value for key, value in tree.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in left.items()}


def _refuse_offload(file: str, zero: Mapping[str, Any], key: str, wanted: bool) -> None:
    section = zero.get(key)
    device = section.get("device", "none") if isinstance(section, dict) else "none"
    field = WHY[f"zero_optimization.{key}.device"]
    if device not in ("none", "cpu", None):
        raise UserError(f"{file}: zero_optimization.{key}.device={device} is not supported: take cpu, or leave it out")
    if device == "cpu" and not wanted:
        raise UserError(f"{file}: zero_optimization.{key}.device=cpu: set {field}=true, or leave it out")


def _laid_over(theirs: Mapping[str, Any], needed: Tree, file: str, place: str = "") -> Tree:
    """`theirs` with everything that is needed in it. Raises UserError for a value that is there and is another."""
    result = dict(theirs)
    for key, value in needed.items():
        name = f"{place}{key}"
        mine = theirs.get(key, "auto")
        if isinstance(value, dict):
            if mine not in ("auto", None) and not isinstance(mine, dict):
                raise UserError(f"{file}: {name} is an object {{…}} (got {mine!r})")
            result[key] = _laid_over(mine if isinstance(mine, dict) else {}, value, file, f"{name}.")
        elif mine == "auto" or mine == value:
            result[key] = value
        else:
            instead = f"it is decided by {WHY[name]}" if name in WHY else f"this engine needs {value!r}"
            raise UserError(f"{file}: {name} is {mine!r}, and here it has to be {value!r}: {instead}")
    return result
