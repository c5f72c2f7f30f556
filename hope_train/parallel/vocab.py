"""The vocabulary divided over tensor-parallel ranks: embedding, cross-entropy, logits.

Logits of other ranks are never gathered in training: per chunk of rows one exchange of two numbers per row and rank
(log-sum-exp of the own part, the target's logit where it lies in it). The sums are the same on every rank; the gradient
of x is this rank's part of it, and who made x whole on every rank sums it. `nll` is not differentiable here.

Shapes: M positions, C positions of a chunk, D model width, v rows of the vocabulary of this rank, V all of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hope_train.model.loss import Vocabulary
from hope_train.parallel import collectives
from hope_train.parallel.plan import part_of


class VocabularyPart(Vocabulary):
    """Rows `part_of(size, rank, ranks)` of the vocabulary are here."""

    def __init__(self, size: int, group: ProcessGroup) -> None:
        self.size, self.group = size, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.rows = part_of(size, self.rank, self.ranks)

    def logits(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """[..., D] -> [..., V], gathered on every rank: for decoding; not differentiable."""
        local = nn.functional.linear(x, weight_VD)
        share = len(part_of(self.size, 0, self.ranks))
        padded = nn.functional.pad(local, (0, share - local.shape[-1]))
        everywhere = collectives.gather_parts(padded, self.group)
        return everywhere.movedim(0, -2).flatten(-2)[..., : self.size]

    def statistics(self, logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the logits [C, v] of this part; the other ranks give theirs."""
        index_C = target_C - self.rows.start
        mine_C = (index_C >= 0) & (index_C < len(self.rows))
        index_C1 = index_C.where(mine_C, 0)[:, None]
        own_2C = torch.stack((logits_CV.logsumexp(1), logits_CV.gather(1, index_C1)[:, 0] * mine_C))
        parts_R2C = collectives.gather_parts(own_2C, self.group)
        return parts_R2C[:, 0].logsumexp(0), parts_R2C[:, 1].sum(0), index_C1, mine_C[:, None]


def embed_part(weight_vD: Tensor, tokens_BT: Tensor, rows: range) -> Tensor:
    """This rank's part of the embedding [B, T, D]: zero for tokens that other ranks hold. The sum is the embedding."""
    index_BT = tokens_BT - rows.start
    mine_BT = (index_BT >= 0) & (index_BT < len(rows))
    return nn.functional.embedding(index_BT.where(mine_BT, 0), weight_vD) * mine_BT[..., None]
