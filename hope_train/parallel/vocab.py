"""The vocabulary divided over tensor-parallel ranks: embedding, cross-entropy, logits.

Logits of other ranks are never gathered in training: per chunk of rows one exchange of two numbers per row and rank
(log-sum-exp of the own part, the target's logit where it lies in it).

Shapes: M positions, C positions of a chunk, D model width, v rows of the vocabulary of this rank, V all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hope_train.model.loss import IGNORED, Vocabulary
from hope_train.parallel import collectives
from hope_train.parallel.plan import part_of


class _CrossEntropy(torch.autograd.Function):
    """`model.loss` for a part of the vocabulary: gradients are made in the forward pass, chunk by chunk. The gradient
    of x is this rank's part of it: who made x whole on every rank sums it."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_vD: Tensor, target_M: Tensor, chunk: int, part: VocabularyPart
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        low = torch.get_autocast_dtype(x_MD.device.type) if torch.is_autocast_enabled(x_MD.device.type) else x_MD.dtype
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_MD.device.type, enabled=False):
            weight_low_vD = weight_vD.to(low)
            total = torch.zeros((), dtype=wide, device=x_MD.device)
            dx_MD = torch.empty_like(x_MD) if need_x else None
            dweight_vD = torch.zeros_like(weight_vD, dtype=wide) if need_weight else None
            for first in range(0, x_MD.shape[0], chunk):
                rows = slice(first, first + chunk)
                x_CD, target_C = x_MD[rows].to(low), target_M[rows]
                scored_C = target_C != IGNORED
                logits_Cv = (x_CD @ weight_low_vD.mT).to(wide)
                lse_C, target_logit_C, index_C1, mine_C1 = part.statistics(logits_Cv, target_C)
                total += ((lse_C - target_logit_C) * scored_C).sum()
                if need_x or need_weight:
                    d_Cv = logits_Cv.sub_(lse_C[:, None]).exp_()
                    d_Cv.scatter_add_(1, index_C1, -mine_C1.to(wide))
                    d_low_Cv = d_Cv.mul_(scored_C[:, None]).to(low)
                    if dx_MD is not None:
                        dx_MD[rows] = (d_low_Cv @ weight_low_vD).to(dx_MD.dtype)
                    if dweight_vD is not None:
                        dweight_vD += d_low_Cv.mT @ x_CD
            if dweight_vD is not None:
                dweight_vD = dweight_vD.to(weight_vD.dtype)
        ctx.save_for_backward(dx_MD, dweight_vD)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_MD, dweight_vD = ctx.saved_tensors
        return (
            None if dx_MD is None else dx_MD * grad.to(dx_MD.dtype),
            None if dweight_vD is None else dweight_vD * grad.to(dweight_vD.dtype),
            None,
            None,
            None,
        )


class VocabularyPart(Vocabulary):
    """Rows `part_of(size, rank, ranks)` of the vocabulary are here."""

    def __init__(self, size: int, group: ProcessGroup) -> None:
        self.size, self.group = size, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.rows = part_of(size, self.rank, self.ranks)

    def sum_nll(self, x_BTD: Tensor, weight_VD: Tensor, target_BT: Tensor, chunk: int) -> Tensor:
        """As `chunked_cross_entropy`, the same number on every rank."""
        total: Tensor = _CrossEntropy.apply(x_BTD.flatten(0, 1), weight_VD, target_BT.flatten(), chunk, self)
        return total

    def nll(self, x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, chunk: int) -> Tensor:
        """As `token_nll`, the same numbers on every rank; not differentiable."""
        parts = []
        for first in range(0, x_MD.shape[0], chunk):
            logits_Cv = nn.functional.linear(x_MD[first : first + chunk], weight_VD)
            logits_Cv = logits_Cv if logits_Cv.dtype == torch.float64 else logits_Cv.float()
            lse_C, target_logit_C, _, _ = self.statistics(logits_Cv, target_M[first : first + chunk])
            parts.append(lse_C - target_logit_C)
        return torch.cat(parts) if parts else x_MD.new_zeros(0)

    def logits(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """[..., D] -> [..., V], gathered on every rank: for decoding; not differentiable."""
        local = nn.functional.linear(x, weight_VD)
        share = len(part_of(self.size, 0, self.ranks))
        padded = nn.functional.pad(local, (0, share - local.shape[-1]))
        everywhere = collectives.gather_parts(padded, self.group)
        return everywhere.movedim(0, -2).flatten(-2)[..., : self.size]

    def statistics(self, logits_Cv: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-sum-exp over the whole vocabulary [C], the target's logit [C], the target's place in this part [C, 1] or
        0, whether it is in this part [C, 1])."""
        index_C = target_C - self.rows.start
        mine_C = (index_C >= 0) & (index_C < len(self.rows))
        index_C1 = index_C.where(mine_C, 0)[:, None]
        own_2C = torch.stack((logits_Cv.logsumexp(1), logits_Cv.gather(1, index_C1)[:, 0] * mine_C))
        parts_R2C = collectives.gather_parts(own_2C, self.group)
        return parts_R2C[:, 0].logsumexp(0), parts_R2C[:, 1].sum(0), index_C1, mine_C[:, None]


def embed_part(weight_vD: Tensor, tokens_BT: Tensor, rows: range) -> Tensor:
    """This rank's part of the embedding [B, T, D]: zero for tokens that other ranks hold. The sum is the embedding."""
    index_BT = tokens_BT - rows.start
    mine_BT = (index_BT >= 0) & (index_BT < len(rows))
    return nn.functional.embedding(index_BT.where(mine_BT, 0), weight_vD) * mine_BT[..., None]
