"""The products over pairs of tokens: values against plain formulas, gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hope_train.memory.solves import answer, solve_writes

SIZE = 5


def _inputs(rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64, generator=generator)

    x, b, c, q = draw(SIZE, 3), draw(SIZE, rows), draw(SIZE, 3), draw(SIZE, 3)
    eta, la = torch.sigmoid(draw(SIZE)), torch.nn.functional.logsigmoid(draw(SIZE) + 1)
    return [tensor.requires_grad_() for tensor in (x, eta, la, b, c, q)]


def _pairs(la: Tensor, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    cum = la.cumsum(-1)
    before = cum - la
    rows = before if strict else cum
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool).tril(-1 if strict else 0)
    return before, cum, (rows[..., :, None] - cum[..., None, :]).masked_fill(~mask, -torch.inf).exp()


def _plain(x: Tensor, eta: Tensor, ratio: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    full = torch.eye(SIZE, dtype=x.dtype) + eta[..., None] * ratio * (x @ x.mT)
    return torch.linalg.solve(full, eta[..., None] * b), eta[..., None] * torch.linalg.solve(full.mT, c)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("which", ["r", "u", "both"])
def test_solve_matches_autograd_through_a_general_solver(rows: int, which: str) -> None:
    x, eta, la, b, c, _ = _inputs(rows)
    before, cum, ratio = _pairs(la, strict=True)
    r, u = solve_writes(x, eta, before, cum, ratio, b if which != "u" else None, c if which != "r" else None)
    want_r, want_u = _plain(x, eta, ratio, b, c)
    pairs = [(got, want) for got, want in ((r, want_r), (u, want_u)) if got is not None]
    assert len(pairs) == (2 if which == "both" else 1)
    weights = [torch.randn_like(want) for _, want in pairs]
    got_sum = sum((got * w).sum() for (got, _), w in zip(pairs, weights, strict=True))
    want_sum = sum((want * w).sum() for (_, want), w in zip(pairs, weights, strict=True))
    leaves = [x, eta, la, b, c]
    got_grads = torch.autograd.grad(got_sum, leaves, allow_unused=True, materialize_grads=True)
    want_grads = torch.autograd.grad(want_sum, leaves, allow_unused=True, materialize_grads=True)
    for got, want in [*pairs, *zip(got_grads, want_grads, strict=True)]:
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_no_writes_at_all_has_the_right_gradient() -> None:
    """eta = 0 everywhere (eta_max = 0): nothing is written, and the gradient of eta is finite and exact."""
    x, eta, la, b, c, _ = _inputs(3)
    eta = torch.zeros_like(eta).requires_grad_()
    before, cum, ratio = _pairs(la, strict=True)
    r, u = solve_writes(x, eta, before, cum, ratio, b, c)
    assert r is not None
    assert u is not None
    want_r, want_u = _plain(x, eta, ratio, b, c)
    got = torch.autograd.grad((r + u).sum(), eta)[0]
    torch.testing.assert_close(got, torch.autograd.grad((want_r + want_u).sum(), eta)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strict", [True, False])
def test_answer(strict: bool) -> None:
    x, _, la, b, _, q = _inputs(4)
    before, cum, pairs = _pairs(la, strict)
    got = answer(q, x, b, before if strict else cum, cum, pairs)
    want = (pairs * (q @ x.mT)) @ b
    weight = torch.randn_like(want)
    leaves = [q, x, b, la]
    got_grads = torch.autograd.grad((got * weight).sum(), leaves)
    want_grads = torch.autograd.grad((want * weight).sum(), leaves)
    for left, right in zip((got, *got_grads), (want, *want_grads), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
