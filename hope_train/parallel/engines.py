"""Which engine spreads a run over its mesh: `parallel.engine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from hope_train.config.mesh import MeshSizes, deepspeed_tree
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.parallel import engine as native
from hope_train.parallel.engine import Engine
from hope_train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Kind:
    """An engine that can be chosen."""

    build: Callable[[RunConfig, Mesh, torch.dtype | None], Engine]
    packages: tuple[str, ...] = ()
    """What it imports besides torch."""

    check: Callable[[RunConfig, MeshSizes], object] = lambda config, sizes: None
    """Raises UserError for settings of its own that do not fit."""


def _deepspeed(config: RunConfig, mesh: Mesh, dtype: torch.dtype | None) -> Engine:
    from hope_train.parallel.zero.engine import build_engine as build

    return build(config, mesh, dtype)


ENGINES = {
    "native": Kind(native.build_engine),
    "deepspeed": Kind(_deepspeed, ("deepspeed", "megatron.core"), deepspeed_tree),
}


def check_engine(config: RunConfig, sizes: MeshSizes) -> None:
    """Whether the configured engine is there, and its own configuration fits the run's. Imports none of its packages.

    Raises UserError.
    """
    name = config.parallel.engine
    for package in ENGINES[name].packages:
        if find_spec(package.partition(".")[0]) is None:
            raise UserError(
                f"parallel.engine={name} needs the package {package.replace('.', '-')}, which is not installed: "
                f"pip install -e '.[{name}]', or set parallel.engine=native"
            )
    ENGINES[name].check(config, sizes)


def build_engine(config: RunConfig, mesh: Mesh, dtype: torch.dtype | None = None) -> Engine:
    """Model and optimizer of a run, spread over the mesh by the configured engine.

    Args:
        dtype: of the parameters; None: fp32.

    Raises:
        UserError: the engine cannot do what the configuration asks for.
    """
    return ENGINES[config.parallel.engine].build(config, mesh, dtype)
