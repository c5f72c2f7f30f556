"""The kernel for a whole chunk against the plain functions: outputs, states and all gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import chunked, cpu_piece, cpu_products, pieces
from hope_train.memory.chunked import Kernels, Row
from tests.memory.cases import make_init, relative

pytestmark = pytest.mark.skipif(not cpu_products.wanted(), reason="this processor does not gain from the kernel")

KERNELS = dataclasses.replace(chunked.PLAIN, row=cpu_piece.ROW)
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


def outcome(
    config: MemoryConfig, width: int, tokens: int, dtype: torch.dtype, kernels: Kernels, reads: str = "both"
) -> dict[str, Tensor]:
    """Answers, last states, and gradients of a random read-out of both (or of one) with respect to inputs and initial
    states."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(3, BATCH, tokens, HEADS, width, generator=generator, dtype=torch.float64).to(dtype)
    z, q = (x.clone().requires_grad_() for x in draws[:2])
    init = {
        name: x.detach().to(dtype).requires_grad_() for name, x in make_init(config, HEADS, width, 0, dtype).items()
    }
    o, state = chunked.run(config, z, q, init, kernels=kernels)
    now = state.groups[0].now
    total = (o * draws[2]).sum() if reads != "states" else 0
    for weight in now.values() if reads != "answers" else ():
        total = total + (weight * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    leaves = {"z": z, "q": q, **init}
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return {"o": o, **now, **{f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize(("chunk", "width", "options"), CASES, ids=str)
def test_equals_the_plain_functions(chunk: int, width: int, options: dict[str, Any]) -> None:
    """Three chunks, so that gradients go through the states between them; as near to float64 as plain float32 is."""
    assert cpu_products.load(), "wanted here, but it could not be built"
    config = MemoryConfig(chunk_size=chunk, generator_chunk_size=chunk, **options)
    compare(config, width, 3 * chunk, "both")


@pytest.mark.parametrize("reads", ["answers", "states"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_gradients_of_answers_or_states_alone(reads: str, chunks: int) -> None:
    """Training asks nothing of the last states."""
    assert cpu_products.load()
    compare(MemoryConfig(chunk_size=16, generator_chunk_size=16), 16, 16 * chunks, reads)


def compare(config: MemoryConfig, width: int, tokens: int, reads: str) -> None:
    """The kernel is as near to float64 as plain float32 is."""
    exact = outcome(config, width, tokens, torch.float64, chunked.PLAIN, reads)
    plain = outcome(config, width, tokens, torch.float32, chunked.PLAIN, reads)
    found = outcome(config, width, tokens, torch.float32, KERNELS, reads)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        error, usual = (relative(x[name].double(), value) for x in (found, plain))
        assert error < max(3 * usual, 2e-6), (name, error, usual)


@pytest.mark.parametrize("clamp", [0.99, None])
@pytest.mark.parametrize("save_every", [1, 2])
def test_chunks_one_at_a_time_and_from_given_weights(clamp: float | None, save_every: int) -> None:
    """All chunks at once, as batches that are run again, or one by one, their weights given: then the first one does
    not skip the products that are there twice. What comes out is the same."""
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=16, generator_chunk_size=16, clamp=clamp, save_every=save_every)
    calls = []

    def run(config: MemoryConfig, init: Any, group: Any, *inputs: Tensor) -> Any:
        calls.append((group is None, inputs[0].shape[2]))
        return cpu_piece.whole_chunks(config, init, group, *inputs)

    def one(config: MemoryConfig, init: Any, group: Any, *inputs: Tensor) -> Any:
        group, parts = group or pieces.initial_group(config, init, BATCH), []
        for part in zip(*(x.split(16, 2) for x in inputs), strict=True):
            o, group = cpu_piece.whole_chunks(config, init, group, *part)
            parts.append(o)
        return torch.cat(parts, 2), group

    found = outcome(config, 32, 80, torch.float32, dataclasses.replace(KERNELS, row=Row(cpu_piece.takes, run)))
    given = outcome(config, 32, 80, torch.float32, dataclasses.replace(KERNELS, row=Row(cpu_piece.takes, one)))
    whole = [(True, 80)] if save_every == 1 else [(True, 32), (False, 32), (False, 16)]
    assert calls[: len(whole)] == whole
    for name, value in given.items():
        if name.startswith("d_"):  # sums in another order
            assert relative(found[name], value) < 3e-6, name
        else:
            assert torch.equal(found[name], value), name


def test_a_given_state_is_not_taken_for_the_initial_one() -> None:
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=16, generator_chunk_size=16)
    init = make_init(config, HEADS, 16, 0, torch.float32)
    z, q = torch.randn(2, BATCH, 32, HEADS, 16, generator=torch.Generator().manual_seed(1))
    whole, _ = chunked.run(config, z, q, init, kernels=KERNELS)
    _, state = chunked.run(config, z[:, :16], q[:, :16], init, kernels=KERNELS)
    rest, _ = chunked.run(config, z[:, 16:], q[:, 16:], init, state=state, kernels=KERNELS)
    assert torch.equal(rest, whole[:, 16:])


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
    factors = torch.ops.hope.piece(*inputs, 16, 1.0, -2.0, 4.0, 1.0, 0.99, True, True)[-2]
    assert factors.shape == (HEADS, BATCH, 1, 10)
    assert (factors <= 1).all()
    assert 0 < (factors < 1).sum() < factors.numel()


def test_a_rest_of_a_chunk_and_more_threads() -> None:
    """Left-over tokens take the plain functions after the kernel's state; the bits do not depend on the threads."""
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=32, generator_chunk_size=32)

    exact = outcome(config, 32, 77, torch.float64, chunked.PLAIN)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found.append(outcome(config, 32, 77, torch.float32, KERNELS))
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
        ({"chunk_size": 24, "generator_chunk_size": 24}, {}),
        ({}, {"width": 24}),
        ({}, {"dtype": torch.float64}),
    ],
    ids=str,
)
def test_what_it_leaves_to_others(change: dict[str, Any], more: dict[str, Any]) -> None:
    assert cpu_products.load()
    config = MemoryConfig(**{"chunk_size": 16, "generator_chunk_size": 16} | change)
    shape = HEADS, BATCH, 16, more.get("width", 16)
    x = torch.zeros(shape, dtype=more.get("dtype", torch.float32))
    usual = MemoryConfig(chunk_size=16, generator_chunk_size=16)
    assert cpu_piece.takes(usual, *2 * [torch.zeros(2, 3, 16, 16)], None)
    assert not cpu_piece.takes(config, x, more.get("q", x), more.get("starts"))


def test_refuses_shapes_it_cannot_read() -> None:
    assert cpu_products.load()
    config = MemoryConfig(chunk_size=16, generator_chunk_size=16)
    group = chunked.initial_state(config, make_init(config, HEADS, 16, 0, torch.float32), BATCH).groups[0]
    init = {name: weight[..., 0, :, :] for name, weight in group.now.items()}
    x = torch.zeros(HEADS, BATCH, 24, 16)
    with pytest.raises(RuntimeError, match="hope::piece: shapes"):
        cpu_piece.whole_chunks(config, init, group, x, x)
