"""How alive a memory is: how far its weights stand from where they started, how often the clamp holds them, eta and
alpha.

"No NaN" says nothing about that: weights that never move, and weights that always lean on the clamp, are finite too.
The numbers here come from the functions that train (`pieces`), run chunk by chunk without a graph.

Shapes: B sequences, T tokens, H heads, N head width, E hidden width; S chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import pieces
from hope_train.memory.pieces import Group
from hope_train.memory.rules import MEMORY_BOXES, SCALAR_BOXES, Boxes, Init, generator_boxes

FRESH_BAND = (0.05, 0.5)
"""|W - W_init| / |W_init|, the mean over a run, in which boxes k, v and mem of an untrained model stay."""

TRAINED_BAND = (0.001, 0.5)
"""The same for every layer of a trained model. Training shortens retention and may teach a layer to write little (eta
0.02): with alpha = 0 a memory keeps only its last write, sqrt(5/4) eta / |W_init| (linear, |W_init| = sqrt(N) / 2)."""

TRAINED_MOST = 0.02
"""What the mem box of a trained model's liveliest layer moves by at least."""

MOST_HELD = 0.005
"""The share of (chunk, sequence, head, matrix) that the clamp may hold, in either."""

HELD = 1e-5
"""A matrix counts as held by the clamp when its norm is within this share of the limit, where the clamp puts it
exactly."""


@dataclass
class Matrices:
    """One fast matrix of all heads and sequences at the ends of S chunks; each tensor is [S, B, H]."""

    deviation: Tensor
    """|W - W_init|_F / |W_init|_F."""
    norm: Tensor
    """|W|_F / |W_init|_F."""
    held: Tensor
    """bool: the clamp holds the matrix at this chunk's end."""


@dataclass
class Activity:
    """What `observe` saw of the memories of one layer."""

    matrices: dict[str, Matrices]
    """By the name of the initial state: `w2_k`, `w1_mem`, … or `w_k`, ….  Generators count their own chunks."""
    eta_BTH: Tensor
    """Write rate of every token."""
    alpha_BTH: Tensor
    """Retention of every token."""
    o_BTHN: Tensor
    """Answers of the main memory, as `chunked.run` gives them."""

    def box(self, name: str) -> Matrices:
        """The matrices of a box (`k`, `v`, `q`, `eta`, `alpha`, `mem`) side by side: [S, B, H x matrices]."""
        chosen = [part for key, part in self.matrices.items() if key.partition("_")[2] == name]
        if not chosen:
            raise KeyError(f"no memory {name!r} among {sorted(self.boxes)}")
        return Matrices(
            torch.cat([part.deviation for part in chosen], -1),
            torch.cat([part.norm for part in chosen], -1),
            torch.cat([part.held for part in chosen], -1),
        )

    @property
    def boxes(self) -> tuple[str, ...]:
        """The boxes there are, in the order of `matrices`."""
        return tuple(dict.fromkeys(key.partition("_")[2] for key in self.matrices))

    def rows(self) -> list[dict[str, Any]]:
        """One row per box with plain numbers, for tables and JSON.

        `deviation` is the mean |W - W_init| / |W_init| over chunks, sequences, heads and the box's matrices,
        `deviation_min` and `deviation_max` the extremes of single matrices, `deviation_by_chunk` the means of each
        chunk, `held` the share the clamp held; all but the box's name are None where no chunk was finished."""
        return [self._row(name) for name in self.boxes]

    def _row(self, name: str) -> dict[str, Any]:
        box = self.box(name)
        if not len(box.deviation):
            empty = ("deviation", "deviation_min", "deviation_max", "norm_max", "held", "deviation_by_chunk")
            return {"box": name, **dict.fromkeys(empty)}
        return {
            "box": name,
            "deviation": box.deviation.mean().item(),
            "deviation_min": box.deviation.min().item(),
            "deviation_max": box.deviation.max().item(),
            "norm_max": box.norm.max().item(),
            "held": box.held.double().mean().item(),
            "deviation_by_chunk": box.deviation.mean((1, 2)).tolist(),
        }


