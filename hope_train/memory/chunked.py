"""The self-modifying Titans in chunk-parallel form: exact, differentiable through the writes, no loop over tokens.

Inside a chunk everything is matrix products and one triangular solve per set of keys (see `passes`); over chunks
there is a loop, because keys depend on the state. The generators (k, v, q, eta, alpha) modify themselves; the main
memory never feeds them. Where their chunks are equally long all memories are one group in one loop, else the
generators' loop comes first. Layout inside: [H, B, C, N]. Keep states in fp32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hope_train.config.model import MemoryConfig
from hope_train.memory import pieces
from hope_train.memory.pieces import Group
from hope_train.memory.rules import MEMORY_BOXES, Boxes, Init, generator_boxes, joint_boxes

Span = tuple[int, int, bool]
"""First token, one past the last, and whether a chunk ends there."""


@dataclass(frozen=True)
class Kernels:
    """The three functions of `pieces`, plain or compiled."""

    joint: Callable[..., Any]
    generators: Callable[..., Any]
    memory: Callable[..., Any]


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
    if state is None:
        state = initial_state(config, init, z_BTHN.shape[0])
    # heads first, and contiguous: an expanded q (one query for all) would otherwise reach the kernels with odd strides
    z_HBTN = z_BTHN.permute(2, 0, 1, 3).contiguous()
    inputs = [z_HBTN] if q_BTHN is None else [z_HBTN, q_BTHN.permute(2, 0, 1, 3).contiguous()]
    loop = _Loop(config, init, starts_BT, state.position)
    if len(state.groups) == 1:
        (o_HBTN,), group = loop.run(kernels.joint, PLAIN.joint, config.chunk_size, 0, state.groups[0], inputs)
        groups: tuple[Group, ...] = (group,)
    else:
        size = config.generator_chunk_size
        made, generators = loop.run(kernels.generators, PLAIN.generators, size, 0, state.groups[0], inputs[:1])
        if q_BTHN is not None:
            made = [*made[:4], inputs[1]]
        (o_HBTN,), memory = loop.run(kernels.memory, PLAIN.memory, config.chunk_size, 1, state.groups[1], made)
        groups = (generators, memory)
    return o_HBTN.permute(1, 2, 0, 3), MemoryState(state.position + z_BTHN.shape[1], groups)


class _Loop:
    """The loop over the pieces of a sequence, for one group at a time."""

    def __init__(self, config: MemoryConfig, init: Init, starts_BT: Tensor | None, position: int) -> None:
        self.config, self.init, self.starts_BT, self.position = config, init, starts_BT, position

    def run(
        self,
        kernel: Callable[..., Any],
        plain: Callable[..., Any],
        chunk: int,
        group_number: int,
        group: Group,
        inputs: Sequence[Tensor],
    ) -> tuple[list[Tensor], Group]:
        """Outputs of all pieces, joined along the tokens, and the group after the last.

        Only whole chunks take the (maybe compiled) `kernel`: left-over pieces and decoding come in every length.
        """
        config, joint = self.config, plain is PLAIN.joint
        boxes = groups_of(config)[group_number]
        stacked = pieces.stack_init(config, self.init, boxes)
        theta = self.init.get("theta_logit")
        collected: list[Sequence[Tensor]] = []
        batches = self._batches(inputs[0].shape[2], chunk)
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

            def batch(group: Group, spans: list[Span] = spans) -> tuple[list[Sequence[Tensor]], Group]:
                results: list[Sequence[Tensor]] = []
                for first, last, ends in spans:
                    function = kernel if last - first == chunk and torch.is_grad_enabled() else plain
                    parts: list[Any] = list(pieces_of[first, last, ends])
                    if joint:
                        parts = parts if len(parts) == 2 else [*parts, None]
                    elif group_number == 1:
                        parts = [tuple(parts)]
                    starts = None if self.starts_BT is None else self.starts_BT[:, first:last]
                    result, group = function(config, boxes, stacked, theta, group, *parts, starts, ends)
                    results.append((result,) if isinstance(result, Tensor) else result)
                return results, group

            if config.save_every > 1 and torch.is_grad_enabled():
                # keep only the state before these chunks, and run them again in backward
                results, group = checkpoint(batch, group, use_reentrant=False, preserve_rng_state=False)
            else:
                results, group = batch(group)
            collected += results
        return [torch.cat(parts, 2) for parts in zip(*collected, strict=True)], group

    def _batches(self, tokens: int, chunk: int) -> list[list[Span]]:
        """Pieces that end at chunk boundaries, in batches of `save_every`."""
        spans: list[Span] = []
        first = 0
        while first < tokens:
            last = min(tokens, first + chunk - (self.position + first) % chunk)
            spans.append((first, last, (self.position + last) % chunk == 0))
            first = last
        step = self.config.save_every
        return [spans[i : i + step] for i in range(0, len(spans), step)]
