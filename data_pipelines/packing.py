"""Rows from a lane's documents: one after the other and cut, or whole ones fitted together.

Every document is end-of-text and its own tokens; its targets are its own tokens and then end-of-text.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.lanes import Lane, LaneDocument, Snapshot
from data_pipelines.order import permute
from data_pipelines.samples import IGNORED

_ROWS = 8
"""Rows that are cut at a time."""


class RowSegment(NamedTuple):
    """A document, or a part of one, in a row."""

    position: int
    source: int
    id: str


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows of a lane, and where the lane was in front of them."""

    first: int
    """Number of the first row among the lane's."""

    tokens: np.ndarray
    """int32 [K, T]."""

    targets: np.ndarray
    """int32 [K, T]; -100 is padding."""

    starts: np.ndarray
    """bool [K, T]: where documents begin, and the row itself."""

    segments: list[list[RowSegment]]
    """Of each row."""

    snapshot: dict[str, Any]
    """`packed_rows` goes on from it with this chunk."""

    @property
    def counts(self) -> Counter[str]:
        """Records the lane has read by the time this chunk was whole, by what became of them."""
        return Counter(self.snapshot["counts"])


def packed_rows(
    lane: Lane, context_length: int, eot_id: int, packing: str, pack_rows: int, seed: int, first: int, offset: int
) -> Iterator[Chunk]:
    """The rows of a lane without end, from number `first` on.

    Args:
        lane: in front of the document in which row `first` begins.
        context_length: T.
        packing, pack_rows: as in data.stream.
        seed: of the order in which fitted rows are given.
        offset: token of that document (its end-of-text is token 0) with which the row begins; 0 for `best_fit`.
    """
    if packing == "best_fit":
        return _fitted(lane, context_length, eot_id, pack_rows, seed, first)
    return _split(lane, context_length, eot_id, first, offset)


class _Piece(NamedTuple):
    sequence: np.ndarray
    document: LaneDocument
    before: Snapshot
    """The lane in front of this document."""


def _draw(lane: Lane, eot_id: int) -> _Piece:
    before = lane.snapshot()
    document = lane.draw()
    sequence = np.empty(len(document.tokens) + 1, dtype=np.int32)
    sequence[0] = eot_id
    sequence[1:] = document.tokens
    return _Piece(sequence, document, before)


def _split(lane: Lane, length: int, eot_id: int, first: int, offset: int) -> Iterator[Chunk]:
    """Documents one after the other; row m is tokens m T to m T + T of them, the last one a target alone."""
    pieces: deque[_Piece] = deque()
    held = 0
    while True:
        while held < offset + _ROWS * length + 1:
            pieces.append(_draw(lane, eot_id))
            held += len(pieces[-1].sequence)
        snapshot = {"first": first, "offset": offset, **pieces[0].before}
        stream = np.concatenate([piece.sequence for piece in pieces])[offset : offset + _ROWS * length + 1]
        starts = np.zeros(_ROWS * length, dtype=bool)
        segments: list[list[RowSegment]] = [[] for _ in range(_ROWS)]
        begin = -offset
        for piece in pieces:
            end = begin + len(piece.sequence)
            if 0 <= begin < len(starts):
                starts[begin] = True
            for row in range(max(begin, 0) // length, min(-(-end // length), _ROWS)):
                place = max(begin - row * length, 0)
                segments[row].append(RowSegment(place, piece.document.source, piece.document.id))
            begin = end
        starts[::length] = True
        shape = (_ROWS, length)
        yield Chunk(
            first,
            stream[:-1].reshape(shape),
            stream[1:].reshape(shape),
            starts.reshape(shape),
            segments,
            {**snapshot, "counts": dict(lane.counts())},
        )
        first, offset = first + _ROWS, offset + _ROWS * length
        while pieces and offset >= len(pieces[0].sequence):
            offset -= len(pieces[0].sequence)
            held -= len(pieces[0].sequence)
            pieces.popleft()


class _Part(NamedTuple):
    """A document, or as much of a long one as a row holds."""

    tokens: np.ndarray
    targets: np.ndarray
    document: LaneDocument


def _fitted(lane: Lane, length: int, eot_id: int, pack_rows: int, seed: int, first: int) -> Iterator[Chunk]:
    """Documents for about `pack_rows` rows at a time, the longest first, each into the fullest row that takes it."""
    while True:
        snapshot = {"first": first, "offset": 0, **lane.snapshot()}
        parts: list[_Part] = []
        drawn = 0
        while drawn < pack_rows * length:
            piece = _draw(lane, eot_id)
            targets = np.append(piece.sequence[1:], np.int32(eot_id))
            drawn += len(targets)
            for start in range(0, len(targets), length):
                cut = slice(start, start + length)
                parts.append(_Part(piece.sequence[cut], targets[cut], piece.document))
        rows = fit([len(part.tokens) for part in parts], length)
        order = permute(np.arange(len(rows)), len(rows), seed, first, f"rows-{lane.number}").tolist()
        shape = (len(rows), length)
        tokens, starts = np.full(shape, eot_id, np.int32), np.zeros(shape, bool)
        all_targets = np.full(shape, IGNORED, np.int32)
        segments: list[list[RowSegment]] = []
        for row, number in enumerate(order):
            place = 0
            segments.append([])
            for chosen in rows[number]:
                part = parts[chosen]
                end = place + len(part.tokens)
                tokens[row, place:end], all_targets[row, place:end] = part.tokens, part.targets
                starts[row, place] = True
                segments[row].append(RowSegment(place, part.document.source, part.document.id))
                place = end
            if place < length:
                starts[row, place] = True  # Padding is nobody's document.
        counts = dict(lane.counts())
        yield Chunk(first, tokens, all_targets, starts, segments, {**snapshot, "counts": counts})
        first += len(rows)


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best fit, longest first: which items go into each row of `room`; none is longer than that.

    Equal lengths keep their order, and of equally full rows the oldest takes the next item.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, number of the row), sorted.
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect.bisect_left(free, (lengths[item], -1))
        if place == len(free):
            rows.append([item])
            left, row = room - lengths[item], len(rows) - 1
        else:
            left, row = free.pop(place)
            rows[row].append(item)
            left -= lengths[item]
        if left:
            bisect.insort(free, (left, row))
    return rows
