"""Products of retention inside one chunk, in log space, with documents and momentum.

Notation: la_t = log alpha_t, cum_t = sum of la up to t (from the piece's start, or the document's where one begins inside),
gamma_t = exp(cum_t). Layout [H, B, C]: heads first, so that heads share their learned initial states in one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Decay:
    """Everything about a chunk that depends on alpha, theta and document boundaries alone."""

    ratio_HBCC: Tensor
    """gamma_{i-1} / gamma_j for j < i in the same document, else 0."""
    after_HBCC: Tensor
    """gamma_i / gamma_j for j <= i in the same document, else 0."""
    previous_HBC: Tensor
    """gamma_{i-1} since the piece's or the document's start."""
    now_HBC: Tensor
    """gamma_i likewise."""
    carried_BC1: Tensor | None
    """True where the token still belongs to the document the piece began with; None: all do."""
    momentum: MomentumDecay | None

    @property
    def last_HBC(self) -> Tensor:
        """gamma_C / gamma_i: what is left of each write at the piece's end."""
        return self.after_HBCC[..., -1, :]

    def carried_last(self) -> Tensor | None:
        """[B, 1, 1] bool: the piece's first document is also its last; None: always."""
        return None if self.carried_BC1 is None else self.carried_BC1[:, -1:, :]


@dataclass
class MomentumDecay:
    """Coefficients of the second decay (theta) combined with the first.

    S_t = theta^t S_0 - sum_{j<=t} theta^(t-j) u_j and D_t gets every S_s decayed by gamma_t / gamma_s:
    mix_tj = sum_{j<=s<=t} (gamma_t / gamma_s) theta^(s-j), carry_t = sum_{1<=s<=t} (gamma_t / gamma_s) theta^s.
    """

    mix_previous_HBCC: Tensor
    mix_after_HBCC: Tensor
    carry_previous_HBC: Tensor
    carry_after_HBC: Tensor
    speed_last_HBC: Tensor
    """theta^(C-j) where j is in the last document, else 0."""
    speed_carry_HB: Tensor
    """theta^C where the first document is also the last, else 0."""


def make_decay(log_alpha_HBC: Tensor, starts_BC: Tensor | None, log_theta_H: Tensor | None) -> Decay:
    """Decays of one piece of C tokens. Differentiable with respect to log_alpha and log_theta."""
    size = log_alpha_HBC.shape[-1]
    cum_HBC = log_alpha_HBC.cumsum(-1)
    before_HBC = cum_HBC - log_alpha_HBC
    index = torch.arange(size, device=log_alpha_HBC.device)
    lower_CC = index[:, None] >= index[None, :]
    strict_CC = index[:, None] > index[None, :]
    allowed, allowed_strict = lower_CC, strict_CC
    carried_BC1: Tensor | None = None
    since_HBC = torch.zeros_like(cum_HBC)
    same_BCC: Tensor | None = None
    if starts_BC is not None:
        document_BC = starts_BC.to(torch.int64).cumsum(-1)
        same_BCC = document_BC[:, :, None] == document_BC[:, None, :]
        allowed, allowed_strict = lower_CC & same_BCC, strict_CC & same_BCC
        carried_BC1 = (document_BC == 0)[..., None]
        # cum just before the document's first token: its latest start at or before the token.
        first_BC = torch.where(starts_BC, index, 0).cummax(-1).values
        since_HBC = before_HBC.gather(-1, first_BC.expand_as(before_HBC)).where(document_BC > 0, 0.0)
    minus_infinity = float("-inf")
    ratio = (before_HBC[..., :, None] - cum_HBC[..., None, :]).masked_fill(~allowed_strict, minus_infinity).exp()
    after = (cum_HBC[..., :, None] - cum_HBC[..., None, :]).masked_fill(~allowed, minus_infinity).exp()
    decay = Decay(ratio, after, (before_HBC - since_HBC).exp(), (cum_HBC - since_HBC).exp(), carried_BC1, None)
    if log_theta_H is not None:
        decay.momentum = _momentum(decay, log_theta_H, index, lower_CC if same_BCC is None else allowed)
    return decay


def _momentum(decay: Decay, log_theta_H: Tensor, index: Tensor, allowed: Tensor) -> MomentumDecay:
    log_theta = log_theta_H[:, None, None, None]
    distance_CC = (index[:, None] - index[None, :]).clamp_min(0).to(log_theta.dtype)
    theta_HBCC = (log_theta * distance_CC).exp() * allowed
    steps_C = (index + 1).to(log_theta.dtype)
    carried = 1.0 if decay.carried_BC1 is None else decay.carried_BC1[..., 0].to(log_theta.dtype)
    theta_HBC = (log_theta[..., 0] * steps_C).exp() * carried
    return MomentumDecay(
        decay.ratio_HBCC @ theta_HBCC,
        decay.after_HBCC @ theta_HBCC,
        (decay.ratio_HBCC @ theta_HBC[..., None])[..., 0] * carried,
        (decay.after_HBCC @ theta_HBC[..., None])[..., 0] * carried,
        theta_HBCC[..., -1, :].expand(decay.previous_HBC.shape) if theta_HBCC.shape[1] == 1 else theta_HBCC[..., -1, :],
        theta_HBC[..., -1].expand(decay.previous_HBC.shape[:2]),
    )
