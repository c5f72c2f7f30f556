"""What the three forms of the memory (token loop, chunks, recurrence) agree on.

Notation (Eqs. 83-93 of arXiv 2512.24695): per head, width N, hidden width E. Boxes k, v, (q,) eta, alpha are the
*generators*, mem is the main memory. MLP boxes have W2 [H, E, N] and W1 [H, N, E] ([H, 1, E] for eta and alpha);
linear boxes have W [H, N, N] ([H, 1, N]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig

Init = dict[str, Tensor]
"""Learned initial states by name: `w2_k`, `w1_k`, … for MLP boxes, `w_k`, … for linear ones."""

SCALAR_BOXES = ("eta", "alpha")
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Boxes:
    """A group of memories that share keys, in the order in which they are stacked: scalars first."""

    scalar: tuple[str, ...]
    matrix: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Scalar boxes, then matrix boxes."""
        return self.scalar + self.matrix


def generator_boxes(config: MemoryConfig) -> Boxes:
    """eta, alpha, k, v, (q): read at their own chunk's first state."""
    return Boxes(SCALAR_BOXES, ("k", "v", "q") if config.adaptive_q else ("k", "v"))


MEMORY_BOXES = Boxes((), ("mem",))


def joint_boxes(config: MemoryConfig) -> Boxes:
    """All of them, the main memory last: where their chunks are equally long they are one group."""
    generators = generator_boxes(config)
    return Boxes(generators.scalar, generators.matrix + MEMORY_BOXES.matrix)


def parameter_shapes(config: MemoryConfig, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every learned initial state (and of theta's logit, where momentum is on)."""
    hidden = config.expansion * width
    shapes: dict[str, tuple[int, ...]] = {}
    for box in generator_boxes(config).all + MEMORY_BOXES.all:
        out = 1 if box in SCALAR_BOXES else width
        if config.kind == "linear":
            shapes[f"w_{box}"] = (heads, out, width)
        else:
            shapes[f"w2_{box}"] = (heads, hidden, width)
            shapes[f"w1_{box}"] = (heads, out, hidden)
    if config.momentum:
        shapes["theta_logit"] = (heads,)
    return shapes


def initial_std(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of an initial state (measured choices: W1 = 0 would leave W2 without a gradient)."""
    layer, _, box = name.partition("_")
    fan_in = shape[-1]
    if layer == "w2":
        return float(fan_in**-0.25)
    if layer == "w1":
        return float((1.0 if box in SCALAR_BOXES else 0.5) * fan_in**-0.5)
    return float(0.5 * fan_in**-0.5)


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + eps^2) over the last dimension: smooth at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS**2)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The non-linearity s."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "relu": torch.relu,
    }
    return functions[name]


def activation_and_slope(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """s(x) and s'(x), both differentiable."""
    if name == "silu":
        gate = torch.sigmoid(x)
        value = x * gate
        return value, gate + value * (1.0 - gate)
    if name == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * 0.3989422804014327
    on = (x > 0).to(x.dtype)
    return x * on, on
