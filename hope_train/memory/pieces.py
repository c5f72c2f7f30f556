"""One piece of a chunk for a whole group of memories: read, write, commit. Pure functions of tensors.

A group's matrices are stacked: `w2` holds the rows of all boxes ([H, B, P E, N]), `w1_<box>` one matrix each; linear boxes are the
rows of one matrix `w`. All W2 of a group share their keys, hence one Gram matrix and one solve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import passes
from hope_train.memory.decay import Decay, make_decay
from hope_train.memory.passes import Matrix
from hope_train.memory.rules import (
    MEMORY_BOXES,
    SCALAR_BOXES,
    Boxes,
    Init,
    activation,
    activation_and_slope,
    generator_boxes,
    l2norm,
)


@dataclass
class Group:
    """Fast weights of one group by stacked name; `now` is `anchor` itself at a chunk's start."""

    anchor: dict[str, Tensor]
    now: dict[str, Tensor]
    speed: dict[str, Tensor]


def stack_init(config: MemoryConfig, init: Init, boxes: Boxes) -> dict[str, Tensor]:
    """Initial states of a group under their stacked names, [H, rows, width]."""
    if config.kind == "linear":
        return {"w": torch.cat([init[f"w_{box}"] for box in boxes.all], 1)}
    stacked = {"w2": torch.cat([init[f"w2_{box}"] for box in boxes.all], 1)}
    return stacked | {f"w1_{box}": init[f"w1_{box}"] for box in boxes.all}


def initial_groups(config: MemoryConfig, init: Init, batch: int) -> tuple[Group, Group]:
    """Generators and main memory before the first token."""
    groups = []
    for boxes in (generator_boxes(config), MEMORY_BOXES):
        weights = {
            name: w[:, None].expand(-1, batch, -1, -1).contiguous() for name, w in stack_init(config, init, boxes).items()
        }
        speed = {name: torch.zeros_like(w) for name, w in weights.items()} if config.momentum else {}
        groups.append(Group(weights, weights, speed))
    return groups[0], groups[1]


