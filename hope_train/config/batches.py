"""How many sequences each global batch has, and so which samples it holds: a function of its number alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pydantic import Field, model_validator

from hope_train.config.base import Section


class BatchRampConfig(Section):
    """A global batch that grows at the beginning of a run, by Megatron's rule (`--rampup-batch-size`), in tokens."""

    start_tokens: int | None = Field(None, ge=1)
    """Tokens of the first global batch. null: every batch has `batch_tokens`."""

    increment_tokens: int | None = Field(None, ge=1)
    """What the batch grows by at a time; it divides what is between `start_tokens` and `batch_tokens`."""

    over_tokens: int | None = Field(None, ge=1)
    """Training tokens over which the batch grows; each of its sizes is kept for an equal part of them."""

    @model_validator(mode="after")
    def _check(self) -> BatchRampConfig:
        missing = [name for name in BatchRampConfig.model_fields if getattr(self, name) is None]
        if 0 < len(missing) < len(BatchRampConfig.model_fields):
            raise ValueError(f"set {' and '.join(missing)} too, or none of the three")
        return self


class Stretch(NamedTuple):
    """Neighbouring global batches of equal size."""

    batch: int
    """Number of the first."""

    sample: int
    """Number of its first sample."""

    rows: int
    """Sequences in each of them."""


@dataclass(frozen=True)
class BatchSizes:
    """Global batches cut the endless sequence of samples, none left out and none twice. The last stretch has no end."""

    stretches: tuple[Stretch, ...]

    @classmethod
    def constant(cls, rows: int) -> BatchSizes:
        """All of `rows` sequences."""
        return cls((Stretch(0, 0, rows),))

    @classmethod
    @lru_cache
    def ramp(cls, start: int, increment: int, full: int, over_tokens: int, context_length: int) -> BatchSizes:
        """From `start` to `full` sequences in steps of `increment`, which divides their difference.

        With n increments, a batch in front of which c tokens were trained on has start + floor(c n / over_tokens)
        increments, `full` at most: the rule of Megatron's RampupBatchsizeNumMicroBatchesCalculator, in whole numbers.
        """
        count = (full - start) // increment
        stretches, batch, sample = [], 0, 0
        while (number := min(sample * context_length * count // over_tokens, count)) < count:
            rows = start + number * increment
            stretches.append(Stretch(batch, sample, rows))
            # Up to the first batch in front of which (number + 1) / count of the tokens were trained on.
            last = -(-(number + 1) * over_tokens // (count * context_length))
            batches = -(-(last - sample) // rows)
            batch, sample = batch + batches, sample + batches * rows
        return cls((*stretches, Stretch(batch, sample, full)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sequences of a batch, the sizes one after the other; the last one stays."""
        return tuple(stretch.rows for stretch in self.stretches)

    def samples_of(self, batch: int) -> tuple[int, int]:
        """(number of the first sample, sequences) of a global batch, counted from 0."""
        stretch = self.stretches[bisect.bisect_right(self.stretches, batch, key=lambda each: each.batch) - 1]
        return stretch.sample + (batch - stretch.batch) * stretch.rows, stretch.rows

    def first_sample(self, batch: int) -> int:
        """Samples in all batches before this one."""
        return self.samples_of(batch)[0]

    def whole_batches(self, samples: int) -> int:
        """Batches that the first `samples` samples fill."""
        stretch = self.stretches[bisect.bisect_right(self.stretches, samples, key=lambda each: each.sample) - 1]
        return stretch.batch + (samples - stretch.sample) // stretch.rows

    def batches_for(self, samples: int) -> int:
        """Fewest batches with at least so many samples."""
        whole = self.whole_batches(samples)
        return whole + (self.first_sample(whole) < samples)

    def counted(self, batches: int) -> Iterator[tuple[int, int]]:
        """(sequences, how many batches have them) of the first `batches` batches, in order."""
        ends = [stretch.batch for stretch in self.stretches[1:]] + [batches]
        for stretch, end in zip(self.stretches, ends, strict=True):
            if stretch.batch < batches:
                yield stretch.rows, min(end, batches) - stretch.batch
