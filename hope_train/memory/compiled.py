"""The chunk functions through torch.compile: the same functions, with their element-wise work fused.

Only whole chunks take this path: a run has one or two shapes of them, while lengths of left-over pieces vary freely
and would each be compiled anew. The share of activations that compiled code keeps for backward is a budget (the rest
is recomputed, cheapest first).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from hope_train.memory import pieces
from hope_train.memory.chunked import Kernels

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.lru_cache(maxsize=4)
def compiled_kernels(budget: float = 1.0) -> Kernels:
    """The chunk functions compiled with an activation budget in (0, 1]; 1 recomputes only what is free."""
    return Kernels(
        *(_compile(function, budget) for function in (pieces.joint_piece, pieces.generator_piece, pieces.memory_piece))
    )


def _compile(function: Function, budget: float) -> Function:
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        import torch._functorch.config as functorch_config

        with functorch_config.patch(activation_memory_budget=budget):
            return compiled(*arguments)

    return call  # type: ignore[return-value]
