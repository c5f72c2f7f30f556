"""A model without a model: tensors under the names that the levels look at, and gradients anyone can recompute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.report import StepReport

BATCH_TOKENS = 8


def shapes(levels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes: every kind of parameter that is treated in its own way, levels in two blocks."""
    named: dict[str, tuple[int, ...]] = {"embed.weight": (5, 3)}
    for block in range(2):
        named[f"blocks.{block}.mixer.proj.weight"] = (3, 3)
        named[f"blocks.{block}.mixer.memory.k.w1"] = (2, 2, 2)
        for level in range(levels):
            named[f"blocks.{block}.cms.levels.{level}.norm.weight"] = (3,)
            named[f"blocks.{block}.cms.levels.{level}.up.weight"] = (4, 3)
    named["norm.weight"] = (3,)
    named["head.weight"] = (5, 3)
    return named


def config(
    periods: Sequence[int],
    steps: int = 40,
    variant: str = "sequential",
    clip_norm: float | None = 1.0,
    levels: Sequence[dict[str, Any]] = (),
    nested_rate: float = 0.25,
    **optimizer: Any,
) -> RunConfig:
    """A run over CMS levels of these periods. `levels`: more keys for each level."""
    extra = levels or [{}] * len(periods)
    if periods:
        cms = [{"width": 4, "period": period, **more} for period, more in zip(periods, extra, strict=True)]
        model: dict[str, Any] = {"arch": "hope", "cms": {"variant": variant, "nested_rate": nested_rate, "levels": cms}}
    else:
        model = {"arch": "transformer_pp", "mlp_width": 8}
    optimizer = {"lr": 0.05, "schedule": {"kind": "cosine", "warmup_tokens": 5 * BATCH_TOKENS}, **optimizer}
    train = {
        "context_length": BATCH_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "micro_batch_size": 1,
        "tokens": steps * BATCH_TOKENS,
        "clip_norm": clip_norm,
    }
    return RunConfig.model_validate({"model": model, "optimizer": optimizer, "train": train})


def initial_weights(levels: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Starting weights in float64."""
    rng = np.random.default_rng([seed, 1])
    return {name: rng.normal(size=shape) for name, shape in shapes(levels).items()}


@functools.cache
def problem(step: int, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Curvature c and target t of the loss sum c (w - t)^2 / 2 at a step. Some steps are steep enough to be clipped."""
    rng = np.random.default_rng([step, *name.encode()])
    steep = 2.0 if step % 5 == 0 else 0.1
    return steep * rng.uniform(0.2, 1.0, size=shape), rng.normal(size=shape)


@functools.cache
def _problem_tensors(
    step: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    curvature, target = problem(step, name, shape)
    return torch.tensor(curvature, dtype=dtype, device=device), torch.tensor(target, dtype=dtype, device=device)


def tokens_of(step: int) -> int:
    """Scored tokens of a step: never the same."""
    return 3 + (7 * step) % 11


class Toy:
    """Weights as torch parameters, with the optimizer of a configuration."""

    def __init__(
        self, run: RunConfig, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu", **build: Any
    ) -> None:
        weights = initial_weights(len(run.model.cms.levels), seed)
        self.parameters = {
            name: torch.nn.Parameter(torch.tensor(value, dtype=dtype, device=device)) for name, value in weights.items()
        }
        self.optimizer: LevelOptimizer = build_optimizer(self.parameters.items(), run, **build)

    def backward(self, step: int, spoil: Callable[[int], bool] = lambda step: False) -> torch.Tensor:
        """Gradients of the step's loss into `.grad`; a spoilt step has a NaN in one of them."""
        loss = torch.zeros((), dtype=torch.float64)
        for name, parameter in self.parameters.items():
            curvature, target = _problem_tensors(step, name, tuple(parameter.shape), parameter.dtype, parameter.device)
            loss = loss + (0.5 * curvature * (parameter - target) ** 2).sum().cpu()
        loss.backward()
        if spoil(step):
            self.grad("norm.weight")[0] = float("nan")
        return loss.detach()

    def grad(self, name: str) -> torch.Tensor:
        """A parameter's gradient, which must be there."""
        gradient = self.parameters[name].grad
        assert gradient is not None
        return gradient

    def step(self, step: int, measure: bool = False, **kwargs: Any) -> StepReport:
        """One whole training step."""
        loss = self.backward(step, **kwargs)
        report = self.optimizer.step(tokens=tokens_of(step), loss=loss, measure=measure)
        self.optimizer.zero_grad()
        return report

    def weights(self) -> dict[str, np.ndarray]:
        """The weights now."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()}


def flatten(named: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A copy of a named state, as one dictionary."""
    return {f"{part}/{name}": tensor.clone() for part, entries in named.items() for name, tensor in entries.items()}
