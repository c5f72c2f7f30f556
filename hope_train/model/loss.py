"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Target value of positions that are not scored."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk: no logits are kept and none are computed twice.

    `weight_VD` may be a part of the output matrix, of which `vocabulary` knows the other parts: the sum is then over
    the whole vocabulary all the same, and the gradient of x is this part's share of it."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk: int, vocabulary: Vocabulary
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        low = torch.get_autocast_dtype(x_MD.device.type) if torch.is_autocast_enabled(x_MD.device.type) else x_MD.dtype
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_MD.device.type, enabled=False):
            weight_low_VD = weight_VD.to(low)
            total = torch.zeros((), dtype=wide, device=x_MD.device)
            dx_MD = torch.empty_like(x_MD) if need_x else None
            dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
            for first in range(0, x_MD.shape[0], chunk):
                rows = slice(first, first + chunk)
                x_CD, target_C = x_MD[rows].to(low), target_M[rows]
                scored_C = target_C != IGNORED
                logits_CV = (x_CD @ weight_low_VD.mT).to(wide)
                lse_C, logit_C, index_C1, here_C1 = vocabulary.statistics(logits_CV, target_C)
                total += ((lse_C - logit_C) * scored_C).sum()
                if need_x or need_weight:
                    d_CV = logits_CV.sub_(lse_C[:, None]).exp_()
                    d_CV.scatter_add_(1, index_C1, -here_C1.to(wide))
                    d_low_CV = d_CV.mul_(scored_C[:, None]).to(low)
                    if dx_MD is not None:
                        dx_MD[rows] = (d_low_CV @ weight_low_VD).to(dx_MD.dtype)
                    if dweight_VD is not None:
                        dweight_VD += d_low_CV.mT @ x_CD
            if dweight_VD is not None:
                dweight_VD = dweight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(dx_MD, dweight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_MD, dweight_VD = ctx.saved_tensors
        return (
            None if dx_MD is None else dx_MD * grad.to(dx_MD.dtype),
            None if dweight_VD is None else dweight_VD * grad.to(dweight_VD.dtype),
            None,
            None,
            None,
        )


def chunked_cross_entropy(x_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, chunk: int = 1024) -> Tensor:
    """Sum over scored positions of -log softmax(x W^T)[target], as a 0-d fp32 (or fp64) tensor.

    At most `chunk` rows of logits exist at a time. Under autocast the products are in its dtype, the softmax in fp32.
    Targets equal to -100 are not scored. Differentiable once, with respect to x and weight.
    """
    return WHOLE_VOCABULARY.sum_nll(x_BTD, weight_VD, target_BT, chunk)


def token_nll(x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk: int = 1024) -> Tensor:
    """-log softmax(x W^T)[target] of each row, [M] in fp32 (float64 for float64 inputs); every target is scored.

    At most `chunk` rows of logits exist at a time. Under autocast the products are in its dtype, the softmax is not.
    """
    return WHOLE_VOCABULARY.nll(x_MD, weight_VD, target_M, chunk)


def logits_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)[target]: [..., V] and [...] -> [...], in fp32 at least."""
    logits = _wide(logits)
    return logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def row_sums(nll_M: Tensor, scored_BT: Tensor) -> Tensor:
    """What the scored positions of [B, T] cost, in their order, summed by row: [B] in float64."""
    nll_BT = torch.zeros(scored_BT.shape, dtype=torch.float64, device=nll_M.device)
    nll_BT[scored_BT] = nll_M.double()
    return nll_BT.sum(1)


def row_logits_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-log softmax(logits)[target] of the scored positions, summed by row: [B] in float64."""
    scored_BT = targets_BT != IGNORED
    return row_sums(logits_nll(logits_BTV, targets_BT.where(scored_BT, 0))[scored_BT], scored_BT)


class Vocabulary:
    """What is done with hidden states and the output matrix. Here the matrix is whole; where it is not, a subclass
    that knows the other parts takes this one's place in the model."""

    def logits(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return torch.nn.functional.linear(x, weight_VD)

    def sum_nll(self, x_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, chunk: int) -> Tensor:
        """`chunked_cross_entropy`."""
        arguments = x_BTD.flatten(0, 1), weight_VD, target_BT.flatten(), chunk, self
        total: Tensor = _ChunkedCrossEntropy.apply(*arguments)
        return total

    def nll(self, x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk: int) -> Tensor:
        """`token_nll`."""
        parts = []
        for first in range(0, x_MD.shape[0], chunk):
            rows = slice(first, first + chunk)
            logits_CV = _wide(torch.nn.functional.linear(x_MD[rows], weight_VD))
            lse_C, logit_C, _, _ = self.statistics(logits_CV, target_M[rows])
            parts.append(lse_C - logit_C)
        return torch.cat(parts) if parts else x_MD.new_zeros(0)

    def statistics(self, logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a softmax over the whole vocabulary needs of the logits that are here: (log-sum-exp over the whole
        vocabulary [C], the target's logit [C], the target's place among those here [C, 1] or 0, whether it is here
        [C, 1]). A target that is no piece (-100) is nowhere and has the logit 0."""
        here_C = target_C != IGNORED
        index_C1 = target_C.where(here_C, 0)[:, None]
        return logits_CV.logsumexp(1), logits_CV.gather(1, index_C1)[:, 0] * here_C, index_C1, here_C[:, None]


WHOLE_VOCABULARY = Vocabulary()
