"""What an update rule owes the levels, and the factory that makes the configured one.

A rule is a plain torch optimizer plus one promise: the state it would create at a parameter's first step can be
created beforehand, so that a checkpoint can be read into it in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig
from hope_train.optim.adamw import AdamWRule
from hope_train.optim.mixed import MixedRule
from hope_train.optim.wholes import Wholes


class UpdateRule(Protocol):
    """Turns gradients into updates. Knows nothing of levels, periods, clipping or learning-rate schedules."""

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """A torch optimizer over parameter groups with keys `params`, `param_names` and `decay` (bool), others kept.

        It may divide a group into several; every one it is given must be left with at least one. Its `step()` must skip
        parameters without a gradient (as all of torch's do), keep everything it remembers in `state[parameter]` as
        tensors, and read the learning rate from `group["lr"]` at every step. Between steps `group["lr"]` is the rate of
        the group's next update.
        """

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The entries of `state[parameter]` as they are before the parameter's first step.

        0-d entries are the same on every rank, those named `whole_…` (`optim.matrices.WHOLE`) too; all others have the
        shape of the parameter and are split as it is.
        """


def make_rule(config: OptimizerConfig, wholes: Wholes | None = None) -> UpdateRule:
    """The configured rule; with AdamW for everything it is AdamW alone.

    Args:
        wholes: how the rules get at whole matrices; None: this process has them.
    """
    names = {config.name, config.vectors, config.embeddings, config.memories}
    if names == {"adamw"} and config.matrix_lr_scale == 1.0:
        return AdamWRule(config)
    return MixedRule(config, wholes)
