"""Attention against its formula, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hope_train.model.attention import Attention
from hope_train.model.layers import apply_rope, document_ids, rope_tables
from tests.model.small import relative, small_config

TOKENS, HEADS, WIDTH = 11, 2, 6


def make(theta: float = 10000.0) -> Attention:
    attention = Attention(small_config("transformer_pp", rope_theta=theta)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return attention


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(2, TOKENS, HEADS * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """A head's vector [N] turned by its position: numbers j and j + N/2 are a pair with frequency theta^(-2j/N)."""
    half = WIDTH // 2
    pairs = torch.complex(x[:half], x[half:])
    angle = torch.tensor([position * theta ** (-2.0 * j / WIDTH) for j in range(half)], dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag))


def written_out(attention: Attention, x: Tensor, starts: Tensor | None, theta: float) -> Tensor:
    """Token by token and head by head."""
    weights = {name: getattr(attention, f"{name}_proj").weight for name in ("q", "k", "v", "out")}
    rows = []
    for b in range(x.shape[0]):
        documents = [0] * TOKENS if starts is None else starts[b].long().cumsum(0).tolist()
        for t in range(TOKENS):
            heads = []
            for h in range(HEADS):
                part = slice(h * WIDTH, (h + 1) * WIDTH)
                q = rotated(weights["q"][part] @ x[b, t], t, theta)
                seen = [s for s in range(t + 1) if documents[s] == documents[t]]
                scores = [q @ rotated(weights["k"][part] @ x[b, s], s, theta) / math.sqrt(WIDTH) for s in seen]
                share = torch.softmax(torch.stack(scores), 0)
                heads.append(sum(share[i] * (weights["v"][part] @ x[b, s]) for i, s in enumerate(seen)))
            rows.append(weights["out"] @ torch.cat(heads))  # type: ignore[arg-type]
    return torch.stack(rows).unflatten(0, (x.shape[0], TOKENS))


def boundaries() -> Tensor:
    starts = torch.zeros(2, TOKENS, dtype=torch.bool)
    starts[0, [0, 4, 5]] = True
    starts[1, 7] = True
    return starts


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("theta", [10000.0, 10.0])
def test_formula(documents: bool, theta: float) -> None:
    attention, starts = make(theta), boundaries() if documents else None
    with torch.no_grad():
        assert relative(attention(inputs(), starts), written_out(attention, inputs(), starts, theta)) < 1e-12


def test_only_distances_matter() -> None:
    """Rotary embeddings: scores depend on the distance of query and key alone."""
    q, k = (
        inputs(2).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2),
        inputs(3).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2),
    )
    scores = []
    for offset in (0, 1000):
        tables = rope_tables(torch.arange(offset, offset + TOKENS), WIDTH, 10000.0, torch.float64)
        scores.append(apply_rope(q, *tables) @ apply_rope(k, *tables).mT)
    assert relative(scores[1], scores[0]) < 1e-11
    assert relative(scores[0], q @ k.mT) > 0.1


def test_angles_are_exact_far_into_a_text() -> None:
    """Made in float64: in float32 an angle at position 1,000,000 would be off by up to 0.03."""
    cosine, _ = rope_tables(torch.tensor([1_000_000]), 4, 10000.0, torch.float32)
    assert cosine[0].tolist() == pytest.approx([math.cos(1e6), math.cos(1e4)], abs=1e-6)


def test_steps_with_documents_that_begin_between_them() -> None:
    attention, x, starts = make(), inputs(), boundaries()
    state = attention.initial_state(2, x.device, x.dtype)
    outputs = []
    with torch.no_grad():
        for first, last in ((0, 1), (1, 4), (4, 5), (5, 10), (10, 11)):
            output, state = attention.step(x[:, first:last], state, starts[:, first:last])
            outputs.append(output)
        assert relative(torch.cat(outputs, 1), attention(x, starts)) < 1e-12


def test_document_numbers() -> None:
    starts = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert document_ids(starts).tolist() == [[1, 1, 2, 3], [0, 0, 1, 1]]
