"""The self-modifying Titans as a plain loop over tokens: slow, obvious, the yardstick of every faster path.

Inner gradients are taken by autograd, exactly as the equations say: L(M; k, vhat) = 1/2 |M(k) - vhat|^2 at the state
of the chunk's start, vhat constant inside the inner gradient only; then, token by token (Eq. 88 with decay to init),

    W_t = W_{t-1} (alpha I - eta k k^T) - eta dL/dW + (1 - alpha) W_init

with k replaced by the layer's own input h = s(W2 k) and eta by eta / (1 + eta |h|^2) for W1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory.rules import MEMORY_BOXES, SCALAR_BOXES, Init, activation, generator_boxes, l2norm

Weights = dict[str, Tensor]
"""One box: {"w2": [H, E, N], "w1": [H, N, E]} or {"w": [H, N, N]} for one sequence of the batch."""


@dataclass
class Run:
    """Outputs and final states of a reference run; states by parameter name, [B, H, …]."""

    o_BTHN: Tensor
    anchors: dict[str, Tensor]
    current: dict[str, Tensor]
    clamped: int = 0


def apply_box(config: MemoryConfig, box: str, weights: Weights, x_HN: Tensor) -> Tensor:
    """M_box(x), [H, N] -> [H, N] ([H, 1] raw scalars for eta and alpha)."""
    if config.kind == "linear":
        return torch.einsum("hoi,hi->ho", weights["w"], x_HN)
    hidden_HE = activation(config.activation)(torch.einsum("hei,hi->he", weights["w2"], x_HN))
    y_HO = torch.einsum("hoe,he->ho", weights["w1"], hidden_HE)
    return y_HO if box in SCALAR_BOXES else x_HN + y_HO


def write(
    config: MemoryConfig,
    box: str,
    anchor: Weights,
    now: Weights,
    init: Weights,
    speed: Weights,
    token: tuple[Tensor, Tensor, Tensor, Tensor],
    theta_H: Tensor | None,
) -> tuple[Weights, Weights]:
    """One token's write to one box: the new weights and the new momentum."""
    k_HN, v_HN, eta_H, alpha_H = token
    target = apply_box(config, box, anchor, v_HN)
    copies = {name: weight.clone() for name, weight in anchor.items()}
    error = apply_box(config, box, copies, k_HN) - target
    loss = config.loss_factor * error.square().sum()
    # vhat is held constant for the inner gradient by differentiating the copies only; the outer graph stays whole.
    gradients = dict(zip(copies, torch.autograd.grad(loss, list(copies.values()), create_graph=True), strict=True))
    new: Weights = {}
    new_speed: Weights = {}
    for name, weight in now.items():
        key_HI, rate_H, rank_one = k_HN, eta_H, True
        if name == "w1":
            key_HI = activation(config.activation)(torch.einsum("hei,hi->he", anchor["w2"], k_HN))
            rank_one = config.rank_one == "both"
            if rank_one:
                rate_H = eta_H / (1.0 + eta_H * key_HI.square().sum(-1))
        rate, alpha = rate_H[:, None, None], alpha_H[:, None, None]
        step = -rate * gradients[name]
        if theta_H is not None:
            step = theta_H[:, None, None] * speed[name] + step
            new_speed[name] = step
        kept = alpha * weight
        if rank_one:
            kept = kept - rate * torch.einsum("hoi,hi,hj->hoj", weight, key_HI, key_HI)
        pull = (1.0 - alpha) * init[name] if config.decay_to == "init" else 0.0
        new[name] = kept + step + pull
    return new, new_speed


def clamp(config: MemoryConfig, weights: Weights, init: Weights) -> tuple[Weights, int]:
    """Hold |W|_F per head and matrix to `config.clamp` times |W_init|_F; also how many were held."""
    if config.clamp is None:
        return weights, 0
    held, count = {}, 0
    for name, weight in weights.items():
        limit_H11 = config.clamp * init[name].square().sum((-2, -1), keepdim=True).sqrt()
        norm_H11 = weight.square().sum((-2, -1), keepdim=True).sqrt()
        over = norm_H11 > limit_H11
        held[name] = torch.where(over, weight * (limit_H11 / norm_H11), weight)
        count += int(over.sum())
    return held, count


