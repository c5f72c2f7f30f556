"""Speed and memory of Hope against its Transformer++ twin of equal parameters: `make bench`, one JSON line per row.

Every row is a process of its own with one thread; time is that thread's CPU time (machines are shared), the best of a
few repetitions of forward + backward + step of the level optimizer (AdamW, fused) in fp32. Peak memory is the resident
set's high-water mark after compilation and a first step, with and without what the idle process holds. Both sides run
compiled (`--eager`: neither does). Ratios compare rows of one run only. The twin's row at 16384 tokens has batch 1, all
others batch 4. `--no-cpu-products` leaves batched products to the library (see `hope_train.memory.cpu_products`).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

D_MODEL, LAYERS, HEADS, VOCABULARY = 256, 4, 4, 4096
TWIN_WIDTH, LEVEL_WIDTHS, PERIODS = 768, (176, 168, 168, 168), (1, 4, 16, 64)
BUDGET, SAVE_EVERY = 0.0, 1
"""The configuration that makes both the speed and the memory figures: train.compile_budget and memory.save_every."""

Row = dict[str, Any]


def model_config(arch: str, kind: str = "mlp") -> Any:
    """The configuration of one side."""
    from hope_train.config.load import validate
    from hope_train.config.model import ModelConfig

    tree: Row = {
        "arch": arch,
        "d_model": D_MODEL,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "vocab_size": VOCABULARY,
    }
    if arch == "transformer_pp":
        return validate(ModelConfig, tree | {"mlp_width": TWIN_WIDTH})
    levels = [{"width": w, "period": p} for w, p in zip(LEVEL_WIDTHS, PERIODS, strict=True)]
    return validate(ModelConfig, tree | {"cms": {"levels": levels}, "memory": {"kind": kind, "save_every": SAVE_EVERY}})


def run_config(model: Any, batch: int, tokens: int) -> Any:
    """A run around a model: the levels' periods and the optimizer come from it."""
    from hope_train.config.load import validate
    from hope_train.config.tree import RunConfig

    train = {"context_length": tokens, "batch_tokens": batch * tokens, "micro_batch_size": batch}
    tree = {"model": model.model_dump(mode="json"), "optimizer": {"fused": True, "lr": 1e-4}, "train": train}
    return validate(RunConfig, tree)


def measure(case: Row) -> Row:
    """Run one case in this process."""
    import torch

    from hope_train.levels.build import build_optimizer
    from hope_train.model.hope import build_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not case["cpu_products"]:
        from hope_train.memory import cpu_products

        cpu_products.wanted = lambda: False
    model = build_model(model_config(case["arch"], case.get("kind", "mlp")))
    if case["compiled"]:
        model.compile_blocks(BUDGET)
    batch, tokens = case["batch"], case["tokens"]
    step: Callable[[], None]
    if case["part"] == "mixer":
        mixer = model.blocks["0"].mixer
        if case["compiled"] and case["arch"] != "hope":
            mixer.compile()
        x_BTD = torch.randn(batch, tokens, D_MODEL, requires_grad=True)

        def step() -> None:
            mixer(x_BTD).square().mean().backward()

    else:
        optimizer = build_optimizer(model.named_parameters(), run_config(model.config, batch, tokens))
        data_BT = torch.randint(0, VOCABULARY, (batch, tokens + 1))

        def step() -> None:
            total, count = model.loss(data_BT[:, :-1], data_BT[:, 1:])
            (total / count).backward()
            optimizer.step(tokens=batch * tokens)
            optimizer.zero_grad()

    step()
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    idle = status_mib("VmRSS")
    reset_peak()
    best = float("inf")
    for _ in range(case["repeat"]):
        start = time.process_time()
        step()
        best = min(best, time.process_time() - start)
    peak = status_mib("VmHWM")
    return case | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_cpu_second": round(batch * tokens / best, 1),
        "peak_mib": round(peak),
        "activations_mib": round(peak - idle),
    }


