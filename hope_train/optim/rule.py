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


class UpdateRule(Protocol):
    """Turns gradients into updates. Knows nothing of levels, periods, clipping or learning-rate schedules."""

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """A torch optimizer over parameter groups with keys `params`, `param_names` and `decay` (bool), others kept.

        Its `step()` must skip parameters without a gradient (as all of torch's do), keep everything it remembers in
        `state[parameter]` as tensors, and read the learning rate from `group["lr"]` at every step.
        """

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The entries of `state[parameter]` as they are before the parameter's first step."""


def make_rule(config: OptimizerConfig) -> UpdateRule:
    """The configured rule."""
    return {"adamw": AdamWRule}[config.name](config)
