"""One piece of a chunk for a group of memories: generate, write, read, commit. Pure functions of tensors.

A group's matrices are stacked, so that each step is a few large products: `w2` holds the rows of all boxes ([H, B, P
E, N]; they share their keys, hence one Gram matrix and one solve), `w1` the matrices of the matrix boxes ([H, M, B,
N, E]), `w1s` the rows of the scalar ones ([H, S, B, 1, E]). Linear boxes are the rows of one matrix `w`. Scalars come
first, the main memory last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import passes
from hope_train.memory.decay import Decay, make_decay
from hope_train.memory.passes import Matrix, Writes
from hope_train.memory.rules import Boxes, Init, activation, activation_and_slope, l2norm

Made = tuple[Tensor, ...]
"""What the generators made: k, v [H, B, C, N], eta, log alpha [H, B, C] and, where it is adaptive, raw q."""


@dataclass
class Group:
    """Fast weights of one group by stacked name; `now` is `anchor` itself at a chunk's start."""

    anchor: dict[str, Tensor]
    now: dict[str, Tensor]
    speed: dict[str, Tensor]


def stack_init(config: MemoryConfig, init: Init, boxes: Boxes) -> dict[str, Tensor]:
    """Initial states of a group under their stacked names, without the sequences."""
    if config.kind == "linear":
        return {"w": torch.cat([init[f"w_{box}"] for box in boxes.all], 1)}
    stacked = {
        "w2": torch.cat([init[f"w2_{box}"] for box in boxes.all], 1),
        "w1": torch.stack([init[f"w1_{box}"] for box in boxes.matrix], 1),
    }
    if boxes.scalar:
        stacked["w1s"] = torch.stack([init[f"w1_{box}"] for box in boxes.scalar], 1)
    return stacked


def initial_group(config: MemoryConfig, init: dict[str, Tensor], batch: int) -> Group:
    """A group before the first token, from its stacked initial states."""
    weights = {
        name: w[..., None, :, :].expand(*w.shape[:-2], batch, *w.shape[-2:]).contiguous() for name, w in init.items()
    }
    speed = {name: torch.zeros_like(w) for name, w in weights.items()} if config.momentum else {}
    return Group(weights, weights, speed)


def generator_piece(
    config: MemoryConfig,
    boxes: Boxes,
    init: dict[str, Tensor],
    theta_logit_H: Tensor | None,
    group: Group,
    z_HBCN: Tensor,
    starts_BC: Tensor | None,
    ends_chunk: bool,
) -> tuple[Made, Group]:
    """What the generators make of a piece, and the generators after it."""
    step = _Step(config, boxes, init, group)
    made = step.generate(z_HBCN, starts_BC, boxes)
    decay = make_decay(made[3], starts_BC, _log_theta(theta_logit_H))
    _, after = step.write(made, None, decay, ends_chunk)
    return made, after


def memory_piece(
    config: MemoryConfig,
    boxes: Boxes,
    init: dict[str, Tensor],
    theta_logit_H: Tensor | None,
    group: Group,
    made: Made,
    starts_BC: Tensor | None,
    ends_chunk: bool,
) -> tuple[Tensor, Group]:
    """o [H, B, C, N] from k, v, eta, log alpha and raw q, and the main memory after the piece."""
    step = _Step(config, boxes, init, group)
    decay = make_decay(made[3], starts_BC, _log_theta(theta_logit_H))
    output, after = step.write(made, made[4], decay, ends_chunk)
    assert output is not None
    return output, after


def joint_piece(
    config: MemoryConfig,
    boxes: Boxes,
    init: dict[str, Tensor],
    theta_logit_H: Tensor | None,
    group: Group,
    z_HBCN: Tensor,
    q_HBCN: Tensor | None,
    starts_BC: Tensor | None,
    ends_chunk: bool,
) -> tuple[Tensor, Group]:
    """Generators and main memory as one group, where their chunks are equally long."""
    step = _Step(config, boxes, init, group)
    made = step.generate(z_HBCN, starts_BC, Boxes(boxes.scalar, boxes.matrix[:-1]))
    decay = make_decay(made[3], starts_BC, _log_theta(theta_logit_H))
    output, after = step.write(made, made[4] if q_HBCN is None else q_HBCN, decay, ends_chunk)
    assert output is not None
    return output, after


def _log_theta(theta_logit_H: Tensor | None) -> Tensor | None:
    return None if theta_logit_H is None else torch.nn.functional.logsigmoid(theta_logit_H)


