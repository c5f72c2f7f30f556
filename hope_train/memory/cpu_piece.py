"""A whole chunk of all memories as one kernel (cpu_piece.cpp): for the default rule, where `cpu_products` is wanted.

The mathematics is that of `pieces.joint_piece`, forward and backward by hand; nothing but inputs and outputs is kept,
as with an activation budget of 0. Float32 on the CPU; all other cases are left to the functions in `pieces`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import cpu_products
from hope_train.memory.pieces import Group
from hope_train.memory.rules import Boxes

NAMES = ("w2", "w1", "w1s")


class _Piece(torch.autograd.Function):
    """(o, w2, w1, w1s) from z, q, the group's three stacks, and their initial states."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        o, w2, w1, w1s, factors = torch.ops.hope.piece(*inputs, *settings)
        ctx.settings = settings
        ctx.save_for_backward(*inputs, w2, w1, w1s, factors)
        return o, w2, w1, w1s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch.ops.hope.piece_backward(*grads, *ctx.saved_tensors, *ctx.settings)


def takes(config: MemoryConfig, z_HBCN: Tensor, q_HBCN: Tensor | None, starts: Tensor | None, ends_chunk: bool) -> bool:
    """Whether the kernel computes this piece: a whole chunk under the default rule, without documents in it."""
    rule = (config.kind, config.activation, config.read, config.decay_to, config.rank_one, config.momentum)
    sizes = (config.expansion * z_HBCN.shape[-1], z_HBCN.shape[-1])
    return (
        cpu_products.READY
        and rule == ("mlp", "silu", "after", "init", "both", False)
        and q_HBCN is not None
        and starts is None
        and ends_chunk
        and z_HBCN.device.type == "cpu"
        and z_HBCN.dtype == q_HBCN.dtype == torch.float32
        and z_HBCN.shape[2] in (16, 32, 64)
        and all(size % cpu_products.LANES == 0 for size in sizes)
    )


def joint_piece(
    config: MemoryConfig,
    boxes: Boxes,
    init: dict[str, Tensor],
    theta_logit_H: Tensor | None,
    group: Group,
    z_HBCN: Tensor,
    q_HBCN: Tensor,
    starts_BC: Tensor | None,
    ends_chunk: bool,
) -> tuple[Tensor, Group]:
    """`pieces.joint_piece`, for what it `takes`."""
    clamp = math.inf if config.clamp is None else config.clamp
    rates = config.eta_max, config.eta_bias, config.alpha_bias, 2.0 * config.loss_factor, clamp
    settings = (*rates, config.normalize_v, config.normalize_q)
    weights = (group.anchor[name] for name in NAMES)
    o, *new = _Piece.apply(settings, z_HBCN, q_HBCN, *weights, *(init[name] for name in NAMES))
    now = dict(zip(NAMES, new, strict=True))
    return o, Group(now, now, {})
