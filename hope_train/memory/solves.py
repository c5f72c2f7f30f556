"""The two products over pairs of tokens in a chunk, with gradients that never sum over a C x C matrix.

Both weigh pairs by decay: L_ij = eta_i ratio_ij (x_i . x_j) with ratio_ij = exp(before_i - cum_j) for j < i, and A_ti
= after_ti (q_t . x_i). The gradient with respect to a decay needs row and column sums of dL * L and dA * A, and those
follow from vectors that are there anyway (as in FlashAttention's backward, arXiv 2205.14135): with Y = (I + L)^-1 B
and dB = (I + L)^-T dY,

    dL = -dB Y^T,   sum_j dL_ij L_ij = -dB_i . (L Y)_i = -dB_i . (B_i - Y_i),   sum_i dL_ij L_ij = -(dY_j - dB_j) . Y_j

and with B = eta b, everything that eta_i does comes to dB_i . Y_i / eta_i. Measured: column sums and transposes of C
x C matrices had been the dearest element-wise kernels of the compiled backward.

The price: L Y is a difference of two numbers near Y, so where retention is tiny (alpha << 1) the gradient of log alpha
keeps a relative accuracy of about eps / alpha only. Measured against the token loop in fp32: 7e-7 at alpha 0.98, 6e-6
at 0.15, 5e-4 at 3e-4; in float64 the bar of 1e-10 holds down to alpha 2e-3 (where 3e-4 gives up to 3e-10).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_train.memory.triangular import unit_lower_inverse

Gradients = tuple[Tensor | None, ...]


class _Solve(torch.autograd.Function):
    """R = (I + L)^-1 (eta b) and U = eta (I + L)^-T c for one L; either of b and c may be missing."""

    @staticmethod
    def forward(
        ctx: Any,
        x_CI: Tensor,
        eta_C: Tensor,
        before_C: Tensor,
        cum_C: Tensor,
        ratio_CC: Tensor,
        b_CO: Tensor | None,
        c_CI: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        eta_C1 = eta_C[..., None]
        lower_CC = (eta_C1 * ratio_CC) * (x_CI @ x_CI.mT)
        one_row = c_CI is None and b_CO is not None and b_CO.shape[-1] == 1
        # a single column is cheaper to substitute into than an inverse is to make
        system_CC = lower_CC if one_row else unit_lower_inverse(lower_CC)
        r_CO = y_CI = None
        if b_CO is not None:
            r_CO = _substitute(system_CC, eta_C1 * b_CO) if one_row else system_CC @ (eta_C1 * b_CO)
        if c_CI is not None:
            y_CI = system_CC.mT @ c_CI
        ctx.one_row = one_row
        ctx.save_for_backward(x_CI, eta_C, ratio_CC, b_CO, c_CI, system_CC, r_CO, y_CI)
        return r_CO, None if y_CI is None else eta_C1 * y_CI

    @staticmethod
    def backward(ctx: Any, grad_r: Tensor | None, grad_u: Tensor | None) -> Gradients:
        x_CI, eta_C, ratio_CC, b_CO, c_CI, system_CC, r_CO, y_CI = ctx.saved_tensors
        eta_C1 = eta_C[..., None]
        eta_grad = row_C = column_C = torch.zeros_like(eta_C)
        left: list[Tensor] = []
        right: list[Tensor] = []
        b_grad = c_grad = None
        if r_CO is not None:
            assert grad_r is not None
            solved = _substitute(system_CC, grad_r, transposed=True) if ctx.one_row else system_CC.mT @ grad_r
            b_grad = eta_C1 * solved
            eta_grad = eta_grad + (solved * _per_rate(r_CO, eta_C1, b_CO)).sum(-1)
            row_C = row_C - (solved * (eta_C1 * b_CO - r_CO)).sum(-1)
            column_C = column_C - ((grad_r - solved) * r_CO).sum(-1)
            left.append(solved)
            right.append(r_CO)
        if y_CI is not None:
            assert grad_u is not None
            c_grad = system_CC @ (eta_C1 * grad_u)
            eta_grad = eta_grad + (y_CI * _per_rate(c_grad, eta_C1, grad_u)).sum(-1)
            row_C = row_C - (y_CI * (eta_C1 * grad_u - c_grad)).sum(-1)
            column_C = column_C - ((c_CI - y_CI) * c_grad).sum(-1)
            left.append(y_CI)
            right.append(c_grad)
        pairs_CC = left[0] * right[0].mT if ctx.one_row else _join(left) @ _join(right).mT
        gram_grad = (-eta_C1 * ratio_CC) * pairs_CC
        x_grad = gram_grad @ x_CI + gram_grad.mT @ x_CI
        return x_grad, eta_grad, row_C, -column_C, None, b_grad, c_grad


class _Answer(torch.autograd.Function):
    """O = (Q X^T * after) R, with after_ti = exp(query_cum_t - cum_i) where the mask inside `after` allows."""

    @staticmethod
    def forward(
        ctx: Any, q_CI: Tensor, x_CI: Tensor, r_CO: Tensor, query_cum_C: Tensor, cum_C: Tensor, after_CC: Tensor
    ) -> Tensor:
        score_CC = after_CC * (q_CI @ x_CI.mT)
        o_CO = score_CC @ r_CO
        ctx.save_for_backward(q_CI, x_CI, r_CO, after_CC, score_CC, o_CO)
        return o_CO

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        q_CI, x_CI, r_CO, after_CC, score_CC, o_CO = ctx.saved_tensors
        r_grad = score_CC.mT @ grad
        pairs_CC = after_CC * (grad @ r_CO.mT)
        query_grad = (grad * o_CO).sum(-1)
        return pairs_CC @ x_CI, pairs_CC.mT @ q_CI, r_grad, query_grad, -(r_grad * r_CO).sum(-1), None


def solve_writes(
    x_CI: Tensor,
    eta_C: Tensor,
    before_C: Tensor,
    cum_C: Tensor,
    ratio_CC: Tensor,
    b_CO: Tensor | None,
    c_CI: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """R = (I + L)^-1 (eta b) and U = eta (I + L)^-T c with L_ij = eta_i ratio_ij (x_i . x_j).

    Any leading dimensions, the same for all but `ratio`, which may be broadcast. `ratio` must be exp(before_i -
    cum_j) on a strictly lower mask and 0 elsewhere; its own gradient is not taken: it goes to `before` and `cum`. A
    missing b (c) gives None for R (U).
    """
    lead = x_CI.shape[:-1]
    result: tuple[Tensor | None, Tensor | None] = _Solve.apply(
        x_CI, eta_C.expand(lead), before_C.expand(lead), cum_C.expand(lead), ratio_CC.detach(), b_CO, c_CI
    )
    return result


def answer(q_CI: Tensor, x_CI: Tensor, r_CO: Tensor, query_cum_C: Tensor, cum_C: Tensor, after_CC: Tensor) -> Tensor:
    """O_t = sum_i after_ti (q_t . x_i) r_i; the gradient of `after` goes to `query_cum` and `cum`."""
    if query_cum_C is cum_C:
        query_cum_C = cum_C.clone()  # the compiler takes no tensor twice
    result: Tensor = _Answer.apply(q_CI, x_CI, r_CO, query_cum_C, cum_C, after_CC.detach())
    return result


def _substitute(lower_CC: Tensor, rhs_C1: Tensor, transposed: bool = False) -> Tensor:
    if transposed:
        return torch.linalg.solve_triangular(lower_CC.mT, rhs_C1, upper=True, unitriangular=True)
    return torch.linalg.solve_triangular(lower_CC, rhs_C1, upper=False, unitriangular=True)


def _per_rate(scaled: Tensor, eta_C1: Tensor, limit: Tensor) -> Tensor:
    """`scaled` / eta, whose limit at eta = 0 is `limit` where no earlier token writes either (eta_max = 0)."""
    zero = eta_C1 == 0
    return torch.where(zero, limit, scaled / torch.where(zero, torch.ones_like(eta_C1), eta_C1))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
