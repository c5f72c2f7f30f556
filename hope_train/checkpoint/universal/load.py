"""A checkpoint of a run made from DeepSpeed's universal format.

It is to the bit what it was, or what DeepSpeed has made of it: hashes recorded at the time of writing tell which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_train.checkpoint.collected import ACCUMULATOR
from hope_train.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    read_manifest,
    record_files,
)
from hope_train.checkpoint.sets import CORE, is_accumulator_set
from hope_train.checkpoint.store import config_of, read_trainer
from hope_train.checkpoint.tensors import OPTIMIZER, TOKENS, UPDATES, State, save_set
from hope_train.checkpoint.universal.export import check_adam, kinds_of
from hope_train.checkpoint.universal.layout import (
    GROUPS,
    MODEL_STATES,
    OURS,
    PARAM,
    RECORD,
    STEP,
    ZERO,
    Kinds,
    new_folder,
    our_file,
    parameters_of,
    universal_file,
    universal_place,
)
from hope_train.checkpoint.writer import Facts, write_manifest
from hope_train.errors import UserError
from hope_train.levels.schedule import LevelPlan


@dataclass(frozen=True)
class Origin:
    """The checkpoint of ours that says what the tensors are of."""

    kinds: Kinds
    manifest: Manifest
    trainer: dict[str, Any]
    files: dict[str, FileRecord] | None = None
    """What the universal files were when they were written; None: it is another checkpoint, of the same model."""


def from_universal(folder: Path, out: Path, like: tuple[Path, Manifest] | None = None) -> dict[str, Any]:
    """Write the new checkpoint `out` from a folder in the universal format; tensors are mapped, not held in memory.

    Args:
        like: a verified checkpoint of the same model, whose configuration, tokenizer and data it gets; None: those
            that `to_universal` left in the folder.

    Returns:
        What was read: `exact` tells whether it is the checkpoint that was written there, to the bit; `counted` whether
        steps and counters are those of the run whose own save (`parallel.deepspeed.own_saves`) was converted.

    Raises:
        UserError: no such folder, names or shapes that are not the model's; `out` is there or cannot be written.
        DamagedCheckpointError: what `to_universal` left is not as it was written.
    """
    if not (folder / ZERO).is_dir():
        raise UserError(f"{folder} is no universal checkpoint: it has no folder {ZERO}")
    origin = _own_origin(folder) if like is None else Origin(kinds_of(*like), like[1], read_trainer(like[0]))
    check_adam(origin.kinds, "the checkpoint it is to be like")
    _check_names(folder, origin.kinds)
    exact = origin.files is not None and _unchanged(folder, origin.files)
    manifest = origin.manifest
    counts = None
    if exact:
        state: State = {
            name: {key: _read(folder, name, key, shape, dtype) for key, (shape, dtype) in found.items()}
            for name, found in origin.kinds.items()
        }
        steps, rows, losses, trainer = manifest.step, manifest.stacked, manifest.losses, origin.trainer
        tokens = manifest.tokens
    else:
        plan = LevelPlan.from_config(config_of(manifest))
        counts = _own_counts(folder, plan)
        state = _advanced(folder, origin, plan, counts)
        rows, losses, trainer = None, {}, {**origin.trainer, "refused": 0}
        steps = int(state[CORE][f"{OPTIMIZER}steps"]) if counts is None else counts["step"]
        tokens = config_of(manifest).train.tokens_after(steps) if counts is None else counts["tokens"]
    facts = Facts(steps, tokens, manifest.config, manifest.tokenizer, manifest.data, losses, trainer)
    with new_folder(out) as work:
        for name, tensors in state.items():
            save_set(work / name, tensors)
        written = {name: int(tensors[UPDATES]) if UPDATES in tensors else None for name, tensors in state.items()}
        write_manifest(work, facts, manifest.incarnation, written, {}, rows)
    return {
        "checkpoint": str(out),
        "folder": str(folder),
        "exact": exact,
        "counted": counts is not None,
        "step": steps,
        "tokens": tokens,
        "parameters": sum(len(parameters_of(found)) for found in state.values()),
        "collected": [name for name in state if is_accumulator_set(name)],
        "like": str(like[0]) if like is not None else str(folder / OURS),
        "stream": bool(trainer.get("data")),
    }


def _own_origin(folder: Path) -> Origin:
    """What `to_universal` left in the folder."""
    ours = folder / OURS
    if not (ours / MANIFEST).is_file():
        raise UserError(
            f"{folder} has no folder {OURS} with a configuration, tokenizer and data: name a checkpoint of the same "
            "model with --like"
        )
    manifest = read_manifest(ours)
    try:
        record = json.loads((ours / RECORD).read_text(encoding="utf-8"))
        kinds: Kinds = {
            name: {key: (tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in found.items()}
            for name, found in record["sets"].items()
        }
        files = {name: FileRecord(**entry) for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder}: {OURS}/{RECORD} cannot be read: {error}") from None
    there = record_files(ours)
    for name, file in files.items():
        own = name.removeprefix(f"{OURS}/")
        if own != name and there.get(own) != file:
            raise DamagedCheckpointError(f"{folder}: {name} is missing or not as it was written")
    return Origin(kinds, manifest, read_trainer(ours), files)


def _check_names(folder: Path, kinds: Kinds) -> None:
    """The parameters that are there are the model's."""
    mine = {name for found in kinds.values() for name in parameters_of(found)}
    theirs = {path.name for path in (folder / ZERO).iterdir() if path.is_dir()}
    for names, what in ((mine - theirs, "is not in it"), (theirs - mine, "is not a parameter of this model")):
        if names:
            raise UserError(f"{folder} is of another model: {min(names)} {what}")


