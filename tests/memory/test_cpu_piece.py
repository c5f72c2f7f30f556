"""The kernel for a whole chunk against the plain functions: outputs, states and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import chunked, cpu_piece, cpu_products
from hope_train.memory.chunked import Kernels
from hope_train.memory.rules import joint_boxes
from tests.memory.cases import make_init, relative

pytestmark = pytest.mark.skipif(not cpu_products.wanted(), reason="this processor does not gain from the kernel")

KERNELS = Kernels(cpu_piece.joint_piece, chunked.PLAIN.generators, chunked.PLAIN.memory)
HEADS, BATCH = 2, 3

CASES: list[tuple[int, int, dict[str, Any]]] = [
    (64, 64, {}),
    (16, 16, {"clamp": 0.99}),
    (32, 16, {"expansion": 2, "clamp": None, "normalize_v": False, "eta_max": 0.1}),
    (16, 32, {"expansion": 4, "normalize_q": False, "alpha_bias": -2.0, "loss_factor": 1.0, "eta_max": 0.3}),
    (64, 16, {"alpha_bias": -6.0, "clamp": 0.99}),
    (32, 80, {"eta_bias": 1.0}),
    (16, 16, {"eta_max": 0.0}),
]


def outcome(config: MemoryConfig, width: int, tokens: int, dtype: torch.dtype, kernels: Kernels) -> dict[str, Tensor]:
    """Answers, last states, and gradients of a random read-out of both with respect to inputs and initial states."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(3, BATCH, tokens, HEADS, width, generator=generator, dtype=torch.float64).to(dtype)
    z, q = (x.clone().requires_grad_() for x in draws[:2])
    init = {
        name: x.detach().to(dtype).requires_grad_() for name, x in make_init(config, HEADS, width, 0, dtype).items()
    }
    o, state = chunked.run(config, z, q, init, kernels=kernels)
    now = state.groups[0].now
    total = (o * draws[2]).sum()
    for weight in now.values():
        total = total + (weight * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    leaves = {"z": z, "q": q, **init}
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {"o": o, **now, **{f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize(("chunk", "width", "options"), CASES, ids=str)
def test_equals_the_plain_functions(chunk: int, width: int, options: dict[str, Any]) -> None:
    """Three chunks, so that gradients go through the states between them; as near to float64 as plain float32 is."""
    assert cpu_products.load(), "wanted here, but it could not be built"
    config = MemoryConfig(chunk_size=chunk, generator_chunk_size=chunk, **options)
    exact = outcome(config, width, 3 * chunk, torch.float64, chunked.PLAIN)
    plain = outcome(config, width, 3 * chunk, torch.float32, chunked.PLAIN)
    found = outcome(config, width, 3 * chunk, torch.float32, KERNELS)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        error, usual = (relative(x[name].double(), value) for x in (found, plain))
        assert error < max(3 * usual, 2e-6), (name, error, usual)


def test_the_clamp_holds_in_a_case_above() -> None:
    """Else its gradient would not have been tested."""
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=16, generator_chunk_size=16, clamp=0.99)
    init = make_init(config, HEADS, 16, 0, torch.float32)
    state = chunked.initial_state(config, init, BATCH).groups[0]
    generator = torch.Generator().manual_seed(1)
    z, q = torch.randn(2, HEADS, BATCH, 16, 16, generator=generator)
    stacked = {name: weight[..., 0, :, :] for name, weight in state.now.items()}
    inputs = (z, q, *(state.now[name] for name in cpu_piece.NAMES), *(stacked[name] for name in cpu_piece.NAMES))
    factors = torch.ops.hope.piece(*inputs, 1.0, -2.0, 4.0, 1.0, 0.99, True, True)[-1]
    assert factors.shape == (HEADS, BATCH, 10)
    assert (factors <= 1).all()
    assert 0 < (factors < 1).sum() < factors.numel()


def test_a_rest_of_a_chunk_and_more_threads() -> None:
    """Left-over tokens take the plain functions after the kernel's state; the bits do not depend on the threads."""
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=32, generator_chunk_size=32)

    def either(*arguments: Any) -> Any:
        chosen = cpu_piece.joint_piece if cpu_piece.takes(config, *arguments[5:9]) else chunked.PLAIN.joint
        return chosen(*arguments)

    mixed = Kernels(either, chunked.PLAIN.generators, chunked.PLAIN.memory)
    exact = outcome(config, 32, 77, torch.float64, chunked.PLAIN)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found.append(outcome(config, 32, 77, torch.float32, mixed))
        finally:
            torch.set_num_threads(threads)
    for name, value in exact.items():
        assert relative(found[0][name].double(), value) < 5e-6, name
        if not name.startswith("d_"):  # what follows the kernel in the graph may sum in another order
            assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"kind": "linear"}, {}),
        ({"activation": "gelu"}, {}),
        ({"read": "before"}, {}),
        ({"decay_to": "zero"}, {}),
        ({"rank_one": "w2"}, {}),
        ({"momentum": True}, {}),
        ({}, {"q": None}),
        ({}, {"starts": torch.zeros(BATCH, 16, dtype=torch.bool)}),
        ({}, {"ends": False}),
        ({}, {"tokens": 24}),
        ({}, {"width": 24}),
        ({}, {"dtype": torch.float64}),
    ],
    ids=str,
)
def test_what_it_leaves_to_others(change: dict[str, Any], more: dict[str, Any]) -> None:
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=16, generator_chunk_size=16, **change)
    shape = HEADS, BATCH, more.get("tokens", 16), more.get("width", 16)
    x = torch.zeros(shape, dtype=more.get("dtype", torch.float32))
    assert cpu_piece.takes(
        MemoryConfig(chunk_size=16, generator_chunk_size=16), *2 * [torch.zeros(2, 3, 16, 16)], None, True
    )
    assert not cpu_piece.takes(config, x, more.get("q", x), more.get("starts"), more.get("ends", True))


def test_refuses_shapes_it_cannot_read() -> None:
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=16, generator_chunk_size=16)
    group = chunked.initial_state(config, make_init(config, HEADS, 16, 0, torch.float32), BATCH).groups[0]
    init = {name: weight[..., 0, :, :] for name, weight in group.now.items()}
    x = torch.zeros(HEADS, BATCH, 24, 16)
    with pytest.raises(RuntimeError, match="hope::piece: shapes"):
        cpu_piece.joint_piece(config, joint_boxes(config), init, None, group, x, x, None, True)
