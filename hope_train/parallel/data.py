"""Data parallelism by set: gradients of period 1 are summed at every step, what a slow level collects once per period.

Ranks see different samples and hold the same parameters. A rank's gradient is already divided by the tokens of the
whole step, so that the gradient is the sum over the ranks. Sums of gradients are started as soon as the last backward
has made them, in buckets and in one fixed order, and run beside the rest of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BUCKET_BYTES = 25 * 2**20
"""Tensors below this size travel together."""


@dataclass
class Traffic:
    """Bytes handed to reductions, and how many there were, by set."""

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, size: int, calls: int = 1) -> None:
        """Count `calls` reductions of `size` bytes together."""
        self.bytes[name] = self.bytes.get(name, 0) + size
        self.calls[name] = self.calls.get(name, 0) + calls


@dataclass(eq=False)
class Bucket:
    """Tensors of one type that are summed in one reduction."""

    tensors: list[Tensor]
    flat: Tensor | None = None
    work: Any = None

    def start(self, group: ProcessGroup) -> int:
        """Begin to sum; returns the bytes. A single tensor is summed where it lies, several in a copy."""
        alone = len(self.tensors) == 1 and self.tensors[0].is_contiguous()
        buffer = self.tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in self.tensors])
        self.flat = None if alone else buffer
        self.work = dist.all_reduce(buffer, group=group, async_op=True)
        return buffer.numel() * buffer.element_size()

    def finish(self) -> None:
        """Wait, and put the sums where they belong."""
        self.work.wait()
        if self.flat is not None:
            parts = self.flat.split([tensor.numel() for tensor in self.tensors])
            for tensor, part in zip(self.tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        self.flat = self.work = None


def in_buckets(tensors: Iterable[Tensor], limit: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Runs of neighbouring tensors of one type, each run of at most `limit` bytes or a single tensor."""
    runs: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if not runs or runs[-1][0].dtype != tensor.dtype or size + own > limit:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += own
    return runs


def sum_tensors(tensors: Sequence[Tensor], group: ProcessGroup) -> tuple[int, int]:
    """Sum tensors over a group in place. Returns (bytes, reductions)."""
    buckets = [Bucket(run) for run in in_buckets(tensors)]
    size = sum(bucket.start(group) for bucket in buckets)
    for bucket in buckets:
        bucket.finish()
    return size, len(buckets)


def width(parameter: Tensor, period: int) -> int:
    """Bytes of a number of its gradient, or where it collects for a period of its accumulator."""
    dtype = parameter.dtype if period == 1 else torch.promote_types(parameter.dtype, torch.float32)
    return dtype.itemsize


def check_traffic(
    step: Traffic,
    sizes: Mapping[str, int],
    periods: Mapping[str, int],
    due: Iterable[str],
    applied: bool,
    what: str = "reduced",
) -> None:
    """Compare a step's reductions, or gathers, with the schedule: each set that is due once and whole, every other not
    at all.

    Args:
        sizes: bytes of one of them, by set.
        what: has been done with them.

    Raises RuntimeError naming the set.
    """
    due = set(due)
    for name, period in periods.items():
        expected = sizes[name] if period == 1 or (name in due and applied) else 0
        if (found := step.bytes.get(name, 0)) != expected:
            raise RuntimeError(f"{name} (period {period}): {found} bytes were {what} at this step, not {expected}")


@dataclass(eq=False)
class _Part:
    """Parameters of one set whose gradients travel together."""

    name: str
    parameters: list[Tensor]
    waiting: set[Tensor]
    bucket: Bucket | None = None


