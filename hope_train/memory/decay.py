"""Products of retention inside one chunk, in log space, with documents and momentum.

Notation: la_t = log alpha_t, cum_t = sum of la up to t (from the piece's start, or the document's where one begins
inside), gamma_t = exp(cum_t). Layout [H, B, C] (names leave the heads out): heads first, so that sequences share their
heads' learned initial states in one product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Decay:
    """Everything about a chunk that depends on alpha, theta and document boundaries alone."""

    ratio_BCC: Tensor
    """gamma_{i-1} / gamma_j for j < i in the same document, else 0."""
    after_BCC: Tensor
    """gamma_i / gamma_j for j <= i in the same document, else 0."""
    before_BC: Tensor
    """cum_{i-1}, from the piece's start whatever the documents."""
    cum_BC: Tensor
    """cum_i likewise."""
    previous_BC: Tensor
    """gamma_{i-1} since the piece's or the document's start."""
    now_BC: Tensor
    """gamma_i likewise."""
    last_BC: Tensor
    """gamma_C / gamma_i where i is in the piece's last document, else 0: what is left of each write at the end."""
    carried_BC1: Tensor | None
    """True where the token still belongs to the document the piece began with; None: all do."""
    momentum: MomentumDecay | None

    def stacked(self) -> Decay:
        """The same with a dimension for a stack of matrices behind the heads."""
        return Decay(
            self.ratio_BCC[:, None],
            self.after_BCC[:, None],
            self.before_BC[:, None],
            self.cum_BC[:, None],
            self.previous_BC[:, None],
            self.now_BC[:, None],
            self.last_BC[:, None],
            self.carried_BC1,
            None if self.momentum is None else self.momentum.stacked(),
        )

    def doubled(self) -> Decay:
        """The same documents for two pieces stacked behind each other along the tokens (for reads of the anchor
        alone)."""
        if self.carried_BC1 is None:
            return self
        return replace(self, carried_BC1=torch.cat((self.carried_BC1, self.carried_BC1), -2))

    def carried_last(self) -> Tensor | None:
        """[B, 1, 1] bool: the piece's first document is also its last; None: always."""
        return None if self.carried_BC1 is None else self.carried_BC1[:, -1:, :]


@dataclass
class MomentumDecay:
    """Coefficients of the second decay (theta) combined with the first.

    S_t = theta^t S_0 - sum_{j<=t} theta^(t-j) u_j and D_t gets every S_s decayed by gamma_t / gamma_s:
    mix_tj = sum_{j<=s<=t} (gamma_t / gamma_s) theta^(s-j), carry_t = sum_{1<=s<=t} (gamma_t / gamma_s) theta^s.
    """

    mix_previous_BCC: Tensor
    mix_after_BCC: Tensor
    carry_previous_BC: Tensor
    carry_after_BC: Tensor
    speed_last_BC: Tensor
    """theta^(C-j) where j is in the last document, else 0."""
    speed_carry_B: Tensor
    """theta^C where the first document is also the last, else 0."""

    def stacked(self) -> MomentumDecay:
        """The same with a dimension for a stack of matrices behind the heads."""
        return MomentumDecay(
            self.mix_previous_BCC[:, None],
            self.mix_after_BCC[:, None],
            self.carry_previous_BC[:, None],
            self.carry_after_BC[:, None],
            self.speed_last_BC[:, None],
            self.speed_carry_B[:, None],
        )


def make_decay(log_alpha_BC: Tensor, starts_BC: Tensor | None, log_theta_H: Tensor | None) -> Decay:
    """Decays of one piece of C tokens. Differentiable with respect to log_alpha and log_theta."""
    size = log_alpha_BC.shape[-1]
    cum_BC = log_alpha_BC.cumsum(-1)
    before_BC = cum_BC - log_alpha_BC
    index = torch.arange(size, device=log_alpha_BC.device)
    lower_CC = index[:, None] >= index[None, :]
    strict_CC = index[:, None] > index[None, :]
    allowed, allowed_strict = lower_CC, strict_CC
    carried_BC1: Tensor | None = None
    since_BC = torch.zeros_like(cum_BC)
    same_BCC: Tensor | None = None
    if starts_BC is not None:
        document_BC = starts_BC.to(torch.int64).cumsum(-1)
        same_BCC = document_BC[:, :, None] == document_BC[:, None, :]
        allowed, allowed_strict = lower_CC & same_BCC, strict_CC & same_BCC
        carried_BC1 = (document_BC == 0)[..., None]
        # cum just before the document's first token: its latest start at or before the token.
        first_BC = torch.where(starts_BC, index, 0).cummax(-1).values
        since_BC = before_BC.gather(-1, first_BC.expand_as(before_BC)).where(document_BC > 0, 0.0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and log_theta_H is not None):
        # The gradient of these goes through `before` and `cum` (see `solves`); momentum alone needs it directly.
        ratio = (before_BC[..., :, None] - cum_BC[..., None, :]).masked_fill(~allowed_strict, -torch.inf).exp()
        after = (cum_BC[..., :, None] - cum_BC[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    # Not after[..., -1, :]: the backward of that would fill a whole matrix for one row.
    last = (cum_BC[..., -1:] - cum_BC).exp()
    if same_BCC is not None:
        last = last * same_BCC[:, -1, :]
    decay = Decay(
        ratio,
        after,
        before_BC,
        cum_BC,
        (before_BC - since_BC).exp(),
        (cum_BC - since_BC).exp(),
        last,
        carried_BC1,
        None,
    )
    if log_theta_H is not None:
        decay.momentum = _momentum(decay, log_theta_H, index, lower_CC if same_BCC is None else allowed)
    return decay


def _momentum(decay: Decay, log_theta_H: Tensor, index: Tensor, allowed: Tensor) -> MomentumDecay:
    log_theta = log_theta_H[:, None, None, None]
    distance_CC = (index[:, None] - index[None, :]).clamp_min(0).to(log_theta.dtype)
    theta_BCC = (log_theta * distance_CC).exp() * allowed
    steps_C = (index + 1).to(log_theta.dtype)
    carried = 1.0 if decay.carried_BC1 is None else decay.carried_BC1[..., 0].to(log_theta.dtype)
    theta_BC = (log_theta[..., 0] * steps_C).exp() * carried
    return MomentumDecay(
        decay.ratio_BCC @ theta_BCC,
        decay.after_BCC @ theta_BCC,
        (decay.ratio_BCC @ theta_BC[..., None])[..., 0] * carried,
        (decay.after_BCC @ theta_BC[..., None])[..., 0] * carried,
        theta_BCC[..., -1, :].expand(decay.previous_BC.shape) if theta_BCC.shape[1] == 1 else theta_BCC[..., -1, :],
        theta_BC[..., -1].expand(decay.previous_BC.shape[:2]),
    )
