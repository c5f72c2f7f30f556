"""Step time and state of every update rule on hope_small's shapes: `make bench-optim`, one JSON line per row.

Parameters and gradients are random tensors of the shapes of configs/hope_small.yaml, all periods 1, so that every step
steps everything. A row is the CPU time of one step of the level optimizer (one thread, no clipping), fastest block of a
few; a block is ten steps, M3's slow period, so that its slow momentum counts with its share. AdamW's rows are blocks of
as many. `torch-muon` is torch.optim.Muon on the same matrices, AdamW on the rest, without levels. Ratios at the
end compare rows of this run. `--device cuda` measures on a GPU, there in wall time.

Delta gradient descent works in backward: `backward` rows are forward + backward of one 384 x 384 linear layer on 4096
inputs, with and without its hook.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hope_train.config.load import load_config
from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from hope_train.optim.dgd import DeltaLayer
from hope_train.optim.kinds import kind_of
from hope_train.plan.parameters import parameter_shapes

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "hope_small.yaml"
STEPS = 10
"""In a block: M3's slow period."""

RULES: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "adamw-fused": ("optimizer.fused=true",),
    "sgd": ("optimizer.name=sgd",),
    "muon": ("optimizer.name=muon",),
    "muon-bf16": ("optimizer.name=muon", "optimizer.newton_schulz.dtype=bf16"),
    "m3": ("optimizer.name=m3", f"optimizer.m3.slow_period={STEPS}"),
    "delta_momentum": ("optimizer.name=delta_momentum",),
    "delta_momentum-linear": ("optimizer.name=delta_momentum", "optimizer.delta_momentum.output=linear"),
    "deep_momentum": ("optimizer.name=deep_momentum",),
    "deep_momentum-linear": ("optimizer.name=deep_momentum", "optimizer.deep_momentum.output=linear"),
    "dgd": ("optimizer.name=dgd",),
}
Row = dict[str, Any]


def run_config(overrides: Sequence[str]) -> RunConfig:
    """hope_small with all periods 1 and no clipping."""
    config = load_config(CONFIG, ["train.clip_norm=null", *overrides])
    levels = tuple(level.model_copy(update={"period": 1}) for level in config.model.cms.levels)
    cms = config.model.cms.model_copy(update={"levels": levels})
    return config.model_copy(update={"model": config.model.model_copy(update={"cms": cms})})


def parameters(config: RunConfig, device: str) -> dict[str, nn.Parameter]:
    """Random ones, with gradients."""
    generator = torch.Generator().manual_seed(0)
    named = {}
    for name, shape in parameter_shapes(config.model).items():
        named[name] = nn.Parameter(0.02 * torch.randn(shape, generator=generator).to(device))
        named[name].grad = 0.001 * torch.randn(shape, generator=generator).to(device)
    return named


def seconds(step: Callable[[], None], device: str, steps: int, repeat: int) -> float:
    """Of one step: CPU time of this process, or wall time on a GPU; the best of a few blocks of `steps` steps."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    step()
    best = float("inf")
    for _ in range(repeat):
        _wait(device)
        start = clock()
        for _ in range(steps):
            step()
        _wait(device)
        best = min(best, (clock() - start) / steps)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_rule(name: str, device: str, repeat: int) -> Row:
    """A rule under the level optimizer."""
    config = run_config(RULES[name])
    named = parameters(config, device)
    optimizer = build_optimizer(named.items(), config)
    spent = seconds(lambda: _step(optimizer), device, STEPS, repeat)
    state = sum(entry.nbytes for entries in optimizer.state.values() for entry in entries.values())
    return {"row": name, "ms_per_step": round(1e3 * spent, 2), "state_mib": round(state / 2**20, 1)}


def _step(optimizer: Any) -> None:
    optimizer.step(tokens=1, finite=True)


def measure_torch_muon(device: str, repeat: int) -> Row:
    """torch's own, for comparison."""
    config = run_config(())
    named = parameters(config, device)
    matrices: list[Tensor] = [p for name, p in named.items() if kind_of(name, p.ndim) == "matrices"]
    others: list[Tensor] = [p for name, p in named.items() if kind_of(name, p.ndim) != "matrices"]
    parts = [torch.optim.Muon(matrices), torch.optim.AdamW(others)]

    def step() -> None:
        for part in parts:
            part.step()

    spent = seconds(step, device, STEPS, repeat)
    state = sum(entry.nbytes for part in parts for entries in part.state.values() for entry in entries.values())
    return {"row": "torch-muon", "ms_per_step": round(1e3 * spent, 2), "state_mib": round(state / 2**20, 1)}


def measure_backward(watched: bool, device: str, repeat: int) -> Row:
    """One linear layer."""
    layer = nn.Linear(384, 384, bias=False, device=device)
    if watched:
        layer.register_forward_hook(DeltaLayer(lambda: 1e-3, lambda: 4096))
    x = torch.randn(4096, 384, device=device, requires_grad=True)

    def step() -> None:
        layer(x).square().mean().backward()

    return {
        "row": f"backward{'-dgd' if watched else ''}",
        "ms_per_step": round(1e3 * seconds(step, device, STEPS, repeat), 2),
    }


def ratios(rows: Sequence[Row]) -> Row:
    """Of this run."""
    spent = {row["row"]: row["ms_per_step"] for row in rows}
    pairs = [("m3", "muon"), ("muon-bf16", "torch-muon"), ("backward-dgd", "backward")]
    pairs += [(name, "adamw-fused") for name in RULES if name != "adamw-fused"]
    return {f"{a} / {b}": round(spent[a] / spent[b], 3) for a, b in pairs if a in spent and b in spent}


def main(arguments: Sequence[str]) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_optim", description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeat", type=int, default=2, help="blocks of each row (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", help="only these")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device, repeat = chosen.device, chosen.repeat
    cases: dict[str, Callable[[], Row]] = {
        name: lambda name=name: measure_rule(name, device, repeat)  # type: ignore[misc]
        for name in RULES
    }
    cases["torch-muon"] = lambda: measure_torch_muon(device, repeat)
    cases["backward"] = lambda: measure_backward(False, device, 5 * repeat)
    cases["backward-dgd"] = lambda: measure_backward(True, device, 5 * repeat)
    rows = []
    for name, case in cases.items():
        if chosen.rows is None or name in chosen.rows:
            rows.append(case())
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"ratios": ratios(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