def status_mib(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    """From here on VmHWM, the most memory this process has had, counts anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def run_case(case: Row) -> Row:
    """One case in a process of its own; a failure is a row too."""
    # The allocator keeps what is freed, as a device's does: else every step pays the kernel for the same pages again.
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | keep
    command = [sys.executable, "-m", "scripts.bench", "--case", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        return case | {"error": result.stderr.strip().splitlines()[-1][:300] if result.stderr else result.returncode}
    row: Row = json.loads(result.stdout.strip().splitlines()[-1])
    return row


def cases(compiled: bool, quick: bool, cpu_products: bool = True) -> dict[str, Row]:
    """All cases by name."""
    table: dict[str, Row] = {}
    for arch in ("transformer_pp", "hope"):
        # attention at 16384 tokens takes minutes for a batch of 4; its speed per token is that of a batch of 1
        longest = (16384, 4, 3) if arch == "hope" else (16384, 1, 2)
        for tokens, batch, repeat in ((512, 4, 10), (2048, 4, 3), longest):
            if quick and tokens > 512:
                continue
            table[f"{arch}/{tokens}"] = {
                "part": "step",
                "arch": arch,
                "tokens": tokens,
                "batch": batch,
                "repeat": repeat,
            }
    if not quick:
        table["hope/4096"] = {"part": "step", "arch": "hope", "tokens": 4096, "batch": 4, "repeat": 1}
    tokens = 512 if quick else 2048
    for name, arch, kind in (
        ("mixer/attention", "hope_attention", "mlp"),
        ("mixer/hope", "hope", "mlp"),
        ("mixer/hope-linear", "hope", "linear"),
    ):
        table[name] = {"part": "mixer", "arch": arch, "kind": kind, "tokens": tokens, "batch": 4, "repeat": 5}
    return {name: case | {"compiled": compiled, "cpu_products": cpu_products} for name, case in table.items()}


def bars(rows: dict[str, Row]) -> list[Row]:
    """What the rows come to, beside what is wanted."""
    result: list[Row] = []

    def ratio(name: str, above: str, below: str, key: str, wanted: float, at_least: bool = True) -> None:
        if key in rows.get(above, {}) and key in rows.get(below, {}):
            value = rows[above][key] / rows[below][key]
            met = value >= wanted if at_least else value <= wanted
            sign = ">=" if at_least else "<="
            result.append({"bar": name, "value": round(value, 3), "wanted": f"{sign} {wanted}", "met": met})

    speed = "tokens_per_cpu_second"
    ratio("hope / twin, tokens/s at 512", "hope/512", "transformer_pp/512", speed, 0.65)
    ratio("hope / twin, tokens/s at 2048", "hope/2048", "transformer_pp/2048", speed, 0.75)
    ratio("hope / twin, tokens/s at 16384", "hope/16384", "transformer_pp/16384", speed, 1.0)
    ratio("hope mixer / attention, forward + backward at 2048", "mixer/hope", "mixer/attention", speed, 0.35)
    ratio("linear-memory mixer / attention (no bar)", "mixer/hope-linear", "mixer/attention", speed, 0.0)
    ratio("hope, tokens/s at 2048 / at 512", "hope/2048", "hope/512", speed, 0.9)
    ratio("hope, tokens/s at 16384 / at 512", "hope/16384", "hope/512", speed, 0.9)
    ratio("hope / twin, peak memory at 2048", "hope/2048", "transformer_pp/2048", "peak_mib", 2.0, at_least=False)
    ratio("hope / twin, memory of one step at 2048", "hope/2048", "transformer_pp/2048", "activations_mib", 2.0, False)
    ratio(
        "hope, memory of one step at 4096 / at 2048", "hope/4096", "hope/2048", "activations_mib", 2.1, at_least=False
    )
    ratio("hope / twin, parameters", "hope/512", "transformer_pp/512", "parameters", 1.01, at_least=False)
    return result


def main() -> None:
    """Run all cases, print a line for each and for each bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eager", action="store_true", help="compile neither side")
    parser.add_argument("--quick", action="store_true", help="512 tokens only")
    parser.add_argument("--no-cpu-products", action="store_true", help="leave batched products to the library")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
        return
    rows: dict[str, Row] = {}
    for name, case in cases(not arguments.eager, arguments.quick, not arguments.no_cpu_products).items():
        if arguments.only and arguments.only not in name:
            continue
        rows[name] = run_case(case)
        print(json.dumps({"row": name} | rows[name]), flush=True)
    for bar in bars(rows):
        print(json.dumps(bar), flush=True)


if __name__ == "__main__":
    main()
