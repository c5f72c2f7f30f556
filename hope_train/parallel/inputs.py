"""The inputs of linear layers, for the rule that needs them (delta gradient descent), on a mesh."""

from __future__ import annotations

from hope_train.config.tree import RunConfig
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.model.hope import HopeModel
from hope_train.optim.dgd import SumRanks
from hope_train.optim.mixed import MixedRule
from hope_train.parallel import collectives
from hope_train.parallel.plan import Split, split_of_module
from hope_train.parallel.tensor import TensorParallel


def watch_layers(optimizer: LevelOptimizer, model: HopeModel, config: RunConfig, tensor: TensorParallel | None) -> None:
    """Let a rule that makes gradients of its own see what goes into linear layers. Other rules: nothing to do."""

    def over_ranks(name: str) -> SumRanks | None:
        if tensor is None or split_of_module(name) is not Split.ROWWISE:
            return None
        return lambda partial: collectives.sum_over_ranks(partial, tensor.group)

    def positions() -> int:
        return config.train.tokens_in(optimizer.steps + optimizer.skipped)

    if isinstance(optimizer.rule, MixedRule):
        optimizer.rule.watch(model, positions, over_ranks)