class DataParallel:
    """Sums over the ranks of one data-parallel group.

    Call `begin` at the start of a step, `before_backward` before every backward and `finish` after the last; the
    optimizer's Ranks calls `reduce` at the boundaries of the slow sets.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Tensor]],
        periods: Mapping[str, int],
        group: ProcessGroup,
        late: Iterable[Tensor] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """
        Args:
            sets: parameters by set, in the model's order.
            periods: by set.
            late: parameters whose gradient is not complete at the end of backward: they are summed by `finish`.
            bucket_bytes: gradients of this size and less travel together.
        """
        self.group = group
        self.periods = dict(periods)
        self.sizes = {
            name: sum(p.numel() * width(p, periods[name]) for p in parameters) for name, parameters in sets.items()
        }
        """Bytes of one reduction of each set."""
        self.step = Traffic()
        """Since the last `begin`."""
        self.run = Traffic()
        """Since the beginning, what was summed for checkpoints included."""
        late = set(late)
        every_step = [(name, p) for name, parameters in sets.items() if periods[name] == 1 for p in parameters]
        early = [(name, p) for name, p in reversed(every_step) if p not in late]  # backward ends with the first ones
        self._parts = [
            _Part(name, run, set(run))
            for name in dict.fromkeys(name for name, _ in every_step)
            for chosen in ([p for n, p in early if n == name], [p for n, p in every_step if n == name and p in late])
            for run in in_buckets(chosen, bucket_bytes)
        ]
        place = {parameter: number for number, (_, parameter) in enumerate(early)}
        # One order for all ranks, whatever the order in which their gradients come: by the last gradient each needs.
        self._parts.sort(key=lambda part: max(place.get(parameter, len(place)) for parameter in part.parameters))
        self._armed, self._started = False, 0
        for number, part in enumerate(self._parts):
            for parameter in part.parameters:
                if parameter not in late:
                    parameter.register_post_accumulate_grad_hook(self._hook(number))

    def begin(self) -> None:
        """A step begins: its traffic is counted from here on."""
        self._started, self.step = 0, Traffic()

    def before_backward(self, last: bool) -> None:
        """A backward follows; `last`: the step's last one, in which gradients may travel as soon as they are there."""
        self._armed = last
        for part in self._parts if last else ():
            part.waiting = set(part.parameters)

    def finish(self) -> None:
        """Sum what has not been started yet, wait for everything, and put the sums into `.grad`."""
        self._armed = False
        for part in self._parts[self._started :]:
            self._start(part)
        for part in self._parts:
            if part.bucket is not None:
                part.bucket.finish()
                part.bucket = None

    def zero_grad(self) -> None:
        """The optimizer holds all gradients: nothing is left to drop."""

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """As `levels.ranks.Ranks.gradient`."""
        return parameter.grad

    def collects(self, parameter: Tensor) -> Tensor:
        """As `levels.ranks.Ranks.collects`."""
        return parameter

    def close_period(self, name: str, accumulators: Sequence[Tensor]) -> Sequence[Tensor]:
        """Sum what a slow set has collected, in place; returns it."""
        self.reduce(name, accumulators)
        return accumulators

    def changed(self, names: Iterable[str]) -> None:
        """Every rank has stepped all parameters: nothing to pass on."""

    def reduce(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Sum the accumulators of a set in place."""
        size, calls = sum_tensors(tensors, self.group)
        for traffic in (self.step, self.run):
            traffic.add(name, size, calls)

    def check(self, due: Iterable[str], applied: bool) -> None:
        """Compare a step's traffic with the schedule. Raises RuntimeError naming the set."""
        check_traffic(self.step, self.sizes, self.periods, due, applied)

    def _hook(self, number: int) -> Any:
        # A hook that held on to this object, which holds the parameter, would keep both and the group for ever: the
        # garbage collector does not see through a parameter's hooks.
        itself = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            if (data := itself()) is not None:
                data._arrived(number, parameter)

        return arrived

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if self._armed:
            self._parts[number].waiting.discard(parameter)
            while self._started < len(self._parts) and not self._parts[self._started].waiting:
                self._start(self._parts[self._started])
                self._started += 1

    def _start(self, part: _Part) -> None:
        # A parameter outside the graph has no gradient here and may have one elsewhere: sizes must agree all the same.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters]
        part.bucket = Bucket(grads)
        size = part.bucket.start(self.group)
        for traffic in (self.step, self.run):
            traffic.add(part.name, size)
