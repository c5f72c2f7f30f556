"""The memory rule of `parallel.keep_gathered`: which sharded levels stay gathered between their updates (no torch).

A level that has not changed need not be gathered again. Keeping it costs its whole weights on every rank, besides the
whole accumulator that a level needs which is reduced only at its boundary.
"""

from __future__ import annotations

from collections.abc import Mapping

from hope_train.config.parallel import ParallelConfig

GATHERED_BYTES = 8
"""Per parameter of a level that stays gathered: its fp32 weights and its fp32 accumulator, both whole."""


def kept_gathered(numbers: Mapping[int, int], periods: Mapping[int, int], parallel: ParallelConfig) -> tuple[int, ...]:
    """The levels that a rank keeps gathered between their updates (`parallel.keep_gathered`), in order.

    numbers: level -> parameters of it on this rank once gathered (after tensor and pipeline parallelism).
    periods: level -> period. A level of period 1 changes at every step and is never kept.

    `auto` takes the slowest level first (of equal ones the later), at `GATHERED_BYTES` for each parameter, and stops
    at the first that would exceed `parallel.keep_gathered_gib`.
    """
    slow = [level for level in numbers if periods[level] > 1 and numbers[level]]
    if parallel.dp_shard == 1 or parallel.keep_gathered == "never":
        return ()
    if parallel.keep_gathered == "always":
        return tuple(sorted(slow))
    left, kept = parallel.keep_gathered_gib * 2**30, []
    for level in sorted(slow, key=lambda level: (periods[level], level), reverse=True):
        left -= GATHERED_BYTES * numbers[level]
        if left < 0:
            break
        kept.append(level)
    return tuple(sorted(kept))
