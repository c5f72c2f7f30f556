"""(I + L)^-1 for batches of small strictly lower triangular L, as matrix products.

Inside a chunk every write depends on the earlier ones; this solve is what replaces the loop over tokens. A batched
triangular solve is several times slower than matrix products of the same size (measured on CPU: 16 against 90 GFLOP/s at
64 x 64), so only blocks of 16 are inverted by it, and the rest is block elimination.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 16


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1, [..., C, C], from the strictly lower part of `lower` (whatever stands elsewhere is ignored)."""
    size = lower.shape[-1]
    identity = torch.eye(min(size, _BLOCK), dtype=lower.dtype, device=lower.device)
    if size <= _BLOCK or size % _BLOCK or (size // _BLOCK) & (size // _BLOCK - 1):
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
    count = size // _BLOCK
    blocks = lower.unflatten(-1, (count, _BLOCK)).unflatten(-3, (count, _BLOCK))
    diagonal = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    inverse = torch.linalg.solve_triangular(
        diagonal, identity.expand_as(diagonal), upper=False, unitriangular=True
    )
    width = _BLOCK
    while width < size:
        pairs = size // (2 * width)
        corner = torch.stack(
            [lower[..., (2 * p + 1) * width : (2 * p + 2) * width, 2 * p * width : (2 * p + 1) * width] for p in range(pairs)],
            dim=-3,
        )
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -(second @ (corner @ first))
        top = torch.cat((first, torch.zeros_like(first)), dim=-1)
        inverse = torch.cat((top, torch.cat((below, second), dim=-1)), dim=-2)
        width *= 2
    return inverse.squeeze(-3)


class _SolveUnitLower(torch.autograd.Function):
    """Y = (I + L)^-1 B. Backward solves once with the transpose: dB = (I + L)^-T dY, dL = -dB Y^T."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, rhs: Tensor, inverse: Tensor) -> Tensor:
        result = inverse @ rhs
        ctx.save_for_backward(inverse, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inverse, result = ctx.saved_tensors
        grad_rhs = inverse.mT @ grad
        return -(grad_rhs @ result.mT), grad_rhs, None


class _SolveUnitLowerTransposed(torch.autograd.Function):
    """Y = (I + L)^-T B. Backward: dB = (I + L)^-1 dY, dL = -Y dB^T."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, rhs: Tensor, inverse: Tensor) -> Tensor:
        result = inverse.mT @ rhs
        ctx.save_for_backward(inverse, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inverse, result = ctx.saved_tensors
        grad_rhs = inverse @ grad
        return -(result @ grad_rhs.mT), grad_rhs, None


class _SolveOneRow(torch.autograd.Function):
    """y = (I + L)^-1 b for a single column: substitution, no inverse."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, rhs: Tensor) -> Tensor:
        result = torch.linalg.solve_triangular(lower, rhs, upper=False, unitriangular=True)
        ctx.save_for_backward(lower, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        lower, result = ctx.saved_tensors
        grad_rhs = torch.linalg.solve_triangular(lower.mT, grad, upper=True, unitriangular=True)
        return -(grad_rhs * result.mT), grad_rhs


def solve_one_row(lower: Tensor, rhs: Tensor) -> Tensor:
    """(I + L)^-1 b, [..., C, 1]; the same conditions as `solve_unit_lower`."""
    result: Tensor = _SolveOneRow.apply(lower, rhs)
    return result


class _Gram(torch.autograd.Function):
    """X X^T; backward adds the gradient to its transpose first and so multiplies once instead of twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return (grad + grad.mT) @ x


def gram(x: Tensor) -> Tensor:
    """Inner products of all pairs of rows, [..., C, I] -> [..., C, C]."""
    result: Tensor = _Gram.apply(x)
    return result


def solve_unit_lower(lower: Tensor, rhs: Tensor, inverse: Tensor, transposed: bool = False) -> Tensor:
    """(I + L)^-1 rhs (or its transpose's), [..., C, O], with `inverse = unit_lower_inverse(L.detach())`.

    Gradients flow to `lower` and `rhs`; `lower` must be strictly lower triangular through a mask of its own, since the gradient
    returned for it is not masked.
    """
    function = _SolveUnitLowerTransposed if transposed else _SolveUnitLower
    result: Tensor = function.apply(lower, rhs, inverse)
    return result