def _unchanged(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether weights, moments and steps are those that `to_universal` wrote."""
    wanted = {
        name.removeprefix(f"{ZERO}/"): file
        for name, file in files.items()
        if name.startswith(f"{ZERO}/") and name != f"{ZERO}/{GROUPS}"
    }
    there = record_files(folder / ZERO)
    there.pop(GROUPS, None)
    return there == wanted


def _own_counts(folder: Path, plan: LevelPlan) -> dict[str, Any] | None:
    """What a run with `own_saves` says of its steps and levels, where DeepSpeed has only converted it since.

    None: nothing, or DeepSpeed has taken steps of its own. Raises UserError for a run with other levels or periods.
    """
    content: dict[str, Any] = {}
    file = next((folder / name for name in MODEL_STATES if (folder / name).is_file()), None)
    if file is not None:
        with suppress(UserError):  # of other programs: anything may be in it
            content = _load(file)
    counts = content.get(OURS)
    if not isinstance(counts, dict) or counts.get("global_steps") != content.get("global_steps", -1):
        return None
    theirs = {name: of_set["period"] for name, of_set in counts["sets"].items()}
    if theirs != {part.name: part.period for part in plan.sets}:
        raise UserError(f"{folder} is of a run with other levels or periods: {theirs}")
    return counts


def _advanced(folder: Path, origin: Origin, plan: LevelPlan, counts: dict[str, Any] | None) -> State:
    """Weights, moments and their steps as they are there; counters that fit them; nothing collected.

    counts: the run's own; None: those of so many steps as the core has taken updates.
    """
    done = _updates_of_core(folder, origin) if counts is None else counts["steps"]
    skipped = 0 if counts is None else counts["skipped"]
    state: State = {}
    for part in plan.sets:
        updates = done // part.period if counts is None else counts["sets"][part.name]["updates"]
        counters = {"period": part.period, "updates": updates, "tokens": 0, "steps": done, "skipped": skipped}
        tensors = state[part.name] = {}
        for entry, (shape, dtype) in origin.kinds[part.name].items():
            placed = universal_place(entry)
            if placed is not None and placed[1] == STEP and counts is not None:
                # DeepSpeed's files have one count for all parameters.
                tensors[entry] = torch.tensor(counts["adam_steps"][placed[0]], dtype=dtype).reshape(shape)
            elif placed is not None:
                tensors[entry] = _read(folder, part.name, entry, shape, dtype)
            elif entry.removeprefix(OPTIMIZER) in counters:
                if entry != TOKENS or part.name == CORE:
                    tensors[entry] = torch.tensor(counters[entry.removeprefix(OPTIMIZER)], dtype=dtype)
            elif not entry.startswith(ACCUMULATOR):
                raise UserError(
                    f"{folder} has been changed since it was written, and DeepSpeed's universal format has no place "
                    f"for {entry}: such a run (model.cms.variant=nested) comes back only unchanged"
                )
    return state


def _updates_of_core(folder: Path, origin: Origin) -> int:
    """Raises UserError where its parameters have taken different numbers of them."""
    steps = {
        name: int(_read(folder, CORE, f"{OPTIMIZER}{STEP}.{name}", (), torch.float64))
        for name in parameters_of(origin.kinds[CORE])
    }
    if len(set(steps.values())) > 1:
        least, most = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise UserError(
            f"{folder}: {least} has taken {steps[least]} updates and {most} {steps[most]}; what is updated at every "
            "step has to have taken as many"
        )
    return next(iter(steps.values()))


def _read(folder: Path, set_name: str, entry: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One entry, mapped into memory. Raises UserError when it is missing, or has another shape or type."""
    placed = universal_place(entry)
    if placed is None:
        return _load(our_file(folder, set_name, entry))
    file = universal_file(folder, *placed)
    shown = file.relative_to(folder)
    if placed[1] == STEP:
        step = _load(file) if file.is_file() else _one_step(folder)
        return torch.as_tensor(step).to(dtype).reshape(shape)
    if not file.is_file():
        raise UserError(f"{folder}: {shown} is missing")
    content = _load(file)
    # DeepSpeed's converter writes what comes of stage 3 flat, and without the dictionary.
    tensor = content[PARAM] if isinstance(content, dict) and PARAM in content else content
    if not isinstance(tensor, Tensor):
        raise UserError(f"{folder}: {shown} has no tensor")
    flat = tensor is content and tensor.ndim == 1 and tensor.numel() == torch.Size(shape).numel()
    if not flat and tuple(tensor.shape) != shape:
        raise UserError(f"{folder}: {shown} has shape {list(tensor.shape)}, and this model has {list(shape)}")
    if tensor.dtype != dtype:
        raise UserError(f"{folder}: {shown} is {_type(tensor.dtype)}, and this model has {_type(dtype)}")
    return tensor.reshape(shape)


def _load(file: Path) -> Any:
    """Tensors and plain data alone: nothing in the file is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle: anything may come out of one that is damaged
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read: {line}") from None


def _one_step(folder: Path) -> Any:
    """The count of updates that stage 3 keeps for all parameters together."""
    file = folder / ZERO / GROUPS
    try:  # DeepSpeed keeps objects of its own in this file
        content = torch.load(file, map_location="cpu", weights_only=False)
        return content["optimizer_state_dict"]["state"][0]["step"]
    except ModuleNotFoundError as error:
        raise UserError(f"{file} can be read only where DeepSpeed is installed: {error}") from None
    except Exception as error:
        raise UserError(f"{folder} says nowhere how many updates its parameters have taken: {error}") from None


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
