"""A checkpoint in DeepSpeed's universal format, with what that has no place for beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_train.checkpoint.manifest import MANIFEST, TRAINER, Manifest, record_files
from hope_train.checkpoint.sets import CORE
from hope_train.checkpoint.store import config_of
from hope_train.checkpoint.tensors import OPTIMIZER, UPDATES, entries, load_set
from hope_train.checkpoint.universal.layout import (
    CAT_DIM,
    DEEPSPEED,
    GROUPS,
    LATEST,
    MODEL_STATES,
    MOMENTS,
    OURS,
    PARAM,
    RECORD,
    STEP,
    VOCAB_TENSOR,
    ZERO,
    Kinds,
    new_folder,
    our_file,
    parameters_of,
    universal_file,
    universal_place,
)
from hope_train.checkpoint.writer import write_synced
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.schedule import LevelPlan
from hope_train.optim.decay import is_decayed
from hope_train.parallel.plan import Split, split_of_parameter


def kinds_of(folder: Path, manifest: Manifest) -> Kinds:
    """Shape and type of everything in a checkpoint. Raises UserError for a set that is none."""
    return {name: entries(manifest.set_folder(folder, name)) for name in manifest.sets}


def check_adam(kinds: Kinds, where: str) -> None:
    """Refuse what the format cannot hold: parameters that are not fp32, or have not Adam's two moments and step.

    Raises UserError naming the first of them.
    """
    for found in kinds.values():
        for name in parameters_of(found):
            if found[name][1] != torch.float32:
                raise UserError(f"{where}: {name} is not in fp32, and DeepSpeed's universal format keeps fp32 weights")
            for key in (*MOMENTS, STEP):
                if f"{OPTIMIZER}{key}.{name}" not in found:
                    raise UserError(
                        f"{where}: {name} has no {key}: DeepSpeed's universal format keeps Adam's state, so it takes "
                        "runs of optimizer.name=adamw"
                    )


def to_universal(folder: Path, manifest: Manifest, out: Path) -> dict[str, Any]:
    """Write a verified checkpoint into the new folder `out`, whole or not at all; a parameter at a time in memory.

    Returns what was written. Raises UserError: what the format cannot hold; `out` is there, or cannot be written.
    """
    kinds, config = kinds_of(folder, manifest), config_of(manifest)
    check_adam(kinds, f"checkpoint {folder}")
    with new_folder(out) as work:
        updates = {}
        for set_name, found in kinds.items():
            place = manifest.set_folder(folder, set_name)
            for part in _portions(found):
                tensors = {name: torch.empty(found[name][0], dtype=found[name][1]) for name in part}
                load_set(place, tensors)
                for name, tensor in tensors.items():
                    _write_entry(work, set_name, name, tensor)
                if UPDATES in tensors:
                    updates[set_name] = int(tensors[UPDATES])
        steps = updates[CORE]
        _write_optimizer_state(work / ZERO / GROUPS, config, kinds, updates)
        _write_model_states(work, config, manifest, steps)
        for name in (MANIFEST, TRAINER):
            shutil.copyfile(folder / name, work / OURS / name)
        (work / LATEST).write_text(".", encoding="utf-8")
        record = {
            "deepspeed": DEEPSPEED,
            "sets": {
                name: {key: [list(shape), str(dtype).removeprefix("torch.")] for key, (shape, dtype) in found.items()}
                for name, found in kinds.items()
            },
            "files": {name: vars(file) for name, file in record_files(work).items()},
        }
        write_synced(work / OURS / RECORD, json.dumps(record, indent=1))
    parameters = [name for found in kinds.values() for name in parameters_of(found)]
    return {
        "folder": str(out),
        "checkpoint": str(folder),
        "step": manifest.step,
        "parameters": len(parameters),
        "beside": sum(universal_place(name) is None for found in kinds.values() for name in found),
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }


def _portions(found: dict[str, Any]) -> list[list[str]]:
    """The entries of a set, what belongs to one parameter together."""
    portions: dict[str, list[str]] = {}
    for name in found:
        placed = universal_place(name)
        portions.setdefault(name if placed is None else placed[0], []).append(name)
    return list(portions.values())


def _write_entry(work: Path, set_name: str, entry: str, tensor: Tensor) -> None:
    placed = universal_place(entry)
    if placed is None:
        _save(tensor, our_file(work, set_name, entry))
        return
    parameter, key = placed
    file = universal_file(work, parameter, key)
    if key == STEP:
        _save(tensor, file)
        return
    split = split_of_parameter(parameter)
    content: dict[str, Any] = {PARAM: tensor}
    if split.dim is not None:  # along which another tensor-parallel run has to cut it
        content[CAT_DIM] = split.dim
    if split is Split.VOCAB:  # without padding
        content[VOCAB_TENSOR] = True
    _save(content, file)


def _write_optimizer_state(file: Path, config: RunConfig, kinds: Kinds, updates: dict[str, int]) -> None:
    """The parameter groups are the run's own, in its order: of each set what is decayed, then what is not.

    DeepSpeed pairs them with its optimizer's by position, and takes one count of updates for each.
    """
    plan, optimizer = LevelPlan.from_config(config), config.optimizer
    groups = []
    for part in plan.sets:
        for decay in (True, False):
            found = kinds[part.name]
            names = [name for name in parameters_of(found) if is_decayed(name, len(found[name][0])) == decay]
            if names:
                groups.append(
                    {
                        "lr": plan.lr(part, updates[part.name] + 1),
                        "betas": tuple(optimizer.betas),
                        "eps": optimizer.eps,
                        "weight_decay": optimizer.weight_decay if decay else 0.0,
                        "set": part.name,
                        "period": part.period,
                        "param_names": names,
                        "params": [],
                    }
                )
    alike = {"betas": tuple(optimizer.betas), "eps": optimizer.eps, "params": []}
    state = {
        "zero_stage": 1,
        "ds_version": DEEPSPEED,
        "param_groups": groups,
        # Stage 3 looks here, and gives all of its groups one count and one group's settings: only what is alike.
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(float(updates[CORE]))}},
            "param_groups": [alike],
        },
    }
    _save(state, file)


def _write_model_states(work: Path, config: RunConfig, manifest: Manifest, steps: int) -> None:
    """Weights are read from `zero`, so there are none in these."""
    content: dict[str, Any] = {
        "module": {},
        "buffer_names": [],
        "param_shapes": None,
        "lr_scheduler": None,
        "global_steps": steps,
        "global_samples": manifest.tokens // config.train.context_length,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": DEEPSPEED,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "hope_train": {"step": manifest.step, "tokens": manifest.tokens},
    }
    for name in MODEL_STATES:
        _save(content, work / name)


def _save(content: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
