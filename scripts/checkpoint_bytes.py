"""What saving levels at their own frequencies spares, and for how long a save stops training.

    python -m scripts.checkpoint_bytes configs/hope_1b3.yaml
    python -m scripts.checkpoint_bytes configs/hope_1b3.yaml --blocking

The first writes checkpoints with `CheckpointWriter`, of a state with the sets of the configuration's model (weights and
two moments, and accumulators of what is in mid-period) scaled down to --mib, over whole cycles: until save interval
and periods meet again. Bytes are those of the files. Two ways are compared: `all`, which writes every level at every
save, and `own`, the default. The second measures, for a state of --gib, how long `save` keeps the caller when it
waits, and when it writes in the background, and checks that what training does meanwhile is not in the checkpoint.

Both write into a new folder below --dir (default: the system's folder for temporary files) and remove it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hope_train.checkpoint.fence import Fence
from hope_train.checkpoint.manifest import ShardSet, verify
from hope_train.checkpoint.sets import contents_at, is_accumulator_set, plan_save
from hope_train.checkpoint.store import load_state
from hope_train.checkpoint.tensors import State
from hope_train.checkpoint.writer import CheckpointWriter, Facts
from hope_train.config.load import load_config
from hope_train.config.model import ModelConfig
from hope_train.errors import UserError
from hope_train.plan.parameters import level_counts, parameter_count

EVERY = (4, 16, 64, 1000, 1024)
WEIGHTS = 12
"""Bytes per parameter of a set: fp32 weights and two moments."""
COLLECTED = 4
"""Bytes per parameter of an accumulator."""


@dataclass(frozen=True)
class Sizes:
    """Parameters and period of each set: `core`, `level_0`, …"""

    parameters: dict[str, int]
    periods: dict[str, int]

    @classmethod
    def of(cls, model: ModelConfig) -> Sizes:
        """Those of a model."""
        levels = level_counts(model)
        parameters = {"core": parameter_count(model) - sum(levels.values())}
        parameters |= {f"level_{level}": count for level, count in levels.items()}
        periods = {"core": 1, **{f"level_{place}": level.period for place, level in enumerate(model.cms.levels)}}
        return cls(parameters, periods)

    @property
    def bytes(self) -> int:
        """Of weights and moments."""
        return WEIGHTS * sum(self.parameters.values())

    def scaled(self, target: int) -> Sizes:
        """The same proportions in about `target` bytes."""
        factor = target / self.bytes
        return Sizes({name: max(1, round(count * factor)) for name, count in self.parameters.items()}, self.periods)

    def state(self, step: int) -> State:
        """What a run holds after `step` steps: the counters are right, the values are not looked at."""
        state: State = {}
        for name, count in self.parameters.items():
            period, prefix = self.periods[name], "" if name == "core" else f"blocks.0.cms.levels.{name[6:]}."
            part = state[name] = {f"{prefix}{key}weight": torch.randn(count) for key in ("", *_MOMENTS)}
            part |= _counter("updates", step // period) | _counter("tokens", step % period)
            if period > 1:
                part[f"optimizer.accumulator.{prefix}weight"] = torch.randn(count)
        return state

    def advance(self, state: State, step: int) -> None:
        """Set the counters to those after `step` steps."""
        for name, part in state.items():
            part |= _counter("updates", step // self.periods[name]) | _counter("tokens", step % self.periods[name])


_MOMENTS = ("optimizer.exp_avg.", "optimizer.exp_avg_sq.")


def _counter(name: str, value: int) -> dict[str, torch.Tensor]:
    return {f"optimizer.{name}": torch.tensor(value, dtype=torch.int64)}


@dataclass(frozen=True)
class Row:
    """One save interval, over whole cycles."""

    every: int
    saves: int
    all_bytes: int
    """Written when every save writes every level."""
    own_bytes: int
    """Written when a level is written only if it changed."""
    accumulator_bytes: int
    """Of either: what levels in mid-period have collected."""
    share: float
    """own / all"""
    predicted: float
    """The same, from parameters and periods alone."""
    all_seconds: float
    """A save, waited for: the mean."""
    own_seconds: float


def predicted_share(every: int, sizes: Sizes) -> float:
    """own / all over whole cycles, counted from periods and parameters (no overhead of files)."""
    own = full = 0
    last = contents_at(0, sizes.periods)
    for step in steps_of_a_cycle(every, sizes.periods):
        now = contents_at(step, sizes.periods)
        full += sum(_bytes(name, sizes) for name in now)
        own += sum(_bytes(name, sizes) for name in plan_save(now, last).write)
        last = now
    return own / full


def _bytes(name: str, sizes: Sizes) -> int:
    if is_accumulator_set(name):
        return COLLECTED * sizes.parameters[name.removesuffix("_accumulator")]
    return WEIGHTS * sizes.parameters[name]


def steps_of_a_cycle(every: int, periods: Mapping[str, int]) -> range:
    """The steps of the saves, from one common multiple of interval and periods (left out) to the next."""
    return range(every, math.lcm(every, *periods.values()) + 1, every)


def measure(every: int, sizes: Sizes, folder: Path) -> Row:
    """Save over whole cycles, both ways."""
    steps = steps_of_a_cycle(every, sizes.periods)
    state = sizes.state(0)
    written = {"all": 0, "own": 0}
    seconds: dict[str, list[float]] = {"all": [], "own": []}
    collected = 0
    for levels in ("all", "own"):
        with writing(folder, levels=levels) as writer:
            for step in (0, *steps):
                sizes.advance(state, step)
                begun = time.perf_counter()
                writer.save(state, Facts(step, step, {}, "", {}))
                if step == 0:  # what the cycle begins with
                    continue
                seconds[levels].append(time.perf_counter() - begun)
                assert writer.last is not None
                manifest = verify(writer.last)
                new = {name: part for name, part in manifest.sets.items() if part.step == step}
                written[levels] += sum(_size(part) for part in new.values())
                if levels == "own":
                    collected += sum(_size(part) for name, part in new.items() if is_accumulator_set(name))
    return Row(
        every=every,
        saves=len(steps),
        all_bytes=written["all"],
        own_bytes=written["own"],
        accumulator_bytes=collected,
        share=written["own"] / written["all"],
        predicted=predicted_share(every, sizes),
        all_seconds=statistics.fmean(seconds["all"]),
        own_seconds=statistics.fmean(seconds["own"]),
    )


def _size(part: ShardSet) -> int:
    return sum(record.bytes for record in part.files.values())


@contextmanager
def writing(folder: Path, **options: object) -> Iterator[CheckpointWriter]:
    """A writer into a run directory of its own below `folder`, which is removed at the end."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-bytes-") as place:
        writer = CheckpointWriter(Fence.take(Path(place)), 1, tell=lambda line: None, **options)  # type: ignore[arg-type]
        yield writer
        writer.finish()


