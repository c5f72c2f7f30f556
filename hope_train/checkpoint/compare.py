"""In which tensors and counters two checkpoints differ, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hope_train.checkpoint.collected import ACCUMULATOR
from hope_train.checkpoint.manifest import Manifest
from hope_train.checkpoint.sets import accumulator_set
from hope_train.checkpoint.tensors import OPTIMIZER, entries, load_set

_AT_A_TIME = 256 * 2**20
"""Bytes of each checkpoint that are held in memory at once (one tensor at least)."""


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one name."""

    name: str
    kind: str
    """`values`, `shape` or `type`."""
    one: str
    """Shape and type in the first."""
    other: str
    """In the second."""
    different: int = 0
    """Elements that differ (kind `values`)."""
    max_abs: float = 0.0
    """Largest |a - b|; infinite where one is not finite and the other is another value."""
    max_rel: float = 0.0
    """Largest |a - b| / max(|a|, |b|)."""


@dataclass
class Comparison:
    """Everything in which two checkpoints differ."""

    equal: int = 0
    """Tensors that are the same, bit for bit up to the sign of zero."""
    tensors: list[TensorDifference] = field(default_factory=list)
    only_in_one: list[str] = field(default_factory=list)
    only_in_other: list[str] = field(default_factory=list)
    counters: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Those that differ: `step`, `tokens`, `level_1.updates`, …; None where one has none."""

    @property
    def same(self) -> bool:
        """Whether nothing differs at all."""
        return not (self.tensors or self.only_in_one or self.only_in_other or self.counters)


@dataclass(frozen=True)
class _Entry:
    place: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    counter: bool
    rows: int | None = None
    """Of a stacked accumulator."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape without the rows."""
        return self.shape if self.rows is None else self.shape[1:]

    @property
    def shown(self) -> str:
        return f"{list(self.whole)} {str(self.dtype).removeprefix('torch.')}"

    def summed(self, tensor: Tensor) -> Tensor:
        """What all ranks have collected together."""
        return tensor if self.rows is None else tensor.sum(0)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def compare(one: tuple[Path, Manifest], other: tuple[Path, Manifest], weights_only: bool = False) -> Comparison:
    """Compare two verified checkpoints tensor by tensor, a part at a time. Raises UserError for a set that is no set.

    Names are those of the unsharded model; which files a tensor lies in does not matter. Accumulators that are stacked
    by as many ranks in both are compared row by row, others by what all ranks have collected together.

    weights_only: leave out the optimizer's state and the counters.
    """
    mine, theirs = _entries(*one, weights_only), _entries(*other, weights_only)
    found = Comparison()
    counted = dict.fromkeys(name for part in (mine, theirs) for name, entry in part.items() if entry.counter)
    found.only_in_one = [name for name in mine if name not in theirs and name not in counted]
    found.only_in_other = [name for name in theirs if name not in mine and name not in counted]
    common = []
    for name, entry in mine.items():
        if name in counted or name not in theirs:
            continue
        if entry.whole != theirs[name].whole or entry.dtype != theirs[name].dtype:
            kind = "shape" if entry.whole != theirs[name].whole else "type"
            found.tensors.append(TensorDifference(name, kind, entry.shown, theirs[name].shown))
        else:
            common.append(name)
    for names in _portions(common, mine):
        left, right = _load(mine, names), _load(theirs, names)
        for name in names:
            pair = left[name], right[name]
            if mine[name].rows != theirs[name].rows:
                pair = mine[name].summed(pair[0]), theirs[name].summed(pair[1])
            different, max_abs, max_rel = difference(*pair)
            if different:
                shown = mine[name].shown
                found.tensors.append(TensorDifference(name, "values", shown, shown, different, max_abs, max_rel))
            else:
                found.equal += 1
    if weights_only:
        return found
    left, right = _load(mine, [n for n in counted if n in mine]), _load(theirs, [n for n in counted if n in theirs])
    pairs: dict[str, tuple[int | None, int | None]] = {
        "step": (one[1].step, other[1].step),
        "tokens": (one[1].tokens, other[1].tokens),
    }
    for name in counted:
        pairs[name] = (int(left[name]) if name in left else None, int(right[name]) if name in right else None)
    found.counters = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return found


def difference(one: Tensor, other: Tensor) -> tuple[int, float, float]:
    """Elements that differ, the largest absolute and the largest relative difference of two tensors of one shape.

    NaN equals NaN. What is not finite and not equal differs by infinity.
    """
    same = (one == other) | ((one != one) & (other != other))
    if bool(same.all()):
        return 0, 0.0, 0.0
    left, right = one[~same].double(), other[~same].double()
    gap = (left - right).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    scale = torch.maximum(left.abs(), right.abs())
    # infinity / infinity is infinitely different here
    relative = (gap / scale).nan_to_num(nan=math.inf, posinf=math.inf)
    return left.numel(), float(gap.max()), float(relative.max())


def _entries(folder: Path, manifest: Manifest, weights_only: bool) -> dict[str, _Entry]:
    """By name, in the order of the sets; a counter's name has its set in front (`level_1.updates`)."""
    found = {}
    for set_name in manifest.sets:
        place = manifest.set_folder(folder, set_name)
        level = set_name.removesuffix(accumulator_set(""))
        for key, (shape, dtype) in sorted(entries(place).items()):
            if weights_only and key.startswith(OPTIMIZER):
                continue
            counter = key.startswith(OPTIMIZER) and "." not in key.removeprefix(OPTIMIZER)
            name = f"{level}.{key.removeprefix(OPTIMIZER)}" if counter else key
            rows = manifest.sets[set_name].rows if key.startswith(ACCUMULATOR) else None
            found[name] = _Entry(place, key, shape, dtype, counter, rows)
    return found


def _portions(names: list[str], sizes: dict[str, _Entry]) -> Iterator[list[str]]:
    portion: list[str] = []
    held = 0
    for name in names:
        if portion and held + sizes[name].bytes > _AT_A_TIME:
            yield portion
            portion, held = [], 0
        portion.append(name)
        held += sizes[name].bytes
    if portion:
        yield portion


def _load(where: dict[str, _Entry], names: list[str]) -> dict[str, Tensor]:
    by_place: dict[Path, dict[str, Tensor]] = {}
    found = {}
    for name in names:
        entry = where[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        by_place.setdefault(entry.place, {})[entry.key] = tensor
        found[name] = tensor
    for place, tensors in by_place.items():
        load_set(place, tensors)
    return found
