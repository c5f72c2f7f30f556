"""The compiled chunk functions against the token loop: the same bar as the plain ones, whatever is recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hope_train.config.model import MemoryConfig
from hope_train.memory import pieces
from hope_train.memory.chunked import Kernels
from hope_train.memory.compiled import compile_with_budget
from tests.memory.cases import make_problem, worst_error

BAR = 1e-10
CASES: list[tuple[dict[str, Any], bool, float]] = [
    ({}, False, 0.0),
    ({}, True, 1.0),
    ({"momentum": True, "adaptive_q": True, "eta_max": 0.3}, True, 0.0),
    ({"generator_chunk_size": 8, "read": "before"}, True, 0.0),
    ({"read": "start", "rank_one": "w2", "decay_to": "zero", "clamp": None, "activation": "gelu"}, False, 0.5),
    ({"clamp": 1.02, "expansion": 2, "save_every": 2}, False, 0.3),
    ({"kind": "linear", "clamp": 0.9}, True, 0.0),
    ({"kind": "linear", "generator_chunk_size": 2, "momentum": True, "eta_max": 0.3}, False, 1.0),
]


def kernels(budget: float, backend: str) -> Kernels:
    """The chunk functions as `compiled_kernels` makes them, with a backend of choice."""
    functions = (pieces.joint_piece, pieces.generator_piece, pieces.memory_piece)
    return Kernels(*(compile_with_budget(function, budget, backend=backend) for function in functions))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("options", "documents", "budget"), CASES)
def test_traced_and_recomputed_equals_the_token_loop(options: dict[str, Any], documents: bool, budget: float) -> None:
    """Captured whole, differentiated ahead of time and cut by the budget, without generated code: seconds each."""
    torch._dynamo.reset()
    config = MemoryConfig(**{"chunk_size": 4, "generator_chunk_size": 4} | options)
    error, _ = worst_error(make_problem(config, 3, documents), kernels(budget, "aot_eager_decomp_partition"))
    assert error < BAR, error


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of C++ compilation, on a machine that may be busy
@pytest.mark.parametrize(("options", "documents", "budget"), [CASES[2], CASES[6]])
def test_compiled_equals_the_token_loop(options: dict[str, Any], documents: bool, budget: float) -> None:
    """Outputs, states and all gradients in float64; 19 tokens are whole chunks (compiled) and a rest (plain)."""
    torch._dynamo.reset()
    config = MemoryConfig(**{"chunk_size": 4, "generator_chunk_size": 4} | options)
    error, _ = worst_error(make_problem(config, 3, documents), kernels(budget, "inductor"))
    assert error < BAR, error