class _Step:
    """The matrices of a group over one piece."""

    def __init__(self, config: MemoryConfig, boxes: Boxes, init: dict[str, Tensor], group: Group) -> None:
        self.config, self.boxes, self.group, self.init = config, boxes, group, init
        self.linear = config.kind == "linear"
        self.m = {
            name: Matrix(
                group.anchor[name],
                group.now[name],
                initial,
                group.speed.get(name),
                config.decay_to == "init",
                config.rank_one == "both" or not name.startswith("w1"),
            )
            for name, initial in init.items()
        }

    def generate(self, z_HBCN: Tensor, starts_BC: Tensor | None, boxes: Boxes) -> Made:
        """k, v, eta, log alpha (and raw q) from the anchors of `boxes`, which come first in the group."""
        config, scalars, width = self.config, len(boxes.scalar), z_HBCN.shape[-1]
        documents = make_decay(z_HBCN.new_zeros(z_HBCN.shape[:3]), starts_BC, None) if starts_BC is not None else None
        if self.linear:
            rows = scalars + len(boxes.matrix) * width
            y = self._anchored("w", z_HBCN, documents, rows)
            raw = y[..., :scalars].movedim(-1, 0)
            values = y[..., scalars:].unflatten(-1, (-1, width)).movedim(-2, 0)
        else:
            hidden_width = self.init["w2"].shape[-2] // len(self.boxes.all)
            pre = self._anchored("w2", z_HBCN, documents, len(boxes.all) * hidden_width)
            hidden = activation(config.activation)(_by_box(pre, len(boxes.all))).contiguous()
            raw = self._anchored("w1s", hidden[:, :scalars], documents)[..., 0].movedim(1, 0)
            w1 = self._anchored("w1", hidden[:, scalars:], documents, boxes=len(boxes.matrix))
            values = (z_HBCN[:, None] + w1).movedim(1, 0)
        eta = config.eta_max * torch.sigmoid(raw[0] + config.eta_bias)
        log_alpha = torch.nn.functional.logsigmoid(raw[1] + config.alpha_bias)
        k, v = l2norm(values[0]), l2norm(values[1]) if config.normalize_v else values[1]
        return (k, v, eta, log_alpha, *values[2:])

    def write(self, made: Made, q: Tensor | None, decay: Decay, ends_chunk: bool) -> tuple[Tensor | None, Group]:
        """Write k -> M^0(v) into every box; with `q` also the last box's answers."""
        if q is not None and self.config.normalize_q:
            q = l2norm(q)
        output, new = self._write_linear(made, q, decay) if self.linear else self._write_mlp(made, q, decay)
        return output, self._finish(new, decay, ends_chunk)

    def _write_linear(
        self, made: Made, q: Tensor | None, decay: Decay
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor | None]]]:
        k, v, eta = made[:3]
        at_k, at_v = self._anchored("w", torch.cat((k, v), -2), decay.doubled()).split(k.shape[-2], -2)
        gradient = 2.0 * self.config.loss_factor * (at_k - at_v)
        new, writes = self._write_shared("w", k, eta, gradient, at_k, decay, k.shape[-1], q is not None)
        if q is None:
            return None, {"w": new}
        assert writes is not None
        return self._read(self.m["w"].last_rows(k.shape[-1]), writes, q, decay), {"w": new}

    def _write_mlp(
        self, made: Made, q: Tensor | None, decay: Decay
    ) -> tuple[Tensor | None, dict[str, tuple[Tensor, Tensor | None]]]:
        config, scalars, boxes = self.config, len(self.boxes.scalar), len(self.boxes.all)
        k, v, eta = made[:3]
        size = k.shape[-2]
        factor = 2.0 * config.loss_factor
        at_k, at_v = self._anchored("w2", torch.cat((k, v), -2), decay.doubled()).split(size, -2)
        value, slope = activation_and_slope(config.activation, _by_box(at_k, boxes))
        # Split once, not sliced at each use: the backward of a slice is a whole tensor of zeros.
        parts = (scalars, boxes - scalars)
        h_s, h = (x.contiguous() for x in value.split(parts, 1))
        hv_s, h_v = activation(config.activation)(_by_box(at_v, boxes)).split(parts, 1)

        # G2 = (W1^T g) s'(W2 k), g = M^0(k) - M^0(v): matrix boxes, then scalar ones
        both = torch.cat((h, h_v), -2)
        at_h, at_hv = self._anchored("w1", both, decay.doubled()).split(size, -2)
        g = factor * ((k - v)[:, None] + (at_h - at_hv))
        back = passes.anchor_transposed(self.m["w1"], g, decay)
        stack = decay.stacked()
        if scalars:
            at_s = self._anchored("w1s", h_s, decay)
            g_s = factor * (at_s - self._anchored("w1s", hv_s, decay))
            back = torch.cat((passes.anchor_transposed(self.m["w1s"], g_s, decay), back), 1)
        gradient = (back * slope).permute(0, 2, 3, 1, 4).flatten(-2)

        new: dict[str, tuple[Tensor, Tensor | None]] = {}
        width = h.shape[-1]
        new["w2"], writes_2 = self._write_shared("w2", k, eta, gradient, at_k, decay, width, q is not None)
        writes_1 = passes.solve_writes(self.m["w1"], h, self._rate(h, eta), g, at_h, stack)
        new["w1"] = passes.commit(self.m["w1"], writes_1, stack)
        if scalars:
            writes_s = passes.solve_writes(self.m["w1s"], h_s, self._rate(h_s, eta), g_s, at_s, stack)
            new["w1s"] = passes.commit(self.m["w1s"], writes_s, stack)
        if q is None:
            return None, new
        assert writes_2 is not None
        a = activation(config.activation)(self._read(self.m["w2"].last_rows(width), writes_2, q, decay))
        return q + self._read(self.m["w1"].last_of_stack(), _last(writes_1), a, decay), new

    def _write_shared(
        self,
        name: str,
        k: Tensor,
        eta: Tensor,
        gradient: Tensor,
        at_k: Tensor,
        decay: Decay,
        last: int,
        wanted: bool,
    ) -> tuple[tuple[Tensor, Tensor | None], Writes | None]:
        """Commit a matrix whose rows share the keys k; where `wanted`, also the writes to its last rows."""
        matrix = self.m[name]
        if decay.momentum is not None or (wanted and matrix.anchor_BOI.shape[-2] == last):
            writes = passes.solve_writes(matrix, k, eta, gradient, at_k, decay)
            rows = [None if x is None else x[..., -last:] for x in (writes.r_BCO, writes.u_BCO)]
            return passes.commit(matrix, writes, decay), Writes(k, *rows)
        new, own = passes.solve_unread(matrix, k, eta, gradient, at_k, decay, last if wanted else None)
        return (new, None), own

    def _rate(self, h: Tensor, eta: Tensor) -> Tensor:
        """Write rate of each W1: eta / (1 + eta |h|^2) (Sherman-Morrison) with the rank-one factor, else eta."""
        if not self.m["w1"].rank_one:
            return eta[:, None].expand(h.shape[:-1])
        return eta[:, None] / (1.0 + eta[:, None] * h.square().sum(-1))

    def _read(self, matrix: Matrix, writes: Writes, x: Tensor, decay: Decay) -> Tensor:
        if self.config.read == "start":
            return passes.at_anchor(matrix, x, decay)
        return passes.read(matrix, writes, x, decay, self.config.read == "after")

    def _anchored(
        self, name: str, x: Tensor, decay: Decay | None, rows: int | None = None, boxes: int | None = None
    ) -> Tensor:
        """W^0 x, of the first `rows` rows or the first `boxes` matrices of the stack only."""
        m = self.m[name]
        anchor, init = m.anchor_BOI, m.init_OI
        if rows is not None and rows < anchor.shape[-2]:
            anchor, init = anchor[..., :rows, :], init[..., :rows, :]
        if boxes is not None and boxes < anchor.shape[1]:
            anchor, init = anchor[:, :boxes], init[:, :boxes]
        if decay is None:
            return passes.project(x, anchor)
        return passes.at_anchor(Matrix(anchor, anchor, init, None, m.to_init, m.rank_one), x, decay)

    def _finish(self, new: dict[str, tuple[Tensor, Tensor | None]], decay: Decay, ends_chunk: bool) -> Group:
        """The group after the piece: at a chunk's end clamped and the new anchor, inside one with the old anchor."""
        now = {name: weight for name, (weight, _) in new.items()}
        speed = {name: velocity for name, (_, velocity) in new.items() if velocity is not None}
        if ends_chunk:
            if self.config.clamp is not None:
                now = {name: self._clamped(name, weight, self.config.clamp) for name, weight in now.items()}
            return Group(now, now, speed)
        anchor, carried = self.group.anchor, decay.carried_last()
        if carried is not None:  # the document that began inside the piece has W_init for the rest of its chunk
            anchor = {name: torch.where(carried, anchor[name], w[..., None, :, :]) for name, w in self.init.items()}
        return Group(anchor, now, speed)

    def _clamped(self, name: str, weight: Tensor, kappa: float) -> Tensor:
        init = self.init[name]
        if name != "w":
            return passes.clamp(weight, init, kappa, len(self.boxes.all) if name == "w2" else 1)
        sizes = [1] * len(self.boxes.scalar) + [init.shape[-1]] * len(self.boxes.matrix)
        parts = zip(weight.split(sizes, -2), init.split(sizes, -2), strict=True)
        return torch.cat([passes.clamp(w, i, kappa) for w, i in parts], -2)


def _by_box(x_HBCR: Tensor, boxes: int) -> Tensor:
    """Stacked rows as [H, P, B, C, E] (a view)."""
    return x_HBCR.unflatten(-1, (boxes, -1)).permute(0, 3, 1, 2, 4)


def _last(writes: Writes) -> Writes:
    """The writes of the last matrix of a stack."""
    r, u = (None if x is None else x[:, -1] for x in (writes.r_BCO, writes.u_BCO))
    return Writes(writes.keys_BCI[:, -1], r, u)
