"""Orthogonalisation of matrices, many at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_train.config.rules import NewtonSchulzConfig


def working_type(config: NewtonSchulzConfig, parameter: Tensor) -> torch.dtype:
    """The type in which a parameter's matrices are orthogonalised."""
    if config.dtype == "auto":
        return torch.bfloat16 if parameter.is_cuda else parameter.dtype
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def newton_schulz(stack_NOI: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """About U V^T of each matrix U S V^T, [N, O, I], in its own type; a matrix of zeros stays zero.

    X <- a X + b (X X^T) X + c (X X^T)^2 X from X = G / |G|_F (Jordan et al., Muon, 2024). Singular values come out
    between about 0.7 and 1.2, not at 1: the coefficients are chosen for speed. The iteration is torch.optim.Muon's,
    which takes one matrix at a time and always bf16.
    """
    a, b, c = config.coefficients
    tall = stack_NOI.shape[-2] > stack_NOI.shape[-1]
    x = stack_NOI.mT if tall else stack_NOI
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=config.eps)
    for _ in range(config.steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
