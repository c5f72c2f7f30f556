"""A checkpoint's model on the mesh of this job, to be measured there: any layout reads any other's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hope_train.checkpoint.collected import stacked
from hope_train.checkpoint.manifest import Manifest
from hope_train.checkpoint.store import Tell, config_of, find_checkpoint, load_model, load_state
from hope_train.checkpoint.tensors import State, by_set, with_optimizer
from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.evaluate.scoring import Shares
from hope_train.model.hope import HopeModel
from hope_train.parallel.engine import Engine, build_spread_model, shares_of
from hope_train.parallel.mesh import Mesh, join, open_mesh, world_size
from hope_train.parallel.stages import names_elsewhere
from hope_train.parallel.team import Team


@dataclass(frozen=True)
class Spread:
    """A model in eval mode, or this rank's part of it."""

    mesh: Mesh
    model: HopeModel
    config: RunConfig
    manifest: Manifest
    shares: Shares
    """How windows are dealt out to the ranks."""


def live_state(engine: Engine) -> State:
    """All tensors that a resume needs, this rank's parts of them. Live, not copied."""
    return with_optimizer(by_set(engine.weights()), engine.optimizer)


def run_state(engine: Engine, stack: bool = False) -> State:
    """`live_state` as parts of whole tensors, for a checkpoint; accumulators folded before, or `stack`ed: each rank's
    own as rows (see `collected`).
    """
    live = live_state(engine)
    wrapped = engine.wrap(live)
    return stacked(wrapped, live, engine.rows()) if stack else wrapped


def load_on_mesh(path: str | Path, device: torch.device, overrides: Sequence[str], tell: Tell) -> Spread:
    """As `store.load_model`, by every process of this job; one process alone holds the whole model.

    Args:
        overrides: `parallel.…=…`: the mesh. It need not be the one that wrote the checkpoint.

    Raises:
        UserError: what `load_model` raises, and a mesh that does not fit.
    """
    if world_size() == 1:
        model, config, manifest = load_model(path, device, overrides, tell)
        resolve_mesh(config, 1, training=False)
        return Spread(Mesh(MeshSizes(), device), model, config, manifest, Shares())
    device = join(device)
    team = Team(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    folder, manifest = team.on_first(lambda: find_checkpoint(path, tell))
    config = team.alike(lambda: config_of(manifest, overrides))
    mesh = team.alike(lambda: open_mesh(config, device, training=False))
    spread = team.alike(lambda: build_spread_model(config, mesh))
    state = by_set(spread.held())
    if spread.layouts is not None:
        state = {name: spread.layouts.wrap(part) for name, part in state.items()}
    load_state(folder, manifest, state, mesh.team.group, elsewhere=names_elsewhere(spread.model))
    if spread.sharded is not None:
        spread.sharded.changed(spread.sharded.periods)
    return Spread(mesh, spread.model.eval(), config, manifest, shares_of(mesh, spread.model))
