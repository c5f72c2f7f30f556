"""Delta gradient descent (Nested Learning, Eqs. 56-57): gradients of linear layers that also forget.

For one sample with input x and output gradient d of a layer y = W x

    W <- W (I - eta' x x^T) - eta' d x^T,    eta' = eta / (1 + eta |x|^2)

(printed with eta / (1 + eta), which is |x| = 1). On a batch (open): the mean over samples of this at the old W. That is
W - eta g with

    g = sum_i (d_i + W x_i / n) x_i^T / (1 + eta |x_i|^2)

where d_i are the gradients of the batch's mean loss and n is its number of token positions. g takes the gradient's
place in backward, at no further product (W x_i is the layer's output). It is a sum over samples, so accumulating,
averaging over a level's period, summing over ranks, and saving in mid-period need nothing besides: W stands still
meanwhile, and so does eta, the rate of the level's next update. What is clipped is the norm of g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SumRanks = Callable[[Tensor], Tensor]
"""The sum of the ranks' partial results, on every rank."""


class DeltaLayer:
    """Forward hook of a linear layer without bias: the same output, but the weight's gradient is g."""

    def __init__(
        self, rate: Callable[[], float], positions: Callable[[], int], over_ranks: SumRanks | None = None
    ) -> None:
        """
        Args:
            rate: eta, of the update that the gradient of this backward will be used in.
            positions: n, of the step under way.
            over_ranks: where each rank has a part of the layer's inputs, the sum of partial results.
        """
        self.rate, self.positions, self.over_ranks = rate, positions, over_ranks

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """In evaluation, and where nothing is learned, the output as it is."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not (module.training and torch.is_grad_enabled() and weight.requires_grad):
            return output
        result: Tensor = _Delta.apply(arguments[0], weight, output.detach(), self)
        return result


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, y: Tensor, layer: DeltaLayer) -> Tensor:
        ctx.save_for_backward(x, weight_OI, y)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight_OI, y = ctx.saved_tensors
        layer: DeltaLayer = ctx.layer
        grad_x = (grad @ weight_OI.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        x_SI, y_SO, grad_SO = (tensor.flatten(0, -2) for tensor in (x, y, grad))
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        square_S1 = x_SI.to(wide).square().sum(-1, keepdim=True)
        if layer.over_ranks is not None:
            square_S1, y_SO = layer.over_ranks(square_S1), layer.over_ranks(y_SO)
        left_SO = (grad_SO.to(wide) + y_SO.to(wide) / layer.positions()) / (1 + layer.rate() * square_S1)
        # The product in the type of the layer's own, as autograd would take it.
        return grad_x, (left_SO.to(grad.dtype).mT @ x_SI.to(grad.dtype)).to(weight_OI.dtype), None, None
