"""The self-modifying Titans in chunk-parallel form: exact, differentiable through the writes, no loop over tokens.

Two scans over chunks: first the generators (k, v, q, eta, alpha), which modify themselves; then the main memory, which never feeds
them. Inside a chunk everything is matrix products and one triangular solve per set of keys (see `passes`).
Layout inside: [H, B, C, N]. Keep states in fp32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hope_train.config.model import MemoryConfig
from hope_train.memory import pieces
from hope_train.memory.rules import Init, generator_boxes

State = dict[str, Tensor]
"""Stacked fast weights of one group by layer, [H, B, …]."""


@dataclass
class MemoryState:
    """All fast weights of one layer between two tokens; its size does not depend on how many tokens there were.

    `anchor` is the state at the current chunk's start (where gradients are taken and generators are read), `now` the state after
    the last token; at a chunk's start they are the same. `speed` is the momentum, empty without it. `position` counts tokens.
    """

    position: int
    generators: pieces.Group
    memory: pieces.Group
    clamped: Tensor | None = field(default=None)


def initial_state(config: MemoryConfig, init: Init, batch: int) -> MemoryState:
    """The state before the first token: every memory at its learned initial state."""
    first = pieces.initial_groups(config, init, batch)
    return MemoryState(0, first[0], first[1])


def run(
    config: MemoryConfig,
    z_BTHN: Tensor,
    q_BTHN: Tensor | None,
    init: Init,
    starts_BT: Tensor | None = None,
    state: MemoryState | None = None,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, N] for inputs z and static queries q (not yet normalised), and the state after the last token.

    `starts_BT` (bool) marks the first tokens of documents. `state` continues from an earlier call, wherever it stopped.
    """
    if state is None:
        state = initial_state(config, init, z_BTHN.shape[0])
    z_HBTN = z_BTHN.permute(2, 0, 1, 3).contiguous()
    q_HBTN = None if q_BTHN is None else q_BTHN.permute(2, 0, 1, 3).contiguous()
    group = state.generators
    made: list[tuple[Tensor, ...]] = []
    for spans in _batches(z_BTHN.shape[1], state.position, config.generator_chunk_size, config.save_every):

        def generate(z: Tensor, group: pieces.Group, spans: list[tuple[int, int]] = spans):  # type: ignore[no-untyped-def]
            results = []
            for first, last in spans:
                rows = slice(first - spans[0][0], last - spans[0][0])
                starts = None if starts_BT is None else starts_BT[:, first:last]
                ends = (state.position + last) % config.generator_chunk_size == 0
                result, group = pieces.generator_piece(config, init, group, z[:, :, rows], starts, ends)
                results.append(result)
            return results, group

        z_span = z_HBTN[:, :, spans[0][0] : spans[-1][1]]
        results, group = _maybe_recompute(config, generate, z_span, group)
        made += results
    generators = group
    k, v, eta, log_alpha = (torch.cat([piece[i] for piece in made], 2) for i in range(4))
    if config.adaptive_q:
        q_HBTN = torch.cat([piece[4] for piece in made], 2)
    assert q_HBTN is not None
    q_HBTN = pieces.finish_query(config, q_HBTN)
    group = state.memory
    outputs: list[Tensor] = []
    inputs = (k, v, eta, log_alpha, q_HBTN)
    for spans in _batches(z_BTHN.shape[1], state.position, config.chunk_size, config.save_every):

        def remember(tensors: tuple[Tensor, ...], group: pieces.Group, spans: list[tuple[int, int]] = spans):  # type: ignore[no-untyped-def]
            results = []
            for first, last in spans:
                rows = slice(first - spans[0][0], last - spans[0][0])
                starts = None if starts_BT is None else starts_BT[:, first:last]
                ends = (state.position + last) % config.chunk_size == 0
                result, group = pieces.memory_piece(config, init, group, [x[:, :, rows] for x in tensors], starts, ends)
                results.append(result)
            return results, group

        span = tuple(x[:, :, spans[0][0] : spans[-1][1]] for x in inputs)
        results, group = _maybe_recompute(config, remember, span, group)
        outputs += results
    o_BTHN = torch.cat(outputs, 2).permute(1, 2, 0, 3)
    return o_BTHN, MemoryState(state.position + z_BTHN.shape[1], generators, group)


def _batches(tokens: int, position: int, chunk: int, save_every: int) -> list[list[tuple[int, int]]]:
    """Pieces (first, last) that end at chunk boundaries, in batches of `save_every`."""
    pieces_: list[tuple[int, int]] = []
    first = 0
    while first < tokens:
        last = min(tokens, first + chunk - (position + first) % chunk)
        pieces_.append((first, last))
        first = last
    return [pieces_[i : i + save_every] for i in range(0, len(pieces_), save_every)]


def _maybe_recompute(config: MemoryConfig, function, *arguments):  # type: ignore[no-untyped-def]
    """Keep only the state before the batch of chunks, and run it again in backward, where the configuration says so."""
    if config.save_every > 1 and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


__all__ = ["MemoryState", "generator_boxes", "initial_state", "run"]