class _Step:
    """The matrices of a group over one piece, with what the writes need."""

    def __init__(self, config: MemoryConfig, init: Init, boxes: Boxes, group: Group) -> None:
        self.config, self.boxes, self.group = config, boxes, group
        self.init = stack_init(config, init, boxes)
        self.matrices = {
            name: Matrix(
                group.anchor[name],
                group.now[name],
                initial,
                group.speed.get(name),
                config.decay_to == "init",
                config.rank_one == "both" or not name.startswith("w1"),
            )
            for name, initial in self.init.items()
        }
        self.widths = [1 if box in SCALAR_BOXES else -1 for box in boxes.all]

    def rows(self, stacked: Tensor, width: int) -> dict[str, Tensor]:
        """Split stacked output rows by box."""
        if self.config.kind == "mlp":
            return dict(zip(self.boxes.all, stacked.split(stacked.shape[-1] // len(self.boxes.all), -1), strict=True))
        sizes = [1 if box in SCALAR_BOXES else width for box in self.boxes.all]
        return dict(zip(self.boxes.all, stacked.split(sizes, -1), strict=True))

    def forward(self, x: Tensor, decay: Decay | None) -> dict[str, Tensor]:
        """M_box^0(x) of every box (raw scalars for eta and alpha)."""
        if self.config.kind == "linear":
            return self.rows(self._anchored("w", x, decay), x.shape[-1])
        hidden = self.rows(activation(self.config.activation)(self._anchored("w2", x, decay)), x.shape[-1])
        return {box: self.top(box, hidden[box], x, decay) for box in self.boxes.all}

    def top(self, box: str, hidden: Tensor, x: Tensor, decay: Decay | None) -> Tensor:
        """W1^0 h, plus the skip connection of the matrix boxes."""
        y = self._anchored(f"w1_{box}", hidden, decay)
        return y if box in SCALAR_BOXES else x + y

    def _anchored(self, name: str, x: Tensor, decay: Decay | None) -> Tensor:
        if decay is None:
            return passes.project(x, self.matrices[name].anchor_HBOI)
        return passes.at_anchor(self.matrices[name], x, decay)

    def finish(self, new: dict[str, tuple[Tensor, Tensor | None]], ends_chunk: bool) -> Group:
        """The group after the piece; at a chunk's end clamped, and the new anchor."""
        now = {name: weight for name, (weight, _) in new.items()}
        speed = {name: velocity for name, (_, velocity) in new.items() if velocity is not None}
        if not ends_chunk:
            return Group(self.group.anchor, now, speed)
        if self.config.clamp is not None:
            now = {name: self._clamped(name, weight) for name, weight in now.items()}
        return Group(now, now, speed)

    def _clamped(self, name: str, weight: Tensor) -> Tensor:
        assert self.config.clamp is not None
        init = self.init[name]
        if name == "w":
            sizes = [1 if box in SCALAR_BOXES else init.shape[-1] for box in self.boxes.all]
            parts = zip(weight.split(sizes, -2), init.split(sizes, -2), strict=True)
            return torch.cat([passes.clamp(w, i, self.config.clamp) for w, i in parts], -2)
        return passes.clamp(weight, init, self.config.clamp, len(self.boxes.all) if name == "w2" else 1)

    def set_documents(self, anchors_reset: Tensor | None) -> None:
        """Documents that begin inside the piece have been handled; the anchor of the rest of the chunk is their W_init."""
        if anchors_reset is None:
            return
        for name, initial in self.init.items():
            anchor = self.group.anchor[name]
            self.group = Group(
                self.group.anchor | {name: torch.where(anchors_reset, anchor, initial[:, None])},
                self.group.now,
                self.group.speed,
            )


def generator_piece(
    config: MemoryConfig, init: Init, group: Group, z_HBCN: Tensor, starts_BC: Tensor | None, ends_chunk: bool
) -> tuple[tuple[Tensor, ...], Group]:
    """k, v [H, B, C, N], eta, log alpha [H, B, C] (and raw q), and the generators after the piece."""
    step = _Step(config, init, generator_boxes(config), group)
    zero = z_HBCN.new_zeros(z_HBCN.shape[:3])
    documents = None if starts_BC is None else make_decay(zero, starts_BC, None)
    made = step.forward(z_HBCN, documents)
    k, v = l2norm(made["k"]), l2norm(made["v"]) if config.normalize_v else made["v"]
    eta = config.eta_max * torch.sigmoid(made["eta"][..., 0] + config.eta_bias)
    log_alpha = torch.nn.functional.logsigmoid(made["alpha"][..., 0] + config.alpha_bias)
    decay = make_decay(log_alpha, starts_BC, _log_theta(config, init))
    after = _write(step, k, v, eta, decay, None, ends_chunk)[0]
    return (k, v, eta, log_alpha, *([made["q"]] if config.adaptive_q else [])), after


def memory_piece(
    config: MemoryConfig,
    init: Init,
    group: Group,
    inputs: list[Tensor],
    starts_BC: Tensor | None,
    ends_chunk: bool,
) -> tuple[Tensor, Group]:
    """o [H, B, C, N] from k, v, eta, log alpha and q, and the main memory after the piece."""
    k, v, eta, log_alpha, q = inputs
    step = _Step(config, init, MEMORY_BOXES, group)
    decay = make_decay(log_alpha, starts_BC, _log_theta(config, init))
    after, output = _write(step, k, v, eta, decay, q, ends_chunk)
    assert output is not None
    return output, after


def finish_query(config: MemoryConfig, q: Tensor) -> Tensor:
    """The query as the memory sees it."""
    return l2norm(q) if config.normalize_q else q


def _log_theta(config: MemoryConfig, init: Init) -> Tensor | None:
    return torch.nn.functional.logsigmoid(init["theta_logit"]) if config.momentum else None


def _write(
    step: _Step, k: Tensor, v: Tensor, eta: Tensor, decay: Decay, q: Tensor | None, ends_chunk: bool
) -> tuple[Group, Tensor | None]:
    """Write k -> M^0(v) into every box of a group; with `q` also answer it."""
    config, boxes = step.config, step.boxes
    size = k.shape[-2]
    factor = 2.0 * config.loss_factor
    system = passes.make_system(k, eta, decay)
    shared = passes.solved_keys(k, eta, decay, system) if q is None and decay.momentum is None else None
    bottom = "w" if config.kind == "linear" else "w2"
    both = step._anchored(bottom, torch.cat((k, v), -2), _twice(decay))
    at_k, at_v = both.split(size, -2)
    new: dict[str, tuple[Tensor, Tensor | None]] = {}
    output: Tensor | None = None
    gradients: list[Tensor] = []
    tops: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    if config.kind == "linear":
        gradients = [factor * (at_k - at_v)]
    else:
        value, slope = activation_and_slope(config.activation, at_k)
        hidden, slopes = step.rows(value, size), step.rows(slope, size)
        targets = step.rows(activation(config.activation)(at_v), size)
        for box in boxes.all:
            h, matrix = hidden[box], step.matrices[f"w1_{box}"]
            anchored = passes.at_anchor(matrix, h, decay)
            error = anchored - passes.at_anchor(matrix, targets[box], decay)
            gradient = factor * (error if box in SCALAR_BOXES else k - v + error)
            gradients.append(passes.anchor_transposed(matrix, gradient, decay) * slopes[box])
            rate = eta / (1.0 + eta * h.square().sum(-1)) if matrix.rank_one else eta
            tops[box] = (h, rate, gradient, anchored)
    stacked = torch.cat(gradients, -1)
    if q is None:
        new[bottom] = passes.commit_unread(step.matrices[bottom], k, eta, stacked, at_k, decay, system, shared)
        for box, (h, rate, gradient, anchored) in tops.items():
            new[f"w1_{box}"] = passes.commit_unread(step.matrices[f"w1_{box}"], h, rate, gradient, anchored, decay)
    else:
        x = q
        names = [bottom] if config.kind == "linear" else [bottom, "w1_mem"]
        for name in names:
            matrix = step.matrices[name]
            if name == bottom:
                writes = passes.solve_writes(matrix, k, eta, stacked, at_k, decay, system)
            else:
                h, rate, gradient, anchored = tops["mem"]
                writes = passes.solve_writes(matrix, h, rate, gradient, anchored, decay)
            new[name] = passes.commit(matrix, writes, decay)
            if config.read == "start":
                x = passes.at_anchor(matrix, x, decay)
            else:
                x = passes.read(matrix, writes, x, decay, config.read == "after")
            if name == "w2":
                x = activation(config.activation)(x)
        output = x if config.kind == "linear" else q + x
    if not ends_chunk and decay.carried_BC1 is not None:
        step.set_documents(decay.carried_last())
    return step.finish(new, ends_chunk), output


def _twice(decay: Decay) -> Decay:
    """The same documents for keys and values stacked behind each other."""
    if decay.carried_BC1 is None:
        return decay
    return Decay(
        decay.ratio_HBCC,
        decay.after_HBCC,
        decay.previous_HBC,
        decay.now_HBC,
        torch.cat((decay.carried_BC1, decay.carried_BC1), -2),
        decay.momentum,
    )
