"""Bytes that data-parallel ranks reduce and gather, level by level, with periods and with all periods 1.

    python -m scripts.traffic configs/hope_1b3.yaml

Trains a model with the levels of the configuration (their widths in proportion, their periods) for a whole cycle of all
periods on real processes of this machine, once for each way of data parallelism, and once more with all periods 1.
Bytes by level are those that the engine books; that they are all there is is checked against what every call of the
communication library carried (`hope_train.parallel.counting`), and the script fails where the two differ.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hope_train.config.load import load_config, validate
from hope_train.config.tree import RunConfig

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DDP, 4 ranks": (4, {}),
    "FSDP2, 4 ranks, kept gathered": (4, {"dp_shard": 4, "keep_gathered": "always"}),
    "FSDP2, 4 ranks, not kept": (4, {"dp_shard": 4, "keep_gathered": "never"}),
    "HSDP 2 x 2, kept gathered": (4, {"dp_shard": 2, "keep_gathered": "always"}),
    "DDP 2, pipeline of 2 (1F1B)": (4, {"pp": 2}),
    "FSDP2 2, kept, pipeline of 2 (1F1B)": (4, {"pp": 2, "dp_shard": 2, "keep_gathered": "always"}),
}
WIDTH, CONTEXT, SCALE = 32, 16, 32
"""Of the small model; widths of levels are divided by SCALE."""


def small(config: RunConfig, periods: bool, parallel: Mapping[str, Any]) -> RunConfig:
    """A small model with the configuration's levels, and a run of one cycle of its periods."""
    levels = [
        {"width": max(4, level.width // SCALE), "period": level.period if periods else 1}
        for level in config.model.cms.levels
    ]
    batch = CONTEXT * 8
    tree = {
        "model": {
            "arch": "hope_attention",
            "d_model": WIDTH,
            "n_layers": 2,
            "n_heads": 2,
            "vocab_size": 64,
            "cms": {"levels": levels},
        },
        "train": {
            "context_length": CONTEXT,
            "batch_tokens": batch,
            "micro_batch_size": 2,
            "tokens": batch * math.lcm(*(level.period for level in config.model.cms.levels)),
            "device": "cpu",
        },
        "parallel": {"check_collectives": True, **parallel},
    }
    return validate(RunConfig, tree)


def rank_process(config: RunConfig, rank: int, ranks: int, port: int, out: str) -> None:
    """One rank of a run; writes what it has counted. Ends the process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import numpy as np
    import torch

    from data_pipelines.batches import Batch
    from hope_train.parallel.counting import CountCollectives
    from hope_train.parallel.engine import build_engine
    from hope_train.parallel.mesh import close_mesh, open_mesh

    torch.set_num_threads(1)
    engine = build_engine(config, open_mesh(config, torch.device("cpu")))
    assert engine.data is not None
    rows = config.train.batch_tokens // CONTEXT // engine.mesh.sizes.dp
    tokens = np.random.default_rng(rank).integers(0, 64, (rows, CONTEXT))
    gathered_before = dict(getattr(engine.data, "gathers", engine.data.run).bytes)
    with CountCollectives() as counter:
        for _ in range(config.train.total_steps):
            engine.forward_backward(Batch(tokens, tokens, None), config.train.batch_tokens, config.train)
            report = engine.optimizer.step(tokens=config.train.batch_tokens)
            assert report.applied
            engine.zero_grad()
            engine.check(report)
    reduced = dict(engine.data.run.bytes)
    gathered: dict[str, int] = {}
    if hasattr(engine.data, "gathers"):
        gathered = {n: b - gathered_before.get(n, 0) for n, b in engine.data.gathers.bytes.items()}
    booked = {"reduced": sum(reduced.values()), "gathered": sum(gathered.values())}
    heard = {
        "reduced": counter.bytes["all-reduce"] + counter.bytes["reduce-scatter"],
        "gathered": counter.bytes["all-gather"],
    }
    if booked != heard:
        raise RuntimeError(f"booked {booked}, and the communication library carried {heard}")
    Path(out).write_text(json.dumps({"reduced": reduced, "gathered": gathered, "steps": config.train.total_steps}))
    close_mesh()


def run(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Train on `ranks` processes; bytes of a whole cycle by set, summed over the ranks. Raises RuntimeError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        outs = [f"{folder}/{rank}" for rank in range(ranks)]
        processes = [
            context.Process(target=rank_process, args=(config, rank, ranks, port, outs[rank])) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        if any(process.exitcode != 0 for process in processes):
            for process in processes:
                process.kill()
            raise RuntimeError("a rank failed or hung")
        found = [json.loads(Path(out).read_text()) for out in outs]
    total: dict[str, Any] = {"steps": found[0]["steps"]}
    for kind in ("reduced", "gathered"):
        names = dict.fromkeys(name for part in found for name in part[kind])
        total[kind] = {name: sum(part[kind].get(name, 0) for part in found) for name in names}
    return total


def rows_of(config: RunConfig, chosen: Mapping[str, tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A row for each layout and set: bytes per step and rank, and their share of those with all periods 1."""
    for name, (ranks, parallel) in chosen.items():
        own, flat = (run(small(config, periods, parallel), ranks) for periods in (True, False))
        for kind in ("reduced", "gathered"):
            for part in (*own[kind], "all") if own[kind] else ():
                mine = sum(own[kind].values()) if part == "all" else own[kind][part]
                base = sum(flat[kind].values()) if part == "all" else flat[kind][part]
                yield {
                    "layout": name,
                    "kind": kind,
                    "set": part,
                    "bytes_per_step_and_rank": mine / own["steps"] / ranks,
                    "all_periods_1": base / own["steps"] / ranks,
                    "share": mine / base,
                }


def main(arguments: list[str] | None = None) -> int:
    """Print a table, or with --json a line per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    config = load_config(options.config, [])
    table = Table(title="bytes per step and rank, mean over a whole cycle")
    for column in ("layout", "kind", "set", "bytes", "all periods 1", "share"):
        table.add_column(column, justify="left" if column in ("layout", "kind", "set") else "right")
    for row in rows_of(config, {name: LAYOUTS[name] for name in options.layouts}):
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            numbers = (row["bytes_per_step_and_rank"], row["all_periods_1"])
            table.add_row(
                row["layout"], row["kind"], row["set"], *(f"{number:,.0f}" for number in numbers), f"{row['share']:.4f}"
            )
    if not options.json:
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
