"""The level optimizer inside of DeepSpeed: ZeRO reduces gradients and calls it, and copies what it has stepped.

It holds this rank's runs of the parameters in ZeRO's flat partition (stage 0: the parameters). So levels, periods,
clipping, refused steps and everything else is the one LevelOptimizer's; ZeRO has reduced every gradient of every step
before, due or not, and what a level has collected is of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.report import StepReport
from hope_train.parallel.ranks import MeshRanks
from hope_train.parallel.zero.flat import Flat


class Called(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer: one group of all parameters, and somebody else who steps them."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self.act: Callable[[], None] | None = None
        self.written: Callable[[], dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed writes of the optimizer when it saves: the state of who steps."""
        return super().state_dict() if self.written is None else self.written()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Once a step, when gradients are reduced and the weights can be changed."""
        assert self.act is not None, "nobody steps the parameters yet"
        self.act()


class ZeroRanks(MeshRanks):
    """Ranks hold runs of a flat partition, whose gradients are whole when they are seen."""

    dimensions_of: Mapping[Tensor, int] | None = None

    def dimensions(self, parameter: Tensor) -> int:
        """Of the parameter that a run is of."""
        return parameter.ndim if self.dimensions_of is None else self.dimensions_of[parameter]


class ZeroLevels(LevelOptimizer):
    """Steps when ZeRO asks for it."""

    zero_step: Callable[[], None]
    flat: Flat | None = None

    def attach(self, zero_step: Callable[[], None], called: Called, flat: Flat | None) -> None:
        """Args:
        zero_step: lets ZeRO take its step, in which it calls `called`.
        flat: where the parameters lie that this optimizer holds; None: they are the model's.
        """
        self.zero_step, self.flat = zero_step, flat
        self._pending: Callable[[], StepReport] | None = None
        self._reports: list[StepReport] = []
        called.act = self._called

    def step(self, closure: None = None, **of_step: Any) -> StepReport:  # type: ignore[override]
        """As `LevelOptimizer.step`, of the gradients that ZeRO has."""
        inside = partial(super().step, closure, **of_step)
        self._pending, self._reports = inside, []
        self.zero_step()
        self._pending = None
        if not self._reports:
            # ZeRO has seen that a gradient is not finite, on all ranks, and has dropped them all.
            report = super().step(closure, **{**of_step, "finite": False, "measure": False})
            return replace(report, grad_norm=math.inf)
        return self._reports[0]

    def _called(self) -> None:
        assert self._pending is not None, "ZeRO steps, and nobody has asked for it"
        assert not self._reports, "ZeRO steps twice"
        gradient = None if self.flat is None else self.flat.weights.grad
        if self.flat is not None:
            assert gradient is not None
            for member in self._members:
                member.parameter.grad = self.flat.run(gradient, member.name)
        self._reports.append(self._pending())
        if self.flat is not None:
            for member in self._members:
                member.parameter.grad = None
