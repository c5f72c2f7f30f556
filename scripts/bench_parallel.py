"""What parallelism costs: `make bench-parallel`, one JSON line per row, then one per bar.

    python -m scripts.bench_parallel
    python -m scripts.bench_parallel --only communication --steps 20

* `overhead`: a step on ONE rank against the plain engine of one process, for each row of `OVERHEADS`: as a launcher of
  one rank starts it, and with what several ranks need made to work among the one (process group, device mesh, divided
  vocabulary, exchanges in the model, reductions by level, norms and decisions over the ranks). `as launched` is twice
  the same, and so says how exact the others are.
* `communication`: the share of a step's time that rank 0 spends in exchanges, and waiting for the other ranks in them,
  for each layout in `LAYOUTS`. Processes on one machine: what a network would add is not in it.
* `engine`: a step's time and peak memory under this project's engine and under DeepSpeed, on the same ranks.
* `sharded save and load`: a state of --gib, sharded over two ranks, through CheckpointWriter and load_state, against
  copies of the same files on the same disk (written and flushed; read from a warm cache on both sides).
* `background save`: how long a save in the background keeps training waiting, against one that is waited for
  (`scripts/checkpoint_bytes.py --blocking` has the details).

Ratios compare what was measured in one run only.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.bench_engines import ENGINES, engine_row
from scripts.bench_overhead import OVERHEADS, joined, overhead

Row = dict[str, Any]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2": (2, {"tp": 2}),
    "tp 2, all tokens on every rank": (2, {"tp": 2, "sequence_parallel": False}),
    "dp 2": (2, {}),
    "FSDP2 2": (2, {"dp_shard": 2}),
}
"""Rows of `communication`: ranks, and the section `parallel` (what it leaves over is data parallelism)."""

BARS = {"overhead": 0.03, "background save": 0.05}
"""The largest share that is wanted."""

OVERHEAD_PROCESSES = 4
"""Among which the steps of a row `overhead` are divided; in every second one the plain engine's memory comes second."""

TIMEOUT = 480.0
"""Seconds after which a process shows its stacks and ends."""


def run_config(parallel: dict[str, Any]) -> Any:
    """A Hope of 5.5M parameters, four sequences of 512 tokens in two micro-batches, periods 1/4/16/64."""
    from hope_train.config.load import validate
    from hope_train.config.tree import RunConfig

    levels = [{"width": 168, "period": period} for period in (1, 4, 16, 64)]
    tree = {
        "model": {
            "arch": "hope",
            "d_model": 256,
            "n_layers": 4,
            "n_heads": 4,
            "vocab_size": 4096,
            "cms": {"levels": levels},
        },
        "train": {"context_length": 512, "batch_tokens": 2048, "micro_batch_size": 2, "device": "cpu", "tokens": 10**6},
        "optimizer": {"fused": True},
        "parallel": parallel,
    }
    return validate(RunConfig, tree)


class Source:
    """Random tokens."""

    def __init__(self) -> None:
        from hope_train.config.batches import BatchSizes

        self.sizes = BatchSizes.constant(4)

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Any:
        """This rank's rows of batch `index`."""
        import numpy as np

        from data_pipelines.batches import Batch

        tokens = np.random.default_rng(index).integers(0, 4096, (4, 513))
        share = 4 // ranks
        tokens = tokens[rank * share : (rank + 1) * share]
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None)

    def window_numbers(self, first: int, count: int) -> Any:
        """As many numbers."""
        import numpy as np

        return np.arange(first, first + count)


# Communication


class Clock:
    """Time inside exchanges, from outside: every function of torch.distributed that this project calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._inside = False

    def install(self) -> None:
        """Time all exchanges from now on."""
        import torch.distributed as dist

        from hope_train.parallel import collectives

        names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_object", "broadcast")
        for owner, wanted in ((dist, names), (collectives, ("all_gather", "reduce_scatter"))):
            for name in wanted:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            with self._running():
                work = function(*arguments, **options)
            return Waiting(work, self) if options.get("async_op") else work

        return timed

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._inside, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.seconds += time.perf_counter() - start
            self.calls += 1


class Waiting:
    """An exchange under way: waiting for it counts."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self.work, self.clock = work, clock

    def wait(self) -> None:
        """As the work's own."""
        with self.clock._running():
            self.work.wait()


