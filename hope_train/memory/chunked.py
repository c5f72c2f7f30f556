"""The self-modifying Titans in chunk-parallel form: exact, differentiable through the writes, no loop over tokens.

Inside a chunk everything is matrix products and one triangular solve per set of keys (see `passes`); over chunks
there is a loop, because keys depend on the state. The generators (k, v, q, eta, alpha) modify themselves; the main
memory never feeds them. Where their chunks are equally long all memories are one group in one loop, else the
generators' loop comes first. Layout inside: [H, B, C, N]. Keep states in fp32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hope_train.config.model import MemoryConfig
from hope_train.memory import pieces
from hope_train.memory.pieces import Group
from hope_train.memory.rules import MEMORY_BOXES, Boxes, Init, generator_boxes, joint_boxes

Span = tuple[int, int, bool]
"""First token, one past the last, and whether a chunk ends there."""


class Row(NamedTuple):
    """A kernel for whole chunks in a row, where all memories are one group."""

    takes: Callable[..., bool]
    """Of config, z [H, B, T, N], q and starts: whether it computes whole chunks of them."""
    run: Callable[..., tuple[Tensor, Group]]
    """Of config, stacked initial states, group (None: at these), z and q: o [H, B, T, N] and the group after them."""


@dataclass(frozen=True)
class Kernels:
    """The three functions of `pieces`, plain or compiled, and what may take the place of the first."""

    joint: Callable[..., Any]
    generators: Callable[..., Any]
    memory: Callable[..., Any]
    row: Row | None = None


PLAIN = Kernels(pieces.joint_piece, pieces.generator_piece, pieces.memory_piece)


@dataclass
class MemoryState:
    """All fast weights of one layer between two tokens; its size does not depend on how many tokens there were.

    Each group's `anchor` is the state at the current chunk's start (where gradients are taken and generators are
    read), `now` the state after the last token; at a chunk's start they are the same. `speed` is the momentum, empty
    without it.
    """

    position: int
    """Tokens so far."""
    groups: tuple[Group, ...]
    """All memories as one group, or generators and main memory."""


def groups_of(config: MemoryConfig) -> tuple[Boxes, ...]:
    """Which memories make one group."""
    if config.chunk_size == config.generator_chunk_size:
        return (joint_boxes(config),)
    return generator_boxes(config), MEMORY_BOXES


def initial_state(config: MemoryConfig, init: Init, batch: int) -> MemoryState:
    """The state before the first token: every memory at its learned initial state."""
    groups = (
        pieces.initial_group(config, pieces.stack_init(config, init, boxes), batch) for boxes in groups_of(config)
    )
    return MemoryState(0, tuple(groups))


def run(
    config: MemoryConfig,
    z_BTHN: Tensor,
    q_BTHN: Tensor | None,
    init: Init,
    starts_BT: Tensor | None = None,
    state: MemoryState | None = None,
    kernels: Kernels = PLAIN,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, N] for inputs z and static queries q (not yet normalised), and the state after the last
    token.

    `starts_BT` (bool) marks the first tokens of documents. `state` continues from an earlier call, wherever it stopped.
    `kernels` may be the compiled ones of `hope_train.memory.compiled`.
    """
    position, begun = (0, [None] * len(groups_of(config))) if state is None else (state.position, list(state.groups))
    # heads first, and contiguous: an expanded q (one query for all) would otherwise reach the kernels with odd strides
    z_HBTN = z_BTHN.permute(2, 0, 1, 3).contiguous()
    inputs = [z_HBTN] if q_BTHN is None else [z_HBTN, q_BTHN.permute(2, 0, 1, 3).contiguous()]
    loop = _Loop(config, init, starts_BT, position, kernels.row)
    if len(begun) == 1:
        (o_HBTN,), group = loop.run(kernels.joint, PLAIN.joint, config.chunk_size, 0, begun[0], inputs)
        groups: tuple[Group, ...] = (group,)
    else:
        size = config.generator_chunk_size
        made, generators = loop.run(kernels.generators, PLAIN.generators, size, 0, begun[0], inputs[:1])
        if q_BTHN is not None:
            made = [*made[:4], inputs[1]]
        (o_HBTN,), memory = loop.run(kernels.memory, PLAIN.memory, config.chunk_size, 1, begun[1], made)
        groups = (generators, memory)
    return o_HBTN.permute(1, 2, 0, 3), MemoryState(position + z_BTHN.shape[1], groups)


