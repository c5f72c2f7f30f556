"""One matrix of one memory over one piece of a chunk: solve for the writes, answer queries, commit.

A piece is at most a chunk long; in training it is a whole one, so that the state that gradients are taken at (`anchor`) is also
the state that decays (`now`). All tensors lead with [H, B]; O are output rows, I the width of the matrix's input.

With D = W - W_init (decay to init) or D = W (decay to zero), keys x_i and gradient rows G_i, the recurrence of Eq. 88

    D_i = D_{i-1} (alpha_i I - eta_i x_i x_i^T) - eta_i (W_init x_i + G_i) x_i^T

has the closed form D_t = gamma_t D_0 - sum_{i<=t} (gamma_t / gamma_i) r_i x_i^T with (I + L) R = rhs,
L_ij = eta_i (gamma_{i-1} / gamma_j) (x_i . x_j), rhs_i = eta_i (gamma_{i-1} D_0 x_i + W_init x_i + G_i).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.memory.decay import Decay
from hope_train.memory.triangular import solve_unit_lower, unit_lower_inverse


@dataclass
class Matrix:
    """One fast matrix at the start of a piece. `init` is [H, O, I], shared by all sequences."""

    anchor_HBOI: Tensor
    now_HBOI: Tensor
    init_HOI: Tensor
    speed_HBOI: Tensor | None
    to_init: bool
    """Decay leads to the initial state (else to zero)."""
    rank_one: bool
    """The write has the rank-one factor of Eq. 88."""


@dataclass
class Writes:
    """The writes of a piece, R [H, B, C, O], with their keys; with momentum also U = eta G (whose decay is theta's)."""

    keys_HBCI: Tensor
    r_HBCO: Tensor | None
    u_HBCO: Tensor | None


def project(x_HBCI: Tensor, weight_HBOI: Tensor) -> Tensor:
    """x W^T with one matrix per head and sequence."""
    return x_HBCI @ weight_HBOI.mT


def project_init(x_HBCI: Tensor, init_HOI: Tensor) -> Tensor:
    """x W_init^T: one product per head for all sequences."""
    return (x_HBCI.flatten(1, 2) @ init_HOI.mT).unflatten(1, x_HBCI.shape[1:3])


def at_anchor(m: Matrix, x_HBCI: Tensor, decay: Decay, init_HBCO: Tensor | None = None) -> Tensor:
    """W^0 x: the chunk's first state, or W_init for documents that began inside the piece."""
    return _carried(project(x_HBCI, m.anchor_HBOI), m, x_HBCI, decay, init_HBCO)


def anchor_transposed(m: Matrix, g_HBCO: Tensor, decay: Decay) -> Tensor:
    """W^0^T g, [H, B, C, I]."""
    back = g_HBCO @ m.anchor_HBOI
    if decay.carried_BC1 is None:
        return back
    return torch.where(decay.carried_BC1, back, (g_HBCO.flatten(1, 2) @ m.init_HOI).unflatten(1, g_HBCO.shape[1:3]))


def solve_writes(
    m: Matrix,
    keys_HBCI: Tensor,
    eta_HBC: Tensor,
    gradient_HBCO: Tensor,
    anchored_HBCO: Tensor,
    decay: Decay,
    system: tuple[Tensor, Tensor] | None = None,
) -> Writes:
    """All writes of a piece. `anchored` is `at_anchor(m, keys)`; `system` is `make_system(...)` where it is shared."""
    u_HBCO = eta_HBC[..., None] * gradient_HBCO
    with_momentum = decay.momentum is not None
    if not m.rank_one:
        return Writes(keys_HBCI, None if with_momentum else u_HBCO, u_HBCO if with_momentum else None)
    lower, inverse = system if system is not None else make_system(keys_HBCI, eta_HBC, decay)
    rhs_HBCO = _rhs(m, keys_HBCI, gradient_HBCO, anchored_HBCO, decay)
    rhs_HBCO = eta_HBC[..., None] * rhs_HBCO
    if decay.momentum is not None:
        gram = keys_HBCI @ keys_HBCI.mT
        rhs_HBCO = rhs_HBCO - eta_HBC[..., None] * ((decay.momentum.mix_previous_HBCC * gram) @ u_HBCO)
    return Writes(keys_HBCI, solve_unit_lower(lower, rhs_HBCO, inverse), u_HBCO if with_momentum else None)


def make_system(keys_HBCI: Tensor, eta_HBC: Tensor, decay: Decay) -> tuple[Tensor, Tensor]:
    """L and (I + L)^-1: the same for every matrix with these keys and rates."""
    lower = eta_HBC[..., None] * (decay.ratio_HBCC * (keys_HBCI @ keys_HBCI.mT))
    with torch.no_grad():
        inverse = unit_lower_inverse(lower.detach())
    return lower, inverse


def read(m: Matrix, writes: Writes, x_HBCI: Tensor, decay: Decay, after: bool) -> Tensor:
    """W_t x_t (`after`) or W_{t-1} x_t, [H, B, C, O]."""
    init_HBCO = project_init(x_HBCI, m.init_HOI) if m.to_init else None
    now_HBCO = _carried(project(x_HBCI, m.now_HBOI), m, x_HBCI, decay, init_HBCO)
    kept_HBC1 = (decay.now_HBC if after else decay.previous_HBC)[..., None]
    result = kept_HBC1 * now_HBCO
    if init_HBCO is not None:
        result = result + (1.0 - kept_HBC1) * init_HBCO
    score_HBCC = x_HBCI @ writes.keys_HBCI.mT
    if writes.r_HBCO is not None:
        result = result - ((decay.after_HBCC if after else decay.ratio_HBCC) * score_HBCC) @ writes.r_HBCO
    if decay.momentum is not None:
        assert writes.u_HBCO is not None and m.speed_HBOI is not None
        momentum = decay.momentum
        mix = momentum.mix_after_HBCC if after else momentum.mix_previous_HBCC
        carry_HBC = momentum.carry_after_HBC if after else momentum.carry_previous_HBC
        result = result - (mix * score_HBCC) @ writes.u_HBCO + carry_HBC[..., None] * project(x_HBCI, m.speed_HBOI)
    return result


def commit(m: Matrix, writes: Writes, decay: Decay) -> tuple[Tensor, Tensor | None]:
    """The matrix (and its momentum) after the piece's last token, before any clamp."""
    carried = decay.carried_last()
    init_HBOI = m.init_HOI[:, None]
    now_HBOI = m.now_HBOI if carried is None else torch.where(carried, m.now_HBOI, init_HBOI)
    kept_HB11 = decay.now_HBC[..., -1:, None]
    new_HBOI = kept_HB11 * now_HBOI
    if m.to_init:
        new_HBOI = new_HBOI + (1.0 - kept_HB11) * init_HBOI
    if writes.r_HBCO is not None:
        new_HBOI = new_HBOI - writes.r_HBCO.mT @ (decay.last_HBC[..., None] * writes.keys_HBCI)
    if decay.momentum is None:
        return new_HBOI, None
    assert writes.u_HBCO is not None and m.speed_HBOI is not None
    momentum = decay.momentum
    mixed = momentum.mix_after_HBCC[..., -1, :, None] * writes.keys_HBCI
    new_HBOI = new_HBOI - writes.u_HBCO.mT @ mixed + momentum.carry_after_HBC[..., -1:, None] * m.speed_HBOI
    speed = momentum.speed_carry_HB[..., None, None] * m.speed_HBOI
    speed = speed - writes.u_HBCO.mT @ (momentum.speed_last_HBC[..., None] * writes.keys_HBCI)
    return new_HBOI, speed


def commit_unread(
    m: Matrix,
    keys_HBCI: Tensor,
    eta_HBC: Tensor,
    gradient_HBCO: Tensor,
    anchored_HBCO: Tensor,
    decay: Decay,
    system: tuple[Tensor, Tensor] | None = None,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`solve_writes` and `commit` for a matrix that is only read at chunk starts, with one solve for all of its rows.

    R^T (w K) = rhs^T [(I + L)^-T (w K)]: the solve is on the keys (`shared`, from `solved_keys`), whatever the number of rows.
    """
    if not m.rank_one or decay.momentum is not None or m.anchor_HBOI.shape[-2] == 1:
        return commit(m, solve_writes(m, keys_HBCI, eta_HBC, gradient_HBCO, anchored_HBCO, decay, system), decay)
    if shared is None:
        shared = solved_keys(keys_HBCI, eta_HBC, decay, system)
    rhs_HBCO = _rhs(m, keys_HBCI, gradient_HBCO, anchored_HBCO, decay)
    none = Writes(keys_HBCI, None, None)
    new_HBOI, _ = commit(m, none, decay)
    return new_HBOI - rhs_HBCO.mT @ shared, None


def solved_keys(
    keys_HBCI: Tensor, eta_HBC: Tensor, decay: Decay, system: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """diag(eta) (I + L)^-T (w K), [H, B, C, I]."""
    lower, inverse = system if system is not None else make_system(keys_HBCI, eta_HBC, decay)
    solved = solve_unit_lower(lower, decay.last_HBC[..., None] * keys_HBCI, inverse, transposed=True)
    return eta_HBC[..., None] * solved


def clamp(weight_HBOI: Tensor, init_HOI: Tensor, kappa: float, boxes: int = 1) -> Tensor:
    """Hold |W|_F of each of `boxes` equal stacks of rows to kappa |W_init|_F, per head and sequence."""
    init = init_HOI.unflatten(-2, (boxes, -1))
    weight = weight_HBOI.unflatten(-2, (boxes, -1))
    limit = kappa * init.square().sum((-2, -1), keepdim=True).sqrt()[:, None]
    squares = weight.square().sum((-2, -1), keepdim=True)
    over = squares > limit.square()
    # the square root is taken of a safe number where nothing is held, so that its gradient is finite
    factor = torch.where(over, limit * torch.rsqrt(torch.where(over, squares, torch.ones_like(squares))), 1.0)
    return (weight * factor).flatten(-3, -2)


def _rhs(m: Matrix, keys: Tensor, gradient: Tensor, anchored: Tensor, decay: Decay) -> Tensor:
    """gamma_{i-1} D_0 x_i + W_init x_i + G_i (plus what momentum carried into the piece), before the factor eta."""
    same = m.now_HBOI is m.anchor_HBOI
    init = project_init(keys, m.init_HOI) if m.to_init else None
    now = anchored if same else _carried(project(keys, m.now_HBOI), m, keys, decay, init)
    kept = decay.previous_HBC[..., None]
    rhs = kept * now if init is None else kept * (now - init) + init
    if decay.momentum is None:
        rhs = rhs + gradient
    else:  # the gradient is in the momentum
        assert m.speed_HBOI is not None
        rhs = rhs + decay.momentum.carry_previous_HBC[..., None] * project(keys, m.speed_HBOI)
    return rhs


def _carried(carried: Tensor, m: Matrix, x: Tensor, decay: Decay, init: Tensor | None) -> Tensor:
    if decay.carried_BC1 is None:
        return carried
    return torch.where(decay.carried_BC1, carried, project_init(x, m.init_HOI) if init is None else init)
