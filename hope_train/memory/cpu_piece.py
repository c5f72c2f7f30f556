"""Whole chunks of all memories as one kernel (cpu_piece.cpp): for the default rule, where `cpu_products` is wanted.

The mathematics is that of `pieces.joint_piece`, forward and backward by hand; beside inputs, outputs and the states
between chunks one tensor is kept, what the main memory is asked, else as with an activation budget of 0. Float32 on the
CPU; all other cases are left to the functions in `pieces`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import cpu_products
from hope_train.memory.chunked import Row
from hope_train.memory.pieces import Group

NAMES = ("w2", "w1", "w1s")


class _Piece(torch.autograd.Function):
    """(o, w2, w1, w1s) from z, q, the group's three stacks (None: all at their initial states), and these."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        o, w2, w1, w1s, *kept = torch.ops.hope.piece(*inputs, *settings)
        ctx.settings = settings
        ctx.save_for_backward(*inputs, w2, w1, w1s, *kept)
        ctx.set_materialize_grads(False)  # training asks nothing of the last states
        return o, w2, w1, w1s

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_o is None:
            d_o = torch.zeros_like(ctx.saved_tensors[0])
        return None, *torch.ops.hope.piece_backward(d_o, *grads, *ctx.saved_tensors, *ctx.settings)


def takes(config: MemoryConfig, z_HBTN: Tensor, q_HBTN: Tensor | None, starts: Tensor | None) -> bool:
    """Whether the kernel computes whole chunks of this: under the default rule, without documents."""
    rule = (config.kind, config.activation, config.read, config.decay_to, config.rank_one, config.momentum)
    sizes = (config.expansion * z_HBTN.shape[-1], z_HBTN.shape[-1])
    return (
        cpu_products.READY
        and rule == ("mlp", "silu", "after", "init", "both", False)
        and q_HBTN is not None
        and starts is None
        and z_HBTN.device.type == "cpu"
        and z_HBTN.dtype == q_HBTN.dtype == torch.float32
        and config.chunk_size in (16, 32, 64)
        and all(size % cpu_products.LANES == 0 for size in sizes)
    )


def whole_chunks(
    config: MemoryConfig, init: dict[str, Tensor], group: Group | None, z_HBTN: Tensor, q_HBTN: Tensor
) -> tuple[Tensor, Group]:
    """`pieces.joint_piece` over one whole chunk after the other, for what it `takes`; without a group from the initial
    states, which spares the first chunk a sixth of its products."""
    clamp = math.inf if config.clamp is None else config.clamp
    rates = config.eta_max, config.eta_bias, config.alpha_bias, 2.0 * config.loss_factor, clamp
    settings = (config.chunk_size, *rates, config.normalize_v, config.normalize_q)
    weights = (None if group is None else group.anchor[name] for name in NAMES)
    o, *new = _Piece.apply(settings, z_HBTN, q_HBTN, *weights, *(init[name] for name in NAMES))
    now = dict(zip(NAMES, new, strict=True))
    return o, Group(now, now, {})


ROW = Row(takes, whole_chunks)