class _Loop:
    """The loop over the pieces of a sequence, for one group at a time."""

    def __init__(
        self,
        config: MemoryConfig,
        init: Init,
        starts_BT: Tensor | None,
        position: int,
        row: Row | None,
    ) -> None:
        self.config, self.init, self.starts_BT, self.position, self.row = config, init, starts_BT, position, row

    def run(
        self,
        kernel: Callable[..., Any],
        plain: Callable[..., Any],
        chunk: int,
        group_number: int,
        group: Group | None,
        inputs: Sequence[Tensor],
    ) -> tuple[list[Tensor], Group]:
        """Outputs of all pieces, joined along the tokens, and the group after the last; None is the initial group.

        Only whole chunks take the (maybe compiled) `kernel`: left-over pieces and decoding come in every length.
        """
        config, joint = self.config, plain is PLAIN.joint
        boxes = groups_of(config)[group_number]
        stacked = pieces.stack_init(config, self.init, boxes)
        theta, batch_size = self.init.get("theta_logit"), inputs[0].shape[1]
        collected: list[Sequence[Tensor]] = []
        learning = torch.is_grad_enabled()
        row = self.row if learning and joint and len(inputs) == 2 else None
        if row is not None and not row.takes(config, *inputs, self.starts_BT):
            row = None
        batches = self._batches(inputs[0].shape[2], chunk, in_rows=row is not None)
        sizes = [last - first for spans in batches for first, last, _ in spans]
        # Split once, not sliced per piece: the backward of a slice is a whole sequence of zeros, so quadratic in all.
        pieces_of = dict(
            zip(
                (s for spans in batches for s in spans),
                zip(*(x.split(sizes, 2) for x in inputs), strict=True),
                strict=True,
            )
        )
        for spans in batches:

            def batch(group: Group | None, spans: list[Span] = spans) -> tuple[list[Sequence[Tensor]], Group | None]:
                results: list[Sequence[Tensor]] = []
                for first, last, ends in spans:
                    parts: list[Any] = list(pieces_of[first, last, ends])
                    if row is not None and (last - first) % chunk == 0:
                        result, group = row.run(config, stacked, group, *parts)
                        results.append((result,))
                        continue
                    group = group or pieces.initial_group(config, stacked, batch_size)
                    function = kernel if last - first == chunk and learning else plain
                    if joint:
                        parts = parts if len(parts) == 2 else [*parts, None]
                    elif group_number == 1:
                        parts = [tuple(parts)]
                    starts = None if self.starts_BT is None else self.starts_BT[:, first:last]
                    result, group = function(config, boxes, stacked, theta, group, *parts, starts, ends)
                    results.append((result,) if isinstance(result, Tensor) else result)
                return results, group

            if config.save_every > 1 and learning:
                # keep only the state before these chunks, and run them again in backward
                results, group = checkpoint(batch, group, use_reentrant=False, preserve_rng_state=False)
            else:
                results, group = batch(group)
            collected += results
        assert group is not None
        return [torch.cat(parts, 2) for parts in zip(*collected, strict=True)], group

    def _batches(self, tokens: int, chunk: int, in_rows: bool) -> list[list[Span]]:
        """Pieces that end at chunk boundaries, in batches of `save_every`; `in_rows` joins whole chunks of a batch."""
        spans: list[Span] = []
        first = 0
        while first < tokens:
            last = min(tokens, first + chunk - (self.position + first) % chunk)
            spans.append((first, last, (self.position + last) % chunk == 0))
            first = last
        step = self.config.save_every
        if in_rows and step == 1:
            step = len(spans)  # nothing is run again
        batches = [spans[i : i + step] for i in range(0, len(spans), step)]
        return [_rows(batch, chunk) for batch in batches] if in_rows else batches


def _rows(spans: list[Span], chunk: int) -> list[Span]:
    """The spans with neighbouring whole chunks joined."""
    joined: list[Span] = []
    for first, last, ends in spans:
        if joined and last - first == chunk and (joined[-1][1] - joined[-1][0]) % chunk == 0:
            first = joined.pop()[0]
        joined.append((first, last, ends))
    return joined
