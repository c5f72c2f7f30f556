"""What lies where in DeepSpeed's universal checkpoint format, as its version 0.19.8 reads it; needs no DeepSpeed.

    <folder>/zero/<parameter>/fp32.pt exp_avg.pt exp_avg_sq.pt      {"param": the whole tensor, "cat_dim": 0 or 1, …}
    <folder>/zero/<parameter>/step.pt                               its number of updates
    <folder>/zero/optimizer_state.pt                                parameter groups
    <folder>/mp_rank_00_model_states.pt                             counters of steps (stages 1 and 2)
    <folder>/zero_pp_rank_0_mp_rank_00_model_states.pt              the same (stage 3)
    <folder>/latest_universal                                       the checkpoint's tag, here the folder itself
    <folder>/hope_train/                                            ours: what the format has no place for

Sources: `deepspeed/checkpoint/ds_to_universal.py` (writes it), `deepspeed/checkpoint/universal_checkpoint.py` and
`deepspeed/runtime/base_optimizer.py` (stages 1 and 2), `deepspeed/runtime/zero/stage3.py` (stage 3).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from hope_train.checkpoint.tensors import OPTIMIZER
from hope_train.checkpoint.writer import one_line
from hope_train.errors import UserError

DEEPSPEED = "0.19.8"
"""The version whose loader was read for this."""

ZERO, GROUPS, LATEST = "zero", "optimizer_state.pt", "latest_universal"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
PARAM, CAT_DIM, VOCAB_TENSOR = "param", "cat_dim", "vocab_tensor"
WEIGHT, MOMENTS, STEP = "fp32", ("exp_avg", "exp_avg_sq"), "step"

OURS = "hope_train"
RECORD = "universal.json"
"""In `OURS`: which entries each set has, and every file's size and hash."""

Kinds = dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]
"""Shape and type of a checkpoint's entries, by set and name."""


def universal_place(entry: str) -> tuple[str, str] | None:
    """Parameter and file that an entry of a set has in the format: (`head.weight`, `exp_avg`). None: it has no place.

    Counters (`optimizer.updates`) name no parameter.
    """
    if not entry.startswith(OPTIMIZER):
        return entry, WEIGHT
    key, _, parameter = entry.removeprefix(OPTIMIZER).partition(".")
    return (parameter, key) if parameter and key in (*MOMENTS, STEP) else None


def parameters_of(entries: Mapping[str, object]) -> list[str]:
    """The parameters among the entries of a set."""
    return [name for name in entries if not name.startswith(OPTIMIZER)]


def universal_file(folder: Path, parameter: str, key: str) -> Path:
    """The file of a parameter's weight, moment or step."""
    return folder / ZERO / parameter / f"{key}.pt"


def our_file(folder: Path, set_name: str, entry: str) -> Path:
    """The file of an entry that the format has no place for."""
    return folder / OURS / set_name / f"{entry}.pt"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all is well, and is removed otherwise.

    Raises UserError if `out` is there already, or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} is there already: choose another name")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        work.mkdir()
        yield work
        work.rename(out)
    except (OSError, CheckpointException, RuntimeError) as error:  # what a save can end in
        raise UserError(f"{out} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
