"""The triangular inverse, for every size the blocks treat differently."""

from __future__ import annotations

import pytest
import torch

from hope_train.memory.triangular import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 32, 48, 64, 100, 128])
def test_inverse(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    lower = torch.tril(torch.randn(3, 2, size, size, dtype=torch.float64, generator=generator) * 0.2, -1)
    eye = torch.eye(size, dtype=torch.float64)
    assert ((eye + lower) @ unit_lower_inverse(lower) - eye).abs().max() < 1e-10