def split_init(config: MemoryConfig, init: Init, box: str) -> Weights:
    """The learned initial state of one box."""
    return {layer: init[f"{layer}_{box}"] for layer in (("w",) if config.kind == "linear" else ("w2", "w1"))}


def run(
    config: MemoryConfig, z_BTHN: Tensor, q_BTHN: Tensor | None, init: Init, starts_BT: Tensor | None = None
) -> Run:
    """Outputs o_t [B, T, H, N] of the memories over inputs z and (static, not yet normalised) queries q.

    `starts_BT` marks first tokens of documents, where every memory returns to its initial state. Use float64.
    """
    rows = [
        _run_row(
            config, z_BTHN[b], None if q_BTHN is None else q_BTHN[b], init, None if starts_BT is None else starts_BT[b]
        )
        for b in range(z_BTHN.shape[0])
    ]
    return Run(
        torch.stack([row.o_BTHN for row in rows]),
        {name: torch.stack([row.anchors[name] for row in rows]) for name in rows[0].anchors},
        {name: torch.stack([row.current[name] for row in rows]) for name in rows[0].current},
        sum(row.clamped for row in rows),
    )


def _run_row(config: MemoryConfig, z_THN: Tensor, q_THN: Tensor | None, init: Init, starts_T: Tensor | None) -> Run:
    generators, boxes = generator_boxes(config), generator_boxes(config).all + MEMORY_BOXES.all
    start = {box: split_init(config, init, box) for box in boxes}
    anchors, now = dict(start), dict(start)
    rest = {box: {name: torch.zeros_like(w) for name, w in start[box].items()} for box in boxes}
    speed = dict(rest)
    theta_H = torch.sigmoid(init["theta_logit"]) if config.momentum else None
    outputs: list[Tensor] = []
    clamped = 0
    for t in range(z_THN.shape[0]):
        if starts_T is not None and bool(starts_T[t]):
            anchors, now, speed = dict(start), dict(start), dict(rest)
        z_HN = z_THN[t]
        read = {box: apply_box(config, box, anchors[box], z_HN) for box in generators.all}
        k_HN = l2norm(read["k"])
        v_HN = l2norm(read["v"]) if config.normalize_v else read["v"]
        raw_q = read["q"] if config.adaptive_q else q_THN[t]  # type: ignore[index]
        q_HN = l2norm(raw_q) if config.normalize_q else raw_q
        eta_H = config.eta_max * torch.sigmoid(read["eta"][:, 0] + config.eta_bias)
        alpha_H = torch.sigmoid(read["alpha"][:, 0] + config.alpha_bias)
        before = now["mem"]
        written = {
            box: write(
                config, box, anchors[box], now[box], start[box], speed[box], (k_HN, v_HN, eta_H, alpha_H), theta_H
            )
            for box in boxes
        }
        now = {box: new for box, (new, _) in written.items()}
        speed = {box: new for box, (_, new) in written.items()} if config.momentum else speed
        answering = {"after": now["mem"], "before": before, "start": anchors["mem"]}[config.read]
        outputs.append(apply_box(config, "mem", answering, q_HN))
        for group, size in ((generators.all, config.generator_chunk_size), (MEMORY_BOXES.all, config.chunk_size)):
            if (t + 1) % size == 0:
                for box in group:
                    now[box], held = clamp(config, now[box], start[box])
                    clamped += held
                    anchors[box] = now[box]

    def flat(state: dict[str, Weights]) -> dict[str, Tensor]:
        return {f"{layer}_{box}": weight for box, weights in state.items() for layer, weight in weights.items()}

    return Run(torch.stack(outputs), flat(anchors), flat(now), clamped)
