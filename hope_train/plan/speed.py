"""How fast a run could go: FLOPs over peaks, or the time to launch its kernels, whichever is longer (no torch).

These are assumptions, not measurements; each is a constant here, is printed with every plan, and gives way to a
measured MFU (`mfu=`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hope_train.config.batches import BatchRampConfig
from hope_train.config.mesh import MeshSizes, micro_batches
from hope_train.config.tree import RunConfig
from hope_train.plan.devices import Device
from hope_train.plan.flops import FlopCount
from hope_train.plan.interconnect import Interconnect
from hope_train.plan.pipeline import pipeline_bubble
from hope_train.plan.sharding import RankShare
from hope_train.plan.traffic import Flow, rank_flows

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


LINK_EFFICIENCY = 0.75
"""Share of a link's bandwidth that a large collective reaches."""

EXPOSED = {"tp": 1.0, "sequence": 1.0, "pp": 0.5, "dp reduce": 0.25, "dp gather": 0.25}
"""Share of each kind of communication that no computation hides: nothing runs beside a layer's own exchange, and
most of the data parallelism runs beside backward and the next blocks."""


@dataclass(frozen=True)
class Speed:
    """Expected speed of the whole job."""

    tokens_per_s: float
    days: float
    """For `train.tokens`."""

    mfu: float
    """Model FLOPs (no recomputation) per second over the peak at the run's precision."""

    bound: str
    """`compute`, `kernel launches` (`operator calls` on a CPU), `communication` or `given mfu`."""

    assumptions: tuple[str, ...]

    step_seconds: float = 0.0
    busy_seconds: float = 0.0
    """Of a step: what the busiest pipeline rank computes."""

    bubble_seconds: float = 0.0
    """Of a step: the pipeline's idle time."""

    exposed_seconds: float = 0.0
    """Of a step: communication that nothing hides, on the pipeline rank with most of it."""

    communication_seconds: tuple[tuple[str, float], ...] = ()
    """By kind, hidden or not, averaged over a cycle of the periods; of that same rank."""


def expected_speed(
    config: RunConfig,
    flops: FlopCount,
    device: Device,
    mesh: MeshSizes,
    shares: Sequence[RankShare],
    interconnect: Interconnect,
    mfu: float | None = None,
) -> Speed:
    """Speed of the whole mesh. `mfu` in (0, 1] is that of one device alone and replaces all assumptions on computing.

    A step is the busiest stage's computing, the bubble of the schedule, and the communication that nothing hides. All
    figures but `days` are of a batch of full size.
    """
    train = config.train
    if len(train.batches.sizes) > 1:
        days = 0.0
        for rows, steps in train.batches.counted(train.total_steps):
            step = expected_speed(_of_size(config, rows), flops, device, mesh, shares, interconnect, mfu).step_seconds
            days += steps * step / 86400
        rows = train.batches.sizes[-1]
        full = expected_speed(_of_size(config, rows), flops, device, mesh, shares, interconnect, mfu)
        return dataclasses.replace(full, days=days)
    peak = device.peak(train.precision)
    count = micro_batches(config, mesh)
    tokens = count * train.micro_batch_size * train.context_length
    # Seconds per token of the head, and of a layer: what the head leaves.
    head = 3 * flops.head / (peak * (mfu or EFFICIENCY))
    whole = compute_seconds(config, flops, device) if mfu is None else flops.training / (peak * mfu)
    layer = (whole - head) / flops.n_layers
    compute = max(tokens * (share.layers * layer + share.has_head * head) for share in shares) / mesh.tp
    if mfu is not None:
        busy, bound = compute, "given mfu"
        assumptions = [f"MFU {mfu:.1%} as given"]
    else:
        # Every tensor-parallel rank launches all of the kernels.
        launches = tokens * max(share.layers for share in shares) * launch_seconds(config) / flops.n_layers
        called = "operator call" if device.name == "cpu" else "kernel launch"
        slow = "operator calls" if device.name == "cpu" else "kernel launches"
        busy, bound = (compute, "compute") if compute >= launches else (launches, slow)
        assumptions = [
            f"products reach {EFFICIENCY:.0%} of their peak",
            f"{LAUNCH_SECONDS * 1e6:.0f} us per {called}"
            + (f", compiled chunks have {COMPILED_SHARE:.0%} of the kernels" if train.compile != "none" else ""),
        ]
        if train.precision == "bf16" and config.model.arch == "hope":
            assumptions.append("the memories' products run in fp32")
    if device.name == "cpu":
        assumptions.append(f"memory is this machine's ({device.memory_gib:.1f} GiB for each of {mesh.world})")
    idle = busy * pipeline_bubble(config, mesh).overhead
    by_rank = [communication(rank_flows(config, mesh, share), mesh, interconnect) for share in shares]
    exposed, kinds = max(((exposed_seconds(kinds, busy), kinds) for kinds in by_rank), key=lambda pair: pair[0])
    if mesh.world > 1:
        shown = ", ".join(f"{kind} {EXPOSED[kind]:.0%}" for kind in kinds)
        assumptions.append(f"links reach {LINK_EFFICIENCY:.0%} of their bandwidth; exposed of communication: {shown}")
    if exposed > busy:
        bound = "communication"
    step = busy + idle + exposed
    rate = train.batch_tokens / step
    return Speed(
        tokens_per_s=rate,
        days=train.total_steps * step / 86400,
        mfu=flops.training * rate / mesh.world / peak,
        bound=bound,
        assumptions=tuple(assumptions),
        step_seconds=step,
        busy_seconds=busy,
        bubble_seconds=idle,
        exposed_seconds=exposed,
        communication_seconds=tuple(kinds.items()),
    )


def _of_size(config: RunConfig, rows: int) -> RunConfig:
    """The run with all batches of `rows` sequences."""
    tokens = rows * config.train.context_length
    train = config.train.model_copy(update={"batch_tokens": tokens, "batch_ramp": BatchRampConfig()})
    return config.model_copy(update={"train": train})


def communication(flows: Sequence[Flow], mesh: MeshSizes, interconnect: Interconnect) -> dict[str, float]:
    """Seconds per step by kind, whether hidden or not."""
    seconds: dict[str, float] = {}
    for flow in flows:
        link = interconnect.link(mesh, flow.dim)
        time = flow.wire / (link.bandwidth * LINK_EFFICIENCY) + flow.calls * link.latency
        seconds[flow.kind] = seconds.get(flow.kind, 0.0) + time
    return seconds


def exposed_seconds(kinds: dict[str, float], busy: float) -> float:
    """What nothing hides: the assumed share of every kind, and what is longer than the computing beside it."""
    exposed = sum(EXPOSED[kind] * seconds for kind, seconds in kinds.items())
    hidden = sum(kinds.values()) - exposed
    return exposed + max(0.0, hidden - busy)


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
