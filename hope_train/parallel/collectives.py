"""Exchanges between tensor-parallel ranks that autograd can go back through: plain tensors in and out.

Shapes: B batch, T tokens (of the whole sequence), t = T / ranks of this rank, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x_BtD, group)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return _scattered_sum(grad_BTD, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered_sum(x_BTD, group)

    @staticmethod
    def backward(ctx: Any, grad_BtD: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad_BtD, ctx.group), None


def copy_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """x as it is; its gradient is the sum of what the ranks make of it."""
    result: Tensor = _Copy.apply(x, group)
    return result


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results, on every rank."""
    result: Tensor = _Sum.apply(x, group)
    return result


def gather_tokens(x_BtD: Tensor, group: ProcessGroup) -> Tensor:
    """[B, t, D] of each rank -> the whole sequence [B, T, D]; its gradient is summed and divided again."""
    result: Tensor = _GatherTokens.apply(x_BtD, group)
    return result


def scatter_sum(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results [B, T, D], of which each keeps its own tokens [B, t, D]."""
    result: Tensor = _ScatterSum.apply(x_BTD, group)
    return result


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # the argument may be somebody else's as well
    dist.all_reduce(total, group=group)
    return total


def _gathered(x_BtD: Tensor, group: ProcessGroup) -> Tensor:
    parts = x_BtD.new_empty((dist.get_world_size(group) * x_BtD.shape[0], *x_BtD.shape[1:]))
    all_gather(parts, x_BtD.contiguous(), group=group)
    return parts.unflatten(0, (-1, x_BtD.shape[0])).movedim(0, 1).flatten(1, 2)


def _scattered_sum(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    parts = x_BTD.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0).flatten(0, 1).contiguous()
    mine_BtD = parts.new_empty((x_BTD.shape[0], *parts.shape[1:]))
    reduce_scatter(mine_BtD, parts, group=group)
    return mine_BtD


# Their names in newer versions of torch, where the older ones warn.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's tensor of the same shape, stacked: [R, ...]. Not differentiable."""
    x = x.detach().contiguous()
    parts = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    all_gather(parts, x, group=group)
    return parts.unflatten(0, (-1, x.shape[0]))
