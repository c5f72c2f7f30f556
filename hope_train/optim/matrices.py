"""What the rules for matrices share: the step with decoupled decay, around updates that may need whole matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig
from hope_train.optim.wholes import Wholes

WHOLE = "whole_"
"""Entries of a parameter's state whose key begins so have a shape of their own and are the same on every rank; all
others (but single numbers) have the parameter's shape and are split as it is."""


class MatrixOptimizer(torch.optim.Optimizer, ABC):
    """W <- (1 - lr weight_decay) W - lr update."""

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizerConfig, wholes: Wholes) -> None:
        """Raises ValueError for a parameter that is not a matrix."""
        self.config, self.wholes = config, wholes
        super().__init__(groups, {"lr": config.lr, "weight_decay": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"{config.name} takes matrices, not a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        groups = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        for parameter in groups:
            if not self.state[parameter]:
                self.state[parameter].update(self.fresh(self.config, parameter, self.wholes))
        for parameter, update in self.updates(list(groups)):
            lr, decay = groups[parameter]["lr"], groups[parameter]["weight_decay"]
            parameter.mul_(1 - lr * decay)
            parameter.add_(update.to(parameter.dtype), alpha=-lr)

    def entries(self, key: str, parameters: Sequence[Tensor]) -> list[Tensor]:
        """One entry of the state of each parameter."""
        return [self.state[parameter][key] for parameter in parameters]

    @staticmethod
    @abstractmethod
    def fresh(config: OptimizerConfig, parameter: Tensor, wholes: Wholes) -> dict[str, Tensor]:
        """The parameter's state before its first step."""

    @abstractmethod
    def updates(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of these parameters with its update, of its local shape; the gradients are remembered on the way."""


def grads_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each, which must be there."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def zeros_like(parameter: Tensor) -> Tensor:
    """As torch's optimizers make them."""
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)
