"""AdamW: torch's own, with its lazily created state made available beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig


class AdamWRule:
    """`torch.optim.AdamW` with the configured betas, epsilon and decoupled weight decay."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW over these groups; groups with `decay` false get no weight decay."""
        config = self.config
        prepared = [{**group, "weight_decay": config.weight_decay if group["decay"] else 0.0} for group in groups]
        return torch.optim.AdamW(
            prepared,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            # None and not False: False would also turn off torch's choice of the foreach kernels on GPU.
            fused=True if config.fused else None,
        )

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zero moments and a zero step counter, of the kinds that AdamW makes at its first step."""
        scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        on_device = bool(group.get("fused") or group.get("capturable"))
        step = (
            torch.zeros((), dtype=torch.float32 if group.get("fused") else scalar, device=parameter.device)
            if on_device
            else torch.tensor(0.0, dtype=scalar)
        )
        return {
            "step": step,
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
