"""How fast a run could go: FLOPs over peaks, or the time to launch its kernels, whichever is longer (no torch).

These are assumptions, not measurements; each is a constant here, is printed with every plan, and gives way to a
measured MFU (`mfu=`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hope_train.config.tree import RunConfig
from hope_train.plan.devices import Device
from hope_train.plan.flops import FlopCount

EFFICIENCY = 0.4
"""Share of its peak that a matrix product reaches in training, on accelerators and CPUs alike."""

LAUNCH_SECONDS = 5e-6
"""Host time per kernel, eager mode."""

COMPILED_SHARE = 0.2
"""Kernels left of the memory's chunk functions by `train.compile`."""

CHUNK_KERNELS = {
    "mlp": {"joint": (241, 499), "generators": (197, 399), "memory": (154, 309)},
    "linear": {"joint": (162, 290), "generators": (126, 207), "memory": (84, 153)},
}
"""Kernels per chunk and layer, forward and backward, eager: of all memories as one group (equal chunk sizes) or of each
scan.

Operators that a TorchDispatchMode sees in `memory.chunked.run`, per further chunk of 64 (of 32 and 64 for two scans),
views, allocations and scalars left out; each counts as one kernel, a triangular solve or the gradient of a slice too.
Chunks of 16 and 128 have 8 to 12% fewer and 5 to 7% more forward ones (levels of the triangular inverse); momentum has
1.4 times as many. A test counts them again.
"""

LAYER_KERNELS = (60, 85)
"""Kernels per layer outside the memories, forward and backward."""


@dataclass(frozen=True)
class Speed:
    """Expected speed of the whole job."""

    tokens_per_s: float
    days: float
    """For `train.tokens`."""

    mfu: float
    """Model FLOPs (no recomputation) per second over the peak at the run's precision."""

    bound: str
    """`compute`, `kernel launches`, or `given mfu`."""

    assumptions: tuple[str, ...]


def expected_speed(
    config: RunConfig, flops: FlopCount, device: Device, devices: int, mfu: float | None = None
) -> Speed:
    """Speed on `devices` devices without counting communication. `mfu` in (0, 1] replaces all assumptions."""
    train = config.train
    peak = device.peak(train.precision)
    if mfu is not None:
        seconds, bound = flops.training / (peak * mfu), "given mfu"
        assumptions = [f"MFU {mfu:.1%} as given"]
    else:
        compute = compute_seconds(config, flops, device)
        launches = launch_seconds(config)
        seconds, bound = (compute, "compute") if compute >= launches else (launches, "kernel launches")
        assumptions = [
            f"products reach {EFFICIENCY:.0%} of their peak",
            f"{LAUNCH_SECONDS * 1e6:.0f} us per kernel launch"
            + (f", compiled chunks have {COMPILED_SHARE:.0%} of the kernels" if train.compile != "none" else ""),
        ]
        if train.precision == "bf16" and config.model.arch == "hope":
            assumptions.append("the memories' products run in fp32")
    if devices > 1:
        assumptions.append("communication is not counted")
    rate = devices / seconds
    return Speed(
        tokens_per_s=rate,
        days=train.total_steps * train.batch_tokens / rate / 86400,
        mfu=flops.training * rate / devices / peak,
        bound=bound,
        assumptions=tuple(assumptions),
    )


def compute_seconds(config: RunConfig, flops: FlopCount, device: Device) -> float:
    """Seconds per token of one device for the products alone; the memories stay in fp32 under autocast."""
    memory = flops.n_layers * 3 * flops.by_part().get("memory", 0.0) + flops.recompute_memory
    rest = flops.executed - memory
    return (memory / device.fp32_flops + rest / device.peak(config.train.precision)) / EFFICIENCY


def launch_seconds(config: RunConfig) -> float:
    """Seconds per token that the host needs to launch one micro-batch's kernels, over its tokens."""
    model, train = config.model, config.train
    whole = train.compile == "model"
    forward, backward = (count * (COMPILED_SHARE if whole else 1.0) for count in LAYER_KERNELS)
    kernels = forward * (2 if train.recompute else 1) + backward
    if model.arch == "hope":
        memory = model.memory
        passes = 1 + train.recompute + (memory.save_every > 1)
        share = 1.0 if train.compile == "none" else COMPILED_SHARE
        chunk_sizes = {"joint": memory.chunk_size}
        if memory.chunk_size != memory.generator_chunk_size:
            chunk_sizes = {"generators": memory.generator_chunk_size, "memory": memory.chunk_size}
        for group, size in chunk_sizes.items():
            chunk_forward, chunk_backward = CHUNK_KERNELS[memory.kind][group]
            kernels += train.context_length / size * share * (chunk_forward * passes + chunk_backward)
    tokens = train.micro_batch_size * train.context_length
    return model.n_layers * kernels * LAUNCH_SECONDS / tokens
