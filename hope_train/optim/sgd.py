"""Gradient descent with momentum: torch's, with decoupled decay; and with gradients of its own, delta descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig
from hope_train.optim.matrices import zeros_like


class SGD(torch.optim.SGD):
    """W <- (1 - lr decay) W - lr m, m <- momentum m + g (Nested Learning, Eqs. 33-34, with the rate outside of m).

    `decay` in the groups takes the place of torch's `weight_decay`, which is added to the gradient.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], momentum: float, nesterov: bool = False) -> None:
        super().__init__(groups, lr=1.0, momentum=momentum, nesterov=nesterov)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group["decoupled"]:
                    parameter.mul_(1 - group["lr"] * group["decoupled"])
        super().step()


def fresh_sgd(parameter: Tensor, momentum: float) -> dict[str, Tensor]:
    """The momentum, if there is any. From zero it goes on as torch's, which begins with the first gradient."""
    return {"momentum_buffer": zeros_like(parameter)} if momentum else {}


def momentum_of(config: OptimizerConfig, rule: str) -> float:
    """Of the rules that are gradient descent."""
    return config.dgd.momentum if rule == "dgd" else config.sgd.momentum
