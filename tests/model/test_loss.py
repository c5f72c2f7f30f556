"""The chunked cross-entropy against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hope_train.model.loss import IGNORED, chunked_cross_entropy

BATCH, TOKENS, WIDTH, VOCABULARY = 2, 9, 5, 11


def problem(seed: int = 0, ignored: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D], W [V, D] (leaves) and targets [B, T] of which a share is not scored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)
    return x, weight, target.masked_fill(torch.rand(BATCH, TOKENS, generator=generator) < ignored, IGNORED)


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((x @ weight.mT).flatten(0, 1), target.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk", [1, 2, 7, 9, 18, 1024])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_sum_and_gradients_are_torchs(chunk: int, ignored: float) -> None:
    x, weight, target = problem(ignored=ignored)
    got, want = chunked_cross_entropy(x, weight, target, chunk), plain(x, weight, target)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # Scaled, as gradient accumulation scales it.
    for a, b in zip(
        torch.autograd.grad(0.25 * got, (x, weight)), torch.autograd.grad(0.25 * want, (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_scored_tokens_alone_have_gradients() -> None:
    x, weight, target = problem()
    (grad,) = torch.autograd.grad(chunked_cross_entropy(x, weight, target, 4), x)
    assert torch.equal(grad.abs().sum(-1) > 0, target != IGNORED)


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    x, weight, target = problem()
    want = dict(zip("xw", torch.autograd.grad(plain(x, weight, target), (x, weight)), strict=True))
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    total = chunked_cross_entropy(x, weight, target, 4)
    assert total.requires_grad == (frozen != "both")
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
        for leaf, name in ((x, "x"), (weight, "w")):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, want[name], rtol=1e-11, atol=1e-13)


def test_large_logits_do_not_overflow() -> None:
    x, weight, target = problem(dtype=torch.float32)
    big = x.detach().mul(1e4).requires_grad_()
    total = chunked_cross_entropy(big, weight, target, 4)
    torch.testing.assert_close(total, plain(big, weight, target))
    total.backward()  # type: ignore[no-untyped-call]
    assert big.grad is not None
    assert big.grad.isfinite().all()


def test_under_bf16_autocast_products_are_rounded_and_the_softmax_is_not() -> None:
    """bf16 keeps 8 bits: sums agree to 1%, gradients to 3% of their norm."""
    x, weight, target = problem(dtype=torch.float32, ignored=0.0)
    want = plain(x, weight, target)
    wanted = torch.autograd.grad(want, (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chunked_cross_entropy(x, weight, target, 4)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=0.01)
    assert got.item() != want.item()
    for a, b in zip(torch.autograd.grad(got, (x, weight)), wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_never_more_than_a_chunk_of_logits_at_a_time() -> None:
    """No tensor made on the way, forward or backward, is larger than a chunk of logits or the weight's gradient."""
    rows, width, vocabulary, chunk = 4096, 8, 512, 64
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    x = torch.randn(1, rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (1, rows))
    with Watch():
        chunked_cross_entropy(x, weight, target, chunk).backward()  # type: ignore[no-untyped-call]
    assert largest == max(chunk * vocabulary, rows * width)
