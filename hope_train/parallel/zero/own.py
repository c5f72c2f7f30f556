"""What DeepSpeed writes in its own layout: its `save_checkpoint`, called as it is, with the levels' state for it.

DeepSpeed asks the optimizer that it was given for its state. Here that is the level optimizer's, which holds runs of
parameters; it is laid out as one flat run, as torch's optimizers hold it. Counters, which the levels have each for
themselves, are in the client state.

Sources: `deepspeed/runtime/engine.py` (save_checkpoint), `deepspeed/runtime/zero/stage_1_and_2.py` and `stage3.py`
(state_dict), `deepspeed/checkpoint/ds_to_universal.py` (what the converter needs of tensor parallelism).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.schedule import CORE
from hope_train.parallel.plan import Split, split_of_parameter
from hope_train.parallel.zero.flat import Flat

COUNTS = "hope_train"
"""Key of what this project says in the client state."""

SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""Without which torch's AdamW does not step."""


def save(engine: Any, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
    """DeepSpeed's own save, by all ranks. The folder is there already.

    Raises what went wrong on this rank (OSError, RuntimeError); the other ranks come to the end of theirs all the same.
    """
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    except (OSError, RuntimeError):
        # A file could not be written. What is left of DeepSpeed's save are exchanges, in which the others wait.
        from deepspeed import comm

        if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
            engine.optimizer.checkpoint_event_epilogue()
        comm.barrier()
        raise


def optimizer_state(optimizer: LevelOptimizer, flat: Flat | None) -> dict[str, Any]:
    """The level optimizer's state as torch's AdamW of one group has it, in host memory, with what levels collect.

    Args:
        flat: where the parameters lie; None (stage 0): each is whole, and has a state of its own.

    Returns:
        As `torch.optim.Optimizer.state_dict`. Entries that only some parameters have (`accumulator`, `anchor`) are
        zero elsewhere. `step` of the flat run is the core's: there is room for one.
    """
    optimizer.materialize_state()
    groups = optimizer.param_groups
    core = next(group for group in groups if group["set"] == CORE and group["decay"])
    held = [
        (place, name, parameter)
        for group in groups
        for place, name, parameter in zip(group["places"], group["param_names"], group["params"], strict=True)
    ]
    settings = {key: core[key] for key in SETTINGS}
    if flat is None:
        state = {place: dict(optimizer.state[parameter]) for place, _, parameter in held}
        return {"state": state, "param_groups": [{**settings, "params": sorted(state)}]}
    whole: dict[str, Tensor] = {}
    for _, name, parameter in held:
        for key, tensor in optimizer.state[parameter].items():
            if key == "step":
                continue
            if key not in whole:
                whole[key] = torch.zeros(flat.weights.numel(), dtype=tensor.dtype)
            flat.run(whole[key], name).copy_(tensor)
    whole["step"] = optimizer.state[core["params"][0]]["step"].clone().cpu()
    return {"state": {0: whole}, "param_groups": [{**settings, "params": [0]}]}


def client_state(optimizer: LevelOptimizer, step: int, tokens: int, vocab_size: int) -> dict[str, Any]:
    """What DeepSpeed keeps for its client: the levels' counters, and how tensor parallelism cuts each parameter.

    Args:
        step, tokens: global batches and training tokens consumed.
    """
    groups = optimizer.param_groups
    counts = {
        "step": step,
        "tokens": tokens,
        "global_steps": step,
        "steps": optimizer.steps,
        "skipped": optimizer.skipped,
        "sets": {
            group["set"]: {"period": group["period"], "updates": group["updates"], "tokens": group["tokens"]}
            for group in groups
        },
        "adam_steps": {
            name: int(optimizer.state[parameter]["step"])
            for group in groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        },
    }
    names = [name for group in groups for name in group["param_names"]]
    return {COUNTS: counts, "universal_checkpoint_info": universal_info(names, vocab_size)}


def universal_info(names: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """What `ds_to_universal` asks of how parameters are divided over tensor-parallel ranks."""

    def patterns(*splits: Split) -> list[str]:
        return [f"{re.escape(name)}$" for name in names if split_of_parameter(name) in splits]

    names = list(names)
    return {
        "universal_checkpoint_version": 0.4,
        "original_vocab_size": vocab_size,
        "vocabulary_parameter_patterns": patterns(Split.VOCAB),
        "parameter_with_row_parallelism_patterns": patterns(Split.ROWWISE),
        "tp_replicated_parameter_patterns": patterns(Split.SEQUENCE, Split.REPLICATED),
    }
