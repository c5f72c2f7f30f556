"""Reading checkpoints: find the one meant, verify it, load it in place; a whole model for those who only use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hope_train.checkpoint.collected import ACCUMULATOR, Apart, load_stacked
from hope_train.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    TRAINER,
    DamagedCheckpointError,
    Manifest,
    list_checkpoints,
    step_of,
    verify,
)
from hope_train.checkpoint.sets import accumulator_set, is_accumulator_set
from hope_train.checkpoint.tensors import (
    OPTIMIZER,
    TOKENS,
    State,
    entries,
    load_set,
    model_state,
    split_accumulators,
)
from hope_train.config.load import apply_override, validate
from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.model.hope import HopeModel, build_model
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.rows import Rows
from hope_train.parallel.team import Team

ALONE = Rows(Mesh(MeshSizes(), torch.device("cpu")))
"""One process, which reads every row."""

Tell = Callable[[str], None]
"""Takes one line for the user."""


def newest_whole(run_dir: Path, tell: Tell) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of a run that is whole, verified; each damaged one passed over gets a line that says why.

    None where the run has no whole checkpoint.
    """
    for folder in reversed(list_checkpoints(run_dir / CHECKPOINTS)):
        try:
            return folder, verify(folder)
        except DamagedCheckpointError as damage:
            tell(f"passed over: {damage}")
    return None


def find_checkpoint(path: str | Path, tell: Tell = lambda line: None) -> tuple[Path, Manifest]:
    """The verified checkpoint that `path` means: that folder, or the newest whole one of a run directory.

    Raises UserError when there is none, DamagedCheckpointError when the one named is not whole.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        raise UserError(f"{path} is neither a run directory nor a checkpoint: no such folder")
    if (place / MANIFEST).is_file() or step_of(place.resolve()) is not None:
        return place, verify(place)
    run_dir = place.resolve().parent if place.resolve().name == CHECKPOINTS else place
    if not (run_dir / CHECKPOINTS).is_dir():
        raise UserError(f"{path} is neither a run directory nor a checkpoint (no {MANIFEST}, no folder {CHECKPOINTS})")
    reasons: list[str] = []

    def note(line: str) -> None:
        reasons.append(line)
        tell(line)

    found = newest_whole(run_dir, note)
    if found is None:
        why = f" ({reasons[0].removeprefix('passed over: ')})" if reasons else ""
        raise UserError(f"run directory {path} has no whole checkpoint{why}")
    return found


def check_state(folder: Path, manifest: Manifest, state: State, elsewhere: Collection[str] = ()) -> None:
    """Refuse a checkpoint of another model, before anything changes.

    `state` may hold the model alone; the optimizer's entries of the checkpoint are then not asked for. `elsewhere`:
    parameters of this model that other ranks hold.

    Raises UserError naming the first entry that differs, with both shapes.
    """
    # The values are loaded in place and a shape that broadcasts would go unnoticed, so everything is compared here.
    where = f"checkpoint {folder} is of another model"
    mine, theirs = sorted(state), sorted(name for name in manifest.sets if not is_accumulator_set(name))
    if mine != theirs:
        raise UserError(f"{where}: it has the sets {', '.join(theirs)}, this model has {', '.join(mine)}")
    for set_name, tensors in state.items():
        held = [name for name in (set_name, accumulator_set(set_name)) if name in manifest.sets]
        saved = {name: kind for part in held for name, kind in entries(manifest.set_folder(folder, part)).items()}
        rows = manifest.sets[held[-1]].rows
        nothing_collected = split_accumulators({set_name: tensors}).get(accumulator_set(set_name), {})
        if len(held) > 1 or TOKENS in saved:
            nothing_collected = {}
        for name, tensor in tensors.items():
            if name in nothing_collected:
                continue
            if name not in saved:
                raise UserError(f"{where}: {name} is not in it")
            shape, dtype = saved[name]
            if rows is not None and name.startswith(ACCUMULATOR):
                shape = shape[1:]
            if shape != tuple(tensor.shape):
                raise UserError(f"{where}: {name} has shape {list(shape)} there and {list(tensor.shape)} here")
            if dtype != tensor.dtype:
                raise UserError(f"{where}: {name} is {_type(dtype)} there and {_type(tensor.dtype)} here")
        for name in saved:
            if name not in tensors and name not in elsewhere and not name.startswith(OPTIMIZER):
                raise UserError(f"{where}: this model has no {name}")


def load_state(
    folder: Path,
    manifest: Manifest,
    state: State,
    group: Any = None,
    apart: Apart | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Read a verified checkpoint into the live tensors of `state`, in place.

    Args:
        group: all ranks that read it.
        apart: for a checkpoint with stacked accumulators, where each rank's own go; None: `state` is one process's.
        elsewhere: parameters of this model that other ranks hold.

    Raises:
        UserError: on every rank, what `check_state` raises on one.
    """
    team = Team() if group is None else Team(dist.get_rank(group), dist.get_world_size(group), group)
    team.together(lambda: check_state(folder, manifest, state, elsewhere))
    for set_name, tensors in state.items():
        place, wanted = manifest.set_folder(folder, set_name), tensors
        parts = split_accumulators({set_name: tensors})
        collected = parts.get(accumulator_set(set_name))
        # Format 1 has what a level collects in the level's own set.
        if collected and TOKENS not in entries(place):
            wanted = parts[set_name]
            if accumulator_set(set_name) in manifest.sets:
                beside, count = manifest.set_folder(folder, part := accumulator_set(set_name)), manifest.sets[part].rows
                if count is None:
                    load_set(beside, collected, group)
                else:
                    own = collected if apart is None else {key: apart.live[set_name][key] for key in collected}
                    load_stacked(beside, own, count, ALONE if apart is None else apart.rows, group)
            else:  # at the end of a period nothing has been collected
                with torch.no_grad():
                    for tensor in collected.values():
                        tensor.zero_()
        load_set(place, wanted, group)


def read_trainer(folder: Path) -> dict[str, Any]:
    """The trainer's own state beside the tensors (random generators, counters) of a verified checkpoint."""
    try:
        tree = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {TRAINER} cannot be read: {error}") from None
    return dict(tree)


def config_of(manifest: Manifest, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration a checkpoint was written with, `key=value` overrides on top. Raises UserError."""
    tree = json.loads(json.dumps(manifest.config))
    for text in overrides:
        apply_override(tree, text)
    return validate(RunConfig, tree, origin=f"the configuration in checkpoint {manifest.name}")


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    tell: Tell = lambda line: None,
) -> tuple[HopeModel, RunConfig, Manifest]:
    """The model of a checkpoint or of a run's newest whole one, ready to use: in eval mode, on `device`.

    Args:
        path: a run directory or a checkpoint folder; nothing in it depends on where it lies.
        overrides: `key=value`, laid over the configuration it was written with.
        tell: gets a line for each damaged checkpoint that is passed over.

    Returns:
        The model, its run's configuration (overrides included) and the manifest.

    Raises:
        UserError: no such checkpoint, damaged, or overrides that make it another model.
    """
    folder, manifest = find_checkpoint(path, tell)
    config = config_of(manifest, overrides)
    model = build_model(config.model)
    load_state(folder, manifest, model_state(model))
    return model.to(device).eval(), config, manifest


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