@dataclass(frozen=True)
class Blocking:
    """How long `save` keeps its caller, in seconds; medians."""

    state_bytes: int
    waiting: float
    """`save` that waits until the checkpoint is published."""
    background: float
    """`save` that copies the state and returns."""
    background_first: float
    """The first one, where the memory was not reserved at the start."""
    share: float
    """background / waiting"""


def measure_blocking(sizes: Sizes, folder: Path, repeats: int) -> Blocking:
    """Saves that wait and saves in the background in turn, of everything there is (every level changed, in mid-period).

    Raises AssertionError if a checkpoint written in the background holds anything of a later step.
    """
    state = sizes.state(0)
    # One step before the end of every period there is most to write; levels=all writes it each time.
    number = math.lcm(*sizes.periods.values()) - 1
    waiting, background = [], []
    with writing(folder, async_save=True, levels="all") as writer:
        writer.save(state, Facts(1, 0, {}, "", {}))  # the first use of libraries and disk is nobody's
        begun = time.perf_counter()
        writer.save(state, Facts(2, 0, {}, "", {}), wait=False)
        first = time.perf_counter() - begun
        for step in range(3, 3 + 2 * repeats, 2):
            sizes.advance(state, number)
            begun = time.perf_counter()
            writer.save(state, Facts(step, 0, {}, "", {}), wait=True)
            # Waiting for the save before is not part of either.
            waiting.append(time.perf_counter() - begun)
            marker = float(step)
            for part in state.values():
                for tensor in part.values():
                    if tensor.ndim:
                        tensor[-1] = marker
            begun = time.perf_counter()
            writer.save(state, Facts(step + 1, 0, {}, "", {}), wait=False)
            background.append(time.perf_counter() - begun)
            for part in state.values():
                for tensor in part.values():
                    if tensor.ndim:
                        tensor[-1] = -1.0  # the next step, while it is written
            writer.finish()
            _holds(writer, state, marker)
    return Blocking(
        state_bytes=sum(tensor.nbytes for part in state.values() for tensor in part.values()),
        waiting=statistics.median(waiting),
        background=statistics.median(background),
        background_first=first,
        share=statistics.median(background) / statistics.median(waiting),
    )