def communication(layout: str, steps: int) -> Row:
    """The row of a layout, in one of its ranks."""
    import torch

    from hope_train.parallel.engine import build_engine
    from hope_train.parallel.mesh import open_mesh
    from hope_train.train.step import optimizer_step

    _, parallel = LAYOUTS[layout]
    config, source = run_config(parallel), Source()
    if config.parallel.pp == 1:
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 1})})
    engine = build_engine(config, open_mesh(config, torch.device("cpu")))
    clock = Clock()
    clock.install()
    shares, seconds = [], []
    for index in range(steps + 2):
        clock.seconds, clock.calls, start = 0.0, 0, time.perf_counter()
        optimizer_step(engine, source, config.train, index, measure=False)  # type: ignore[arg-type]
        if index >= 2:
            seconds.append(time.perf_counter() - start)
            shares.append(clock.seconds / seconds[-1])
    return {
        "row": "communication",
        "layout": layout,
        "steps": steps,
        "step_s": statistics.median(seconds),
        "exchanges": clock.calls,
        "share": statistics.median(shares),
    }


def engine_config(name: str) -> Any:
    """Of a row of `ENGINES`: micro-batches of one sequence, so that data-parallel ranks have two."""
    config = run_config(ENGINES[name][1])
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 1})})


# Checkpoints


def sharded(gib: float, place: str, repeats: int) -> Row:
    """The row of the sharded checkpoint, in one of two ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from hope_train.checkpoint.fence import Fence
    from hope_train.checkpoint.manifest import verify
    from hope_train.checkpoint.store import load_state
    from hope_train.checkpoint.writer import CheckpointWriter, Facts

    rank, ranks, folder = dist.get_rank(), dist.get_world_size(), Path(place)
    mesh = init_device_mesh("cpu", (ranks,))
    tensors, width = 64, 1024
    rows = max(1, int(gib * 2**30) // (tensors * width * 4 * ranks))
    state: Any = {
        "core": {
            f"blocks.{number}.weight": DTensor.from_local(torch.randn(rows, width), mesh, [Shard(0)], run_check=False)
            for number in range(tensors)
        }
    }
    ids = [Fence.take(folder).id if rank == 0 else None]
    dist.broadcast_object_list(ids)
    writer = CheckpointWriter(Fence(folder, str(ids[0])), keep_last=1, tell=lambda line: None)
    size = tensors * rows * width * 4 * ranks
    found: dict[str, list[float]] = {"save": [], "copy": [], "verify": [], "load": [], "read": []}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        dist.barrier()
        start = time.perf_counter()
        yield
        dist.barrier()
        found[name].append(time.perf_counter() - start)

    for step in range(1, repeats + 2):
        with timed("save"):
            writer.save(state, Facts(step, 0, {}, "", {}))
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        files = sorted(path for path in checkpoint.rglob("*.distcp"))
        mine = files[rank::ranks]  # the copy has as many hands as the save
        with timed("copy"):
            for number, file in enumerate(mine):
                copy = folder / f"copy_{rank}_{number}"
                shutil.copyfile(file, copy)
                with copy.open("rb") as stream:
                    os.fsync(stream.fileno())
        with timed("verify"):
            manifest = verify(checkpoint) if rank == 0 else None
        box = [manifest]
        dist.broadcast_object_list(box)
        assert box[0] is not None
        with timed("load"):
            load_state(checkpoint, box[0], state, writer.group)
        with timed("read"):
            for file in mine:
                buffer = bytearray(file.stat().st_size)
                with file.open("rb") as stream:
                    stream.readinto(buffer)
        for number in range(len(mine)):
            (folder / f"copy_{rank}_{number}").unlink()
    speed = {name: size / 2**20 / statistics.median(values[1:]) for name, values in found.items()}
    return {
        "row": "sharded save and load",
        "ranks": ranks,
        "mib": size / 2**20,
        **{f"{name}_mib_per_s": round(value, 1) for name, value in speed.items()},
        "save_share_of_copy": speed["save"] / speed["copy"],
        "load_share_of_read": speed["load"] / speed["read"],
    }


def background(gib: float, folder: Path, repeats: int) -> Row:
    """The row of saves in the background."""
    from hope_train.config.load import load_config
    from scripts.checkpoint_bytes import Sizes, measure_blocking

    sizes = Sizes.of(load_config(Path(__file__).parents[1] / "configs" / "hope_1b3.yaml").model)
    found = measure_blocking(sizes.scaled(int(gib * 2**30)), folder, repeats)
    return {
        "row": "background save",
        "mib": found.state_bytes / 2**20,
        "waiting_s": found.waiting,
        "background_s": found.background,
        "share": found.share,
    }


# Processes


@contextmanager
def process_group(rank: int, ranks: int, store: str = "") -> Iterator[None]:
    """Join the other ranks."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        place = store or f"{folder}/store"
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=ranks)
        try:
            yield
        finally:
            dist.destroy_process_group()


