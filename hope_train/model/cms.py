"""Continuum Memory System (Eqs. 70-74): a chain of MLPs, each with its own update frequency.

The module only computes; who steps when is decided by `hope_train.levels`. A level's parameters are named
`levels.<l>.…`, which is how the schedule knows them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hope_train.config.model import CMSConfig
from hope_train.model.layers import SwiGLU

LevelState = Sequence[dict[str, Tensor] | None]
"""Per level, weights added to the level's own for each sequence (test-time memorisation), or None."""


class CMS(nn.Module):
    """Levels from the fastest to the slowest, applied to the residual stream; includes the residual."""

    def __init__(self, d_model: int, config: CMSConfig, eps: float) -> None:
        super().__init__()
        self.variant = config.variant
        self.levels = nn.ModuleList(SwiGLU(d_model, level.width, eps, level.activation) for level in config.levels)
        self.mix = nn.Parameter(torch.ones(len(config.levels))) if config.variant == "independent" else None

    def forward(self, x_BTD: Tensor, state: LevelState | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D].

        sequential and nested (73, 72): y = level_k(… level_1(x)), each level(x) = x + MLP(norm x).
        independent (74): y = x + sum_l mix_l MLP_l(norm_l x); mix starts at ones.
        """
        deltas = state if state is not None else [None] * len(self.levels)
        if self.mix is not None:
            branches = [level(x_BTD, delta) for level, delta in zip(self.levels, deltas, strict=True)]
            total_BTD = x_BTD
            for number, branch_BTD in enumerate(branches):
                total_BTD = total_BTD + self.mix[number] * branch_BTD
            return total_BTD
        for level, delta in zip(self.levels, deltas, strict=True):
            x_BTD = x_BTD + level(x_BTD, delta)
        return x_BTD