def _holds(writer: CheckpointWriter, state: State, marker: float) -> None:
    """The newest checkpoint is of the moment at which it was saved."""
    assert writer.last is not None
    loaded = {name: {key: torch.empty_like(tensor) for key, tensor in part.items()} for name, part in state.items()}
    load_state(writer.last, verify(writer.last), loaded)
    for part in loaded.values():
        for name, tensor in part.items():
            if tensor.ndim and float(tensor[-1]) != marker:
                raise AssertionError(f"{name} holds {float(tensor[-1])} of another moment instead of {marker}")


def table_of(rows: Sequence[Row], title: str) -> Table:
    """For people."""
    table = Table(title=title, title_justify="left")
    for column in ("save every", "saves", "all, MiB", "own, MiB", "of it accumulators", "own / all", "predicted"):
        table.add_column(column, justify="right")
    table.add_column("s per save, all", justify="right")
    table.add_column("own", justify="right")
    for row in rows:
        table.add_row(
            f"{row.every}",
            f"{row.saves}",
            f"{row.all_bytes / 2**20:,.1f}",
            f"{row.own_bytes / 2**20:,.1f}",
            f"{row.accumulator_bytes / 2**20:,.1f}",
            f"{row.share:.3f}",
            f"{row.predicted:.3f}",
            f"{row.all_seconds:.2f}",
            f"{row.own_seconds:.2f}",
        )
    return table


def main(arguments: Sequence[str]) -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="whose sets and periods")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--every", type=int, nargs="+", default=list(EVERY), help="save intervals in steps")
    parser.add_argument("--mib", type=float, default=32.0, help="size of weights and moments (default: %(default)s)")
    parser.add_argument("--blocking", action="store_true", help="measure how long a save keeps training waiting")
    parser.add_argument("--gib", type=float, default=1.0, help="with --blocking: size of the state")
    parser.add_argument("--repeats", type=int, default=3, help="with --blocking: saves of each kind")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        sizes = Sizes.of(load_config(chosen.config, chosen.overrides).model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.blocking:
        found = measure_blocking(sizes.scaled(int(chosen.gib * 2**30)), chosen.dir, chosen.repeats)
        if chosen.json:
            print(json.dumps(asdict(found)))
        else:
            print(
                f"{found.state_bytes / 2**30:.2f} GiB: a save keeps training waiting for {found.waiting:.2f} s, in the "
                f"background for {found.background:.3f} s ({found.share:.1%}); the first one for "
                f"{found.background_first:.3f} s where its memory was not reserved at the start"
            )
        return 0
    small = sizes.scaled(int(chosen.mib * 2**20))
    rows = [measure(every, small, chosen.dir) for every in chosen.every]
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        periods = "/".join(str(period) for name, period in sizes.periods.items() if name != "core")
        Console(width=max(120, Console().width)).print(table_of(rows, f"{chosen.config}, periods {periods}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
