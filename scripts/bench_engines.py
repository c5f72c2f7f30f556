"""Rows `engine` of `make bench-parallel`: a step's time and memory under both engines, on the same ranks and model."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from scripts.bench import reset_peak, status_mib

Row = dict[str, Any]

NOTHING_KEPT = str(Path(__file__).with_name("nothing_kept.json"))
"""DeepSpeed's stage 3 keeps what is small: by default it gathers nothing of this model in a step. With this file it
gathers every parameter around its use, as FSDP2 does."""

ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "native, dp 2": (2, {}),
    "native, FSDP2 2": (2, {"dp_shard": 2}),
    "deepspeed stage 1, dp 2": (2, {"engine": "deepspeed", "deepspeed": {"stage": 1}}),
    "deepspeed stage 2, dp 2": (2, {"engine": "deepspeed", "deepspeed": {"stage": 2}}),
    "deepspeed stage 3, dp 2": (2, {"engine": "deepspeed", "deepspeed": {"stage": 3}}),
    "deepspeed stage 3, nothing kept, dp 2": (
        2,
        {"engine": "deepspeed", "deepspeed": {"stage": 3, "config": NOTHING_KEPT}},
    ),
    "native, tp 2": (2, {"tp": 2, "sequence_parallel": False}),
    "deepspeed stage 1, tp 2": (2, {"engine": "deepspeed", "deepspeed": {"stage": 1}, "tp": 2}),
}
"""Ranks, and the section `parallel` (what it leaves over is data parallelism)."""


def engine_row(name: str, config: Any, source: Any, steps: int) -> Row:
    """The row of an engine, in one of its ranks.

    Memory is that of rank 0's process. What it had before the engine was built, the libraries' code for the most part,
    is beside the peak, since DeepSpeed's is larger.
    """
    import torch

    from hope_train.parallel.engines import build_engine, check_engine
    from hope_train.parallel.mesh import open_mesh
    from hope_train.train.step import optimizer_step

    mesh = open_mesh(config, torch.device("cpu"))
    check_engine(config, mesh.sizes)
    if config.parallel.engine == "deepspeed":
        from hope_train.parallel.zero.engine import open_deepspeed

        open_deepspeed(mesh)
    before = status_mib("VmHWM")
    engine = build_engine(config, mesh)
    seconds = []
    for index in range(steps + 2):
        start = time.perf_counter()
        optimizer_step(engine, source, config.train, index, measure=False)
        if index >= 2:  # the first ones allocate
            seconds.append(time.perf_counter() - start)
        else:
            reset_peak()
    return {
        "row": "engine",
        "engine": name,
        "steps": steps,
        "step_s": statistics.median(seconds),
        "peak_mib": status_mib("VmHWM"),
        "libraries_mib": before,
    }
