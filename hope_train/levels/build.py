"""From a run's configuration to its level optimizer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hope_train.config.tree import RunConfig
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.ranks import Ranks
from hope_train.levels.schedule import LevelPlan
from hope_train.optim.rule import make_rule


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]], run: RunConfig, ranks: Ranks | None = None
) -> LevelOptimizer:
    """The configured rule under the configured levels; `named_parameters` is `model.named_parameters()`."""
    return LevelOptimizer(
        named_parameters,
        LevelPlan.from_config(run),
        make_rule(run.optimizer),
        run.train.clip_norm,
        ranks,
        run.optimizer.rest_from_period,
    )