def outside_band(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a trained model by rows of `Activity.rows` (with their `layer`): a line for each box k, v or
    mem outside `TRAINED_BAND`, for each box that the clamp holds more often than `MOST_HELD`, and one where no layer's
    mem moves by `TRAINED_MOST`. Rows without a finished chunk say nothing."""
    low, high = TRAINED_BAND
    lines: list[str] = []
    rows = [row for row in rows if row["deviation"] is not None]
    for row in rows:
        place = f"layer {row['layer']}, {row['box']}"
        if row["box"] in ("k", "v", "mem") and not low <= row["deviation"] <= high:
            lines.append(f"{place}: moved by {row['deviation']:.4f}, outside {low} to {high}")
        if row["held"] > MOST_HELD:
            lines.append(
                f"{place}: held by the clamp in {100 * row['held']:.2f}% of cases, more than {100 * MOST_HELD}%"
            )
    most = max((row["deviation"] for row in rows if row["box"] == "mem"), default=TRAINED_MOST)
    if most < TRAINED_MOST:
        lines.append(f"mem: moved by {most:.4f} at most, in no layer by {TRAINED_MOST}")
    return lines


def by_box(config: MemoryConfig, boxes: Boxes, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A group's stacked weights [H, (M,) B, O, I] taken apart, each box's [H, B, O, I] by the name of its initial
    state."""
    apart: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in ("w1", "w1s"):
            members = boxes.matrix if name == "w1" else boxes.scalar
            apart |= {f"w1_{box}": w for box, w in zip(members, weight.unbind(1), strict=True)}
            continue
        width = weight.shape[-1]
        sizes = [config.expansion * width if name == "w2" else 1 if box in SCALAR_BOXES else width for box in boxes.all]
        apart |= {f"{name}_{box}": w for box, w in zip(boxes.all, weight.split(sizes, -2), strict=True)}
    return apart


@torch.no_grad()
def observe(
    config: MemoryConfig, z_BTHN: Tensor, q_BTHN: Tensor | None, init: Init, starts_BT: Tensor | None = None
) -> Activity:
    """Run the memories over inputs z and static queries q (None with `adaptive_q`) and watch every chunk's end.

    The arguments are those of `chunked.run`. An unfinished last chunk is run but not counted: nothing is committed or
    clamped there."""
    theta = init.get("theta_logit")
    z_HBTN = z_BTHN.permute(2, 0, 1, 3).contiguous()

    # The generators do not depend on the main memory, so they can go first, whatever the chunk sizes.
    watch = _Watch(config, generator_boxes(config), init, z_HBTN.shape[1])
    made = []
    for first, last, ends in _spans(z_HBTN.shape[2], config.generator_chunk_size):
        starts = None if starts_BT is None else starts_BT[:, first:last]
        parts, group = pieces.generator_piece(
            config, watch.boxes, watch.init, theta, watch.group, z_HBTN[:, :, first:last], starts, ends
        )
        made.append(parts)
        watch.see(group, ends)
    joined = [torch.cat(parts, 2) for parts in zip(*made, strict=True)]
    if q_BTHN is not None:
        joined = [*joined[:4], q_BTHN.permute(2, 0, 1, 3).contiguous()]

    memory = _Watch(config, MEMORY_BOXES, init, z_HBTN.shape[1])
    answers = []
    for first, last, ends in _spans(z_HBTN.shape[2], config.chunk_size):
        starts = None if starts_BT is None else starts_BT[:, first:last]
        piece = tuple(part[:, :, first:last] for part in joined)
        answer, group = pieces.memory_piece(config, memory.boxes, memory.init, theta, memory.group, piece, starts, ends)
        answers.append(answer)
        memory.see(group, ends)

    return Activity(
        watch.result() | memory.result(),
        joined[2].permute(1, 2, 0),
        joined[3].exp().permute(1, 2, 0),
        torch.cat(answers, 2).permute(1, 2, 0, 3),
    )


def _spans(tokens: int, chunk: int) -> Iterator[tuple[int, int, bool]]:
    for first in range(0, tokens, chunk):
        last = min(tokens, first + chunk)
        yield first, last, last - first == chunk


@dataclass
class _Watch:
    """One group on its way through the sequence."""

    config: MemoryConfig
    boxes: Boxes
    raw: Init
    batch: int
    seen: list[dict[str, tuple[Tensor, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.init = pieces.stack_init(self.config, self.raw, self.boxes)
        self.group = pieces.initial_group(self.config, self.init, self.batch)

    def see(self, group: Group, ends: bool) -> None:
        self.group = group
        if ends:
            self.seen.append(
                {
                    name: (_norm(w - self.raw[name][:, None]).mT, _norm(w).mT)
                    for name, w in by_box(self.config, self.boxes, group.now).items()
                }
            )

    def result(self) -> dict[str, Matrices]:
        found = {}
        for name in by_box(self.config, self.boxes, self.group.now):
            size_H = _norm(self.raw[name])
            shape = (len(self.seen), self.batch, len(size_H))
            deviation, norm = (
                torch.stack([seen[name][i] for seen in self.seen]) / size_H if self.seen else size_H.new_zeros(shape)
                for i in (0, 1)
            )
            clamp = self.config.clamp
            held = torch.zeros_like(norm, dtype=torch.bool) if clamp is None else norm >= clamp * (1.0 - HELD)
            found[name] = Matrices(deviation, norm, held)
        return found


def _norm(weight: Tensor) -> Tensor:
    return weight.square().sum((-2, -1)).sqrt()
