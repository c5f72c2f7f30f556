"""Small models of every kind in float64, and text for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_train.config.load import validate
from hope_train.config.model import ModelConfig
from hope_train.model.hope import HopeModel, build_model

VOCABULARY = 23
CHUNK = 8
ARCHITECTURES = ("hope", "hope_attention", "transformer_pp")


def small_config(arch: str = "hope", **changes: Any) -> ModelConfig:
    """Two layers of width 12 with two heads; `memory` and everything else can be changed.

    Initial projections are wide, so that every part has a say in the logits.
    """
    memory = {"chunk_size": CHUNK, "generator_chunk_size": CHUNK, **changes.pop("memory", {})}
    own: dict[str, Any] = (
        {"mlp_width": 20}
        if arch == "transformer_pp"
        else {"cms": {"levels": [{"width": 10, "period": 1}, {"width": 14, "period": 4}]}}
    )
    sizes = {"d_model": 12, "n_layers": 2, "n_heads": 2, "vocab_size": VOCABULARY, "init_std": 0.3}
    return validate(ModelConfig, {"arch": arch, **sizes, **own, "memory": memory, **changes})


def small_model(arch: str = "hope", seed: int = 0, **changes: Any) -> HopeModel:
    """A float64 model of `small_config`, in training mode."""
    return build_model(small_config(arch, **changes), seed).double()


def text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Token numbers, int64 [rows, tokens]."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(
    model: HopeModel, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of the mean loss by parameter name."""
    model.zero_grad(set_to_none=True)
    total, count = model.loss(tokens_BT, targets_BT, starts_BT)
    (total / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return ((got - want).norm() / want.norm()).item()
