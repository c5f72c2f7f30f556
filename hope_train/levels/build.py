"""From a run's configuration to its level optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor

from hope_train.config.tree import RunConfig
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.ranks import Ranks
from hope_train.levels.schedule import LevelPlan
from hope_train.optim.rule import make_rule
from hope_train.optim.wholes import Wholes

Kind = TypeVar("Kind", bound=LevelOptimizer)


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    run: RunConfig,
    ranks: Ranks | None = None,
    wholes: Wholes | None = None,
) -> LevelOptimizer:
    """The configured rule under the configured levels; `named_parameters` is `model.named_parameters()`.

    ranks, wholes: how the levels and the rules ask other ranks; None: there are none.
    """
    return build_kind(LevelOptimizer, named_parameters, run, ranks, wholes)


def build_kind(
    kind: type[Kind],
    named_parameters: Iterable[tuple[str, Tensor]],
    run: RunConfig,
    ranks: Ranks | None = None,
    wholes: Wholes | None = None,
) -> Kind:
    """As `build_optimizer`, of an engine's own kind of level optimizer."""
    return kind(
        named_parameters,
        LevelPlan.from_config(run),
        make_rule(run.optimizer, wholes),
        run.train.clip_norm,
        ranks,
        run.optimizer.rest_from_period,
    )
