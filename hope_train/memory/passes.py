"""One matrix (or a stack of them) over one piece of a chunk: solve for the writes, answer queries, commit.

A piece is at most a chunk long; in training it is a whole one, so that the state that gradients are taken at
(`anchor`) is also the state that decays (`now`). Tensors lead with G = [H] or, for a stack of M matrices with keys of
their own, [H, M], then the sequences B; O are output rows, I the width of the matrix's input.

With D = W - W_init (decay to init) or D = W (decay to zero), keys x_i and gradient rows G_i, the recurrence of Eq. 88

    D_i = D_{i-1} (alpha_i I - eta_i x_i x_i^T) - eta_i (W_init x_i + G_i) x_i^T

has the closed form D_t = gamma_t D_0 - sum_{i<=t} (gamma_t / gamma_i) r_i x_i^T with (I + L) R = rhs,
L_ij = eta_i (gamma_{i-1} / gamma_j) (x_i . x_j), rhs_i = eta_i (gamma_{i-1} D_0 x_i + W_init x_i + G_i).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.memory import solves
from hope_train.memory.decay import Decay


@dataclass
class Matrix:
    """A fast matrix at the start of a piece. `init` is [G, O, I], shared by all sequences."""

    anchor_BOI: Tensor
    now_BOI: Tensor
    init_OI: Tensor
    speed_BOI: Tensor | None
    to_init: bool
    """Decay leads to the initial state (else to zero)."""
    rank_one: bool
    """The write has the rank-one factor of Eq. 88."""

    def last_rows(self, rows: int) -> Matrix:
        """The same for the last `rows` output rows."""
        same = self.now_BOI is self.anchor_BOI
        anchor = self.anchor_BOI[..., -rows:, :]
        return Matrix(
            anchor,
            anchor if same else self.now_BOI[..., -rows:, :],
            self.init_OI[..., -rows:, :],
            None if self.speed_BOI is None else self.speed_BOI[..., -rows:, :],
            self.to_init,
            self.rank_one,
        )

    def last_of_stack(self) -> Matrix:
        """The last matrix of a stack, G = [H, M] -> [H]."""
        same = self.now_BOI is self.anchor_BOI
        anchor = self.anchor_BOI[:, -1]
        return Matrix(
            anchor,
            anchor if same else self.now_BOI[:, -1],
            self.init_OI[:, -1],
            None if self.speed_BOI is None else self.speed_BOI[:, -1],
            self.to_init,
            self.rank_one,
        )


@dataclass
class Writes:
    """The writes of a piece, R [G, B, C, O], with their keys; with momentum also U = eta G (whose decay is theta's)."""

    keys_BCI: Tensor
    r_BCO: Tensor | None
    u_BCO: Tensor | None


def project(x_BCI: Tensor, weight_BOI: Tensor) -> Tensor:
    """x W^T with one matrix per head and sequence."""
    if weight_BOI.shape[-2] == 1:
        return (x_BCI * weight_BOI).sum(-1, keepdim=True)
    return x_BCI @ weight_BOI.mT


def project_init(x_BCI: Tensor, init_OI: Tensor) -> Tensor:
    """x W_init^T: one product per head for all sequences."""
    if init_OI.shape[-2] == 1:
        return (x_BCI * init_OI[..., None, :, :]).sum(-1, keepdim=True)
    return (x_BCI.flatten(-3, -2) @ init_OI.mT).unflatten(-2, x_BCI.shape[-3:-1])


def at_anchor(m: Matrix, x_BCI: Tensor, decay: Decay) -> Tensor:
    """W^0 x: the chunk's first state, or W_init for documents that began inside the piece."""
    return _carried(project(x_BCI, m.anchor_BOI), m, x_BCI, decay, None)


def anchor_transposed(m: Matrix, g_BCO: Tensor, decay: Decay) -> Tensor:
    """W^0^T g, [G, B, C, I]."""
    if g_BCO.shape[-1] == 1:
        back, fresh = g_BCO * m.anchor_BOI, g_BCO * m.init_OI[..., None, :, :]
    else:
        back = g_BCO @ m.anchor_BOI
        if decay.carried_BC1 is None:
            return back
        fresh = (g_BCO.flatten(-3, -2) @ m.init_OI).unflatten(-2, g_BCO.shape[-3:-1])
    return back if decay.carried_BC1 is None else torch.where(decay.carried_BC1, back, fresh)


def right_hand_side(m: Matrix, keys_BCI: Tensor, gradient_BCO: Tensor, anchored_BCO: Tensor, decay: Decay) -> Tensor:
    """gamma_{i-1} D_0 x_i + W_init x_i + G_i (plus what momentum carried into the piece), before the factor eta."""
    same = m.now_BOI is m.anchor_BOI
    init = project_init(keys_BCI, m.init_OI) if m.to_init else None
    now = anchored_BCO if same else _carried(project(keys_BCI, m.now_BOI), m, keys_BCI, decay, init)
    kept = decay.previous_BC[..., None]
    rhs = kept * now if init is None else kept * (now - init) + init
    if decay.momentum is None:
        return rhs + gradient_BCO
    # the gradient is in the momentum
    assert m.speed_BOI is not None
    return rhs + decay.momentum.carry_previous_BC[..., None] * project(keys_BCI, m.speed_BOI)


def solve_writes(
    m: Matrix, keys_BCI: Tensor, eta_BC: Tensor, gradient_BCO: Tensor, anchored_BCO: Tensor, decay: Decay
) -> Writes:
    """All writes of a piece. `anchored` is `at_anchor(m, keys)`."""
    with_momentum = decay.momentum is not None
    if not m.rank_one:
        u_BCO = eta_BC[..., None] * gradient_BCO
        return Writes(keys_BCI, None if with_momentum else u_BCO, u_BCO if with_momentum else None)
    b_BCO = right_hand_side(m, keys_BCI, gradient_BCO, anchored_BCO, decay)
    u = None
    if decay.momentum is not None:
        u = eta_BC[..., None] * gradient_BCO
        b_BCO = b_BCO - (decay.momentum.mix_previous_BCC * (keys_BCI @ keys_BCI.mT)) @ u
    r_BCO, _ = solves.solve_writes(keys_BCI, eta_BC, decay.before_BC, decay.cum_BC, decay.ratio_BCC, b_BCO)
    return Writes(keys_BCI, r_BCO, u)


def solve_unread(
    m: Matrix,
    keys_BCI: Tensor,
    eta_BC: Tensor,
    gradient_BCO: Tensor,
    anchored_BCO: Tensor,
    decay: Decay,
    last: int | None,
) -> tuple[Tensor, Writes | None]:
    """The matrix after the piece, and the writes to its `last` rows only (None: to none). Without momentum.

    R^T (w K) = b^T [eta (I + L)^-T (w K)], w_i = gamma_C / gamma_i: rows that are only read at chunk starts need no
    solve of their own, however many they are; one with the keys as its right-hand side serves them all.
    """
    b_BCO = right_hand_side(m, keys_BCI, gradient_BCO, anchored_BCO, decay)
    r_BCO, u_BCI = solves.solve_writes(
        keys_BCI,
        eta_BC,
        decay.before_BC,
        decay.cum_BC,
        decay.ratio_BCC,
        None if last is None else b_BCO[..., -last:],
        decay.last_BC[..., None] * keys_BCI,
    )
    assert u_BCI is not None
    return decayed(m, decay) - b_BCO.mT @ u_BCI, None if r_BCO is None else Writes(keys_BCI, r_BCO, None)


def read(m: Matrix, writes: Writes, x_BCI: Tensor, decay: Decay, after: bool) -> Tensor:
    """W_t x_t (`after`) or W_{t-1} x_t, [G, B, C, O]."""
    init_BCO = project_init(x_BCI, m.init_OI) if m.to_init else None
    now_BCO = _carried(project(x_BCI, m.now_BOI), m, x_BCI, decay, init_BCO)
    kept_BC1 = (decay.now_BC if after else decay.previous_BC)[..., None]
    result = kept_BC1 * now_BCO if init_BCO is None else kept_BC1 * (now_BCO - init_BCO) + init_BCO
    if writes.r_BCO is not None:
        cum_BC, pairs_BCC = (decay.cum_BC, decay.after_BCC) if after else (decay.before_BC, decay.ratio_BCC)
        result = result - solves.answer(x_BCI, writes.keys_BCI, writes.r_BCO, cum_BC, decay.cum_BC, pairs_BCC)
    if decay.momentum is not None:
        assert writes.u_BCO is not None
        assert m.speed_BOI is not None
        momentum = decay.momentum
        mix = momentum.mix_after_BCC if after else momentum.mix_previous_BCC
        carry_BC = momentum.carry_after_BC if after else momentum.carry_previous_BC
        result = (
            result
            - (mix * (x_BCI @ writes.keys_BCI.mT)) @ writes.u_BCO
            + carry_BC[..., None] * project(x_BCI, m.speed_BOI)
        )
    return result


def commit(m: Matrix, writes: Writes, decay: Decay) -> tuple[Tensor, Tensor | None]:
    """The matrix (and its momentum) after the piece's last token, before any clamp."""
    new_BOI = decayed(m, decay)
    if writes.r_BCO is not None:
        new_BOI = new_BOI - writes.r_BCO.mT @ (decay.last_BC[..., None] * writes.keys_BCI)
    if decay.momentum is None:
        return new_BOI, None
    assert writes.u_BCO is not None
    assert m.speed_BOI is not None
    momentum = decay.momentum
    mixed = momentum.mix_after_BCC[..., -1, :, None] * writes.keys_BCI
    new_BOI = new_BOI - writes.u_BCO.mT @ mixed + momentum.carry_after_BC[..., -1:, None] * m.speed_BOI
    speed = momentum.speed_carry_B[..., None, None] * m.speed_BOI
    speed = speed - writes.u_BCO.mT @ (momentum.speed_last_BC[..., None] * writes.keys_BCI)
    return new_BOI, speed


def decayed(m: Matrix, decay: Decay) -> Tensor:
    """The matrix after the piece as if nothing had been written."""
    carried = decay.carried_last()
    init_BOI = m.init_OI[..., None, :, :]
    now_BOI = m.now_BOI if carried is None else torch.where(carried, m.now_BOI, init_BOI)
    kept_B11 = decay.now_BC[..., -1:, None]
    return kept_B11 * (now_BOI - init_BOI) + init_BOI if m.to_init else kept_B11 * now_BOI


def clamp(weight_BOI: Tensor, init_OI: Tensor, kappa: float, boxes: int = 1) -> Tensor:
    """Hold |W|_F of each of `boxes` equal stacks of rows to kappa |W_init|_F, per head and sequence."""
    init = init_OI.unflatten(-2, (boxes, -1))[..., None, :, :, :]
    weight = weight_BOI.unflatten(-2, (boxes, -1))
    limit = kappa * init.square().sum((-2, -1), keepdim=True).sqrt()
    squares = weight.square().sum((-2, -1), keepdim=True)
    over = squares > limit.square()
    # the square root is taken of a safe number where nothing is held, so that its gradient is finite
    factor = torch.where(over, limit * torch.rsqrt(torch.where(over, squares, torch.ones_like(squares))), 1.0)
    return (weight * factor).flatten(-3, -2)


def _carried(carried: Tensor, m: Matrix, x: Tensor, decay: Decay, init: Tensor | None) -> Tensor:
    if decay.carried_BC1 is None:
        return carried
    return torch.where(decay.carried_BC1, carried, project_init(x, m.init_OI) if init is None else init)
