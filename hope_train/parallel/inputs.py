"""The inputs of linear layers, for the rule that needs them (delta gradient descent), on a mesh."""

from __future__ import annotations

from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.model.hope import HopeModel
from hope_train.optim.dgd import SumRanks
from hope_train.optim.mixed import MixedRule
from hope_train.parallel import collectives
from hope_train.parallel.plan import Split, split_of_module
from hope_train.parallel.tensor import TensorParallel


def check_rule(config: RunConfig, sizes: MeshSizes) -> None:
    """Raises UserError for a rule that something else in the configuration leaves no room for."""
    rules = config.optimizer
    if rules.rest_from_period is not None and sizes.dp_shard > 1 and rules.name not in ("adamw", "sgd", "dgd"):
        # Portions are cut by what a rank holds; where rows do not divide ranks would cut them at different places.
        raise UserError(
            f"optimizer.name={rules.name} needs all ranks for a matrix, and with parallel.dp_shard above 1 they wake "
            "resting states at different times: set optimizer.rest_from_period=null"
        )
    if rules.name != "dgd":
        return
    if config.train.compile == "model":
        raise UserError(
            "optimizer.name=dgd reads the inputs of linear layers, which train.compile=model compiles away: set "
            "train.compile=memory or none"
        )
    if sizes.pp > 1 and config.parallel.schedule == "zbv":
        raise UserError(
            "optimizer.name=dgd makes the gradients of a layer's inputs and weights together, which "
            "parallel.schedule=zbv takes apart: set another schedule"
        )


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
