"""The triangular inverse and its gradients, for every size the blocks treat differently."""

from __future__ import annotations

import pytest
import torch

from hope_train.memory.triangular import solve_unit_lower, unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 32, 48, 64, 100, 128])
def test_inverse(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    lower = torch.tril(torch.randn(3, 2, size, size, dtype=torch.float64, generator=generator) * 0.2, -1)
    eye = torch.eye(size, dtype=torch.float64)
    assert ((eye + lower) @ unit_lower_inverse(lower) - eye).abs().max() < 1e-10


@pytest.mark.parametrize("transposed", [False, True])
def test_solve_is_differentiable(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 6, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    rhs = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    def solve(raw: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
        lower = torch.tril(raw, -1)
        return solve_unit_lower(lower, rhs, unit_lower_inverse(lower.detach()), transposed)

    assert torch.autograd.gradcheck(solve, (raw, rhs))
    full = torch.eye(6, dtype=torch.float64) + torch.tril(raw, -1)
    want = torch.linalg.solve(full.mT if transposed else full, rhs)
    torch.testing.assert_close(solve(raw, rhs), want, rtol=1e-12, atol=1e-12)
