"""Causal softmax attention with rotary embeddings: the mixer of Transformer++ and of Hope-Attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hope_train.config.model import ModelConfig
from hope_train.model.layers import apply_rope, document_ids, rope_tables


@dataclass
class AttentionState:
    """Keys (already rotated) and values of all tokens so far, and their documents."""

    k_BHSN: Tensor
    v_BHSN: Tensor
    document_BS: Tensor


class Attention(nn.Module):
    """Multi-head attention; the number of heads is read off the projections, so that heads can be split."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        width = config.d_model
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. With `starts_BT` a token sees its own document only."""
        q_BHTN, k_BHTN, v_BHTN = self._project(x_BTD, first=0)
        mask = None
        if starts_BT is not None:
            document_BT = document_ids(starts_BT)
            mask = _mask(document_BT, document_BT)
        o_BHTN = nn.functional.scaled_dot_product_attention(
            q_BHTN, k_BHTN, v_BHTN, attn_mask=mask, is_causal=mask is None
        )
        y_BTD: Tensor = self.out_proj(o_BHTN.transpose(1, 2).flatten(2))
        return y_BTD

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        """No tokens yet."""
        heads = self.q_proj.weight.shape[0] // self.head_dim
        empty = torch.zeros(batch, heads, 0, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty, torch.zeros(batch, 0, device=device, dtype=torch.int64))

    def step(
        self, x_BTD: Tensor, state: AttentionState, starts_BT: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """The next T tokens after `state`. Memory grows with the context: this is attention."""
        q_BHTN, k_BHTN, v_BHTN = self._project(x_BTD, first=state.k_BHSN.shape[2])
        batch, tokens = x_BTD.shape[:2]
        last_B1 = state.document_BS[:, -1:] if state.document_BS.shape[1] else state.document_BS.new_zeros(batch, 1)
        new_BT = last_B1.expand(batch, tokens) + (0 if starts_BT is None else document_ids(starts_BT))
        document_BS = torch.cat((state.document_BS, new_BT), dim=1)
        k_BHSN = torch.cat((state.k_BHSN, k_BHTN.to(state.k_BHSN.dtype)), dim=2)
        v_BHSN = torch.cat((state.v_BHSN, v_BHTN.to(state.v_BHSN.dtype)), dim=2)
        o_BHTN = nn.functional.scaled_dot_product_attention(
            q_BHTN, k_BHSN.to(q_BHTN.dtype), v_BHSN.to(q_BHTN.dtype), attn_mask=_mask(new_BT, document_BS)
        )
        return self.out_proj(o_BHTN.transpose(1, 2).flatten(2)), AttentionState(k_BHSN, v_BHSN, document_BS)

    def _project(self, x_BTD: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        q_BHTN, k_BHTN, v_BHTN = (
            layer(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions_T = torch.arange(first, first + x_BTD.shape[1], device=x_BTD.device)
        cos_TK, sin_TK = rope_tables(positions_T, self.head_dim, self.rope_theta, q_BHTN.dtype)
        return apply_rope(q_BHTN, cos_TK, sin_TK), apply_rope(k_BHTN, cos_TK, sin_TK), v_BHTN


def _mask(document_BT: Tensor, document_BS: Tensor) -> Tensor:
    """[B, 1, T, S]: where a query (one of the last T of S tokens) may look: not ahead, not into another document."""
    queries, keys = document_BT.shape[1], document_BS.shape[1]
    position_S = torch.arange(keys, device=document_BS.device)
    causal_TS = position_S[None, :] <= position_S[keys - queries :, None]
    return (causal_TS & (document_BT[:, :, None] == document_BS[:, None, :]))[:, None]