def spread(ranks: int, case: Row) -> Row:
    """Run a case in as many processes; the row of rank 0, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
            command = [
                sys.executable,
                "-m",
                "scripts.bench_parallel",
                "--case",
                json.dumps(case | {"store": f"{folder}/s"}),
            ]
            process = subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            processes.append(process)
        outputs = [process.communicate() for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        if process.returncode:
            lines = error.strip().splitlines()
            return {**case, "error": lines[-1][:300] if lines else f"exit code {process.returncode}"}
    row: Row = json.loads(outputs[0][0].strip().splitlines()[-1])
    return row


def overhead_row(case: Row) -> Row:
    """The row `overhead` of one kind, from its processes, one after the other."""
    return joined([spread(1, case | {"plain_first": number % 2 == 0}) for number in range(OVERHEAD_PROCESSES)])


def run_case(case: Row) -> Row:
    """A case in one of its processes."""
    import torch

    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if case["row"] == "overhead":
        with process_group(0, 1):
            return overhead(case["kind"], run_config({}), Source(), case["steps"], case["plain_first"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with process_group(rank, ranks, case["store"]):
        if case["row"] == "communication":
            return communication(case["layout"], case["steps"])
        if case["row"] == "engine":
            return engine_row(case["engine"], engine_config(case["engine"]), Source(), case["steps"])
        return sharded(case["gib"], case["dir"], case["repeats"])


def bars(rows: list[Row]) -> list[Row]:
    """What the rows come to, beside what is wanted."""
    return [
        {
            "bar": " ".join(str(row[key]) for key in ("row", "kind") if key in row),
            "value": round(row["share"], 4),
            "wanted": f"<= {BARS[row['row']]}",
            "met": row["share"] <= BARS[row["row"]],
        }
        for row in rows
        if row["row"] in BARS and "share" in row
    ]


def main(arguments: list[str]) -> int:
    """Run all cases, print a line for each and for each bar. Returns 1 if one could not be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--gib", type=float, default=1.0, help="size of what is saved (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="saves that are timed (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.case:
        print(json.dumps(run_case(json.loads(chosen.case))))
        return 0
    rows: list[Row] = []

    def show(name: str, make: Callable[[], Row]) -> None:
        if chosen.only is None or chosen.only in name:
            rows.append(make())
            print(
                json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}), flush=True
            )

    for kind in OVERHEADS:
        case = {"row": "overhead", "kind": kind, "steps": max(chosen.steps // OVERHEAD_PROCESSES, 1)}
        show(f"overhead {kind}", lambda case=case: overhead_row(case))  # type: ignore[misc]
    for layout, (ranks, _) in LAYOUTS.items():
        case = {"row": "communication", "layout": layout, "steps": chosen.steps}
        show(f"communication {layout}", lambda case=case, ranks=ranks: spread(ranks, case))  # type: ignore[misc]
    for engine, (ranks, _) in ENGINES.items():
        case = {"row": "engine", "engine": engine, "steps": chosen.steps}
        show(f"engine {engine}", lambda case=case, ranks=ranks: spread(ranks, case))  # type: ignore[misc]
    with tempfile.TemporaryDirectory(dir=chosen.dir, prefix="bench-parallel-") as place:
        case = {"row": "sharded save and load", "gib": chosen.gib, "dir": place, "repeats": chosen.repeats}
        show("sharded save and load", lambda: spread(2, case))
        show("background save", lambda: background(chosen.gib, Path(place), chosen.repeats))
    for bar in bars(rows):
        print(json.dumps(bar), flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
