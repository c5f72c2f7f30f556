"""Bytes that one rank communicates in a step, by kind (no torch).

`payload` is the size of the whole tensor that a collective makes or takes on one rank: what hooks on collectives
count. `wire` is what leaves (and reaches) a rank in a ring: 2 (n-1)/n of the payload for an all-reduce, (n-1)/n for a
gather or reduce-scatter, all of it from stage to stage.

Gradients and gathered weights are fp32 (reduction in fp32; autocast casts on the rank), and so is the residual stream
that travels between stages and into the products of a layer; what comes out of them is as autocast makes it. Norms for
clipping (8 bytes a set) and the loss's scalars are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hope_train.config.mesh import MeshSizes, micro_batches
from hope_train.config.tree import RunConfig
from hope_train.levels.schedule import level_of, set_name
from hope_train.parallel.plan import split_of_parameter
from hope_train.plan.gathering import kept_gathered
from hope_train.plan.sharding import RankShare, padded_shard
from hope_train.plan.stages import part_count

FP32 = 4

Kind = Literal["tp", "sequence", "pp", "dp reduce", "dp gather"]
Dim = Literal["tp", "pp", "dp_shard", "dp_replicate"]

BUCKET_BYTES = 25 * 2**20
"""Tensors below this size are reduced together (unsharded data parallelism)."""

RING = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


@dataclass(frozen=True)
class Flow:
    """One stream of collectives (or messages) of a rank."""

    kind: Kind
    name: str
    """What travels; for data parallelism the set: `core`, `level_0`, …"""

    operation: str
    """`all-reduce`, `all-gather`, `reduce-scatter` or `send`."""

    dim: Dim
    """The dimension of the mesh along which it goes."""

    ranks: int
    """Ranks that take part."""

    payload: float
    """Bytes per step, averaged over a cycle of all periods."""

    worst: float
    """Bytes of the step at which every set is due."""

    calls: float
    """Collectives or messages per step, averaged."""

    @property
    def wire(self) -> float:
        """Bytes that leave this rank per step, averaged."""
        if self.operation == "send":
            return self.payload
        return RING[self.operation] * (self.ranks - 1) / self.ranks * self.payload


def rank_flows(config: RunConfig, mesh: MeshSizes, share: RankShare) -> tuple[Flow, ...]:
    """Everything that a rank at this place of the pipeline communicates; nothing for a mesh of one rank."""
    flows = [*_tensor(config, mesh, share), *_pipeline(config, mesh, share), *_data(config, mesh, share)]
    return tuple(flow for flow in flows if flow.ranks > 1 and flow.worst > 0)


def gradient_ratio(config: RunConfig, shares: tuple[RankShare, ...]) -> float:
    """Data-parallel gradient bytes per step, averaged over a cycle, over those with every period 1 (all stages).

    The same for every way of data parallelism: a set of period P is reduced once in P steps.
    """
    due = total = 0.0
    for share in shares:
        for name, shape in share.shapes.items():
            due += math.prod(shape) / _period(config, name)
            total += math.prod(shape)
    return due / total


def set_numbers(share: RankShare) -> dict[int | None, int]:
    """Parameters on a rank once gathered, by level (None: the core)."""
    numbers: dict[int | None, int] = {}
    for name, shape in share.shapes.items():
        level = level_of(name)
        numbers[level] = numbers.get(level, 0) + math.prod(shape)
    return numbers


def _period(config: RunConfig, name: str) -> int:
    level = level_of(name)
    return 1 if level is None else config.model.cms.levels[level].period


def kept_levels(config: RunConfig, share: RankShare) -> tuple[int, ...]:
    """The levels that this rank keeps gathered between their updates."""
    numbers = {level: count for level, count in set_numbers(share).items() if level is not None}
    periods = {index: level.period for index, level in enumerate(config.model.cms.levels)}
    return kept_gathered(numbers, periods, config.parallel)


def _stream(config: RunConfig) -> int:
    """Bytes of the residual stream of one micro-batch, all tokens."""
    train = config.train
    return FP32 * config.model.d_model * train.micro_batch_size * train.context_length


def _tensor(config: RunConfig, mesh: MeshSizes, share: RankShare) -> Iterator[Flow]:
    """Between the ranks of a tensor-parallel group.

    With sequence parallelism a product that splits its columns is preceded by a gather of the tokens and the one that
    splits its rows is followed by a reduce-scatter; backward mirrors both (Korthikanti et al., arXiv 2205.05198).
    Without it there is one all-reduce forward and one backward (Shoeybi et al., arXiv 1909.08053).
    """
    if mesh.tp == 1:
        return
    model, train = config.model, config.train
    count, stream = micro_batches(config, mesh), _stream(config)
    branches = 1 + (len(model.cms.levels) or 1)  # the mixer, and every level (or the MLP)
    low = 2 if train.precision == "bf16" else FP32

    def flow(kind: Kind, name: str, operation: str, calls: int, size: float) -> Flow:
        return Flow(kind, name, operation, "tp", mesh.tp, calls * size, calls * size, calls)

    # Entering the branches: normed tokens, fp32. Leaving them: what a product under autocast gives. Recomputation
    # ends with the last tensor that backward needs, which is before the last product's sum.
    enter, leave = stream, stream * low / FP32
    inner = share.layers * branches * count
    again = share.layers * branches * count if train.recompute else 0
    again_sums = share.layers * (branches - 1) * count if train.recompute else 0
    if config.parallel.sequence_parallel:
        ends = count * (share.has_embedding + share.has_head)  # forward of the one, backward of the other
        yield flow("sequence", "stream into products", "all-gather", inner + again + count * share.has_head, enter)
        yield flow("sequence", "stream out of products", "reduce-scatter", inner + again_sums, leave)
        yield flow("sequence", "gradients into products", "reduce-scatter", inner + ends, enter)
        yield flow("sequence", "gradients out of products", "all-gather", inner, leave)
        yield flow("sequence", "gradients of the embedding", "all-gather", count * share.has_embedding, enter)
        # Shards of what has period 1, the whole of what a slow level collects.
        held = sum(
            padded_shard(shape, mesh.dp_shard if _period(config, name) == 1 else 1)
            for name, shape in share.shapes.items()
            if split_of_parameter(name).dim is None
        )
        yield flow("sequence", "gradients of norm gains", "all-reduce", 1, FP32 * held)
    else:
        yield flow("tp", "products' sums", "all-reduce", inner + again_sums, leave)
        yield flow("tp", "gradients of products' inputs", "all-reduce", inner + count * share.has_head, enter)
        yield flow("tp", "embedding", "all-reduce", count * share.has_embedding, enter)
    if share.has_head:
        tokens = train.micro_batch_size * train.context_length
        chunks = -(-tokens // train.loss_chunk)
        # Log-sum-exp of every rank's part and the target's logit.
        size = 2 * FP32 * mesh.tp * tokens / chunks
        yield flow("tp", "loss of the split vocabulary", "all-gather", chunks * count, size)


def _pipeline(config: RunConfig, mesh: MeshSizes, share: RankShare) -> Iterator[Flow]:
    """What a rank sends: activations to the next part, their gradients to the one before."""
    if mesh.pp == 1:
        return
    parallel, last = config.parallel, part_count(config.parallel) - 1
    size = _stream(config) / (mesh.tp if parallel.sequence_parallel else 1)
    held = {part for part, _ in share.parts}
    # Neighbouring parts on one rank (the turn of a V) pass nothing on.
    count = micro_batches(config, mesh)
    forward = count * sum(part < last and part + 1 not in held for part in held)
    backward = count * sum(part > 0 and part - 1 not in held for part in held)
    yield Flow("pp", "activations", "send", "pp", mesh.pp, forward * size, forward * size, forward)
    yield Flow("pp", "gradients of activations", "send", "pp", mesh.pp, backward * size, backward * size, backward)
    if config.model.tie_embeddings and share.has_embedding != share.has_head:
        bytes_ = FP32 * padded_shard(share.shapes["embed.weight"], mesh.dp_shard)
        yield Flow("pp", "gradient of the tied embedding", "all-reduce", "pp", 2, bytes_, bytes_, 1)


def _data(config: RunConfig, mesh: MeshSizes, share: RankShare) -> Iterator[Flow]:
    """Gradients, and with sharding weights, set by set."""
    if mesh.dp == 1:
        return
    levels, count = config.model.cms.levels, micro_batches(config, mesh)
    kept = kept_levels(config, share)
    whole: dict[int | None, list[tuple[bool, int]]] = {}
    for name, shape in share.shapes.items():
        padded = FP32 * padded_shard(shape, mesh.dp_shard) * mesh.dp_shard
        whole.setdefault(level_of(name), []).append((name.startswith("blocks."), padded))
    for level in sorted(whole, key=lambda level: -1 if level is None else level):
        name, period = set_name(level), 1 if level is None else levels[level].period
        blocks = sum(size for in_block, size in whole[level] if in_block)
        roots = sum(size for in_block, size in whole[level] if not in_block)
        units = share.layers + (roots > 0)
        size = blocks + roots
        if mesh.dp_shard == 1:
            units = bucket_count([number for _, number in whole[level]])
        if mesh.dp_shard > 1:
            yield _reduce(name, "reduce-scatter", "dp_shard", mesh.dp_shard, size, period, units)
        if mesh.dp_replicate > 1:
            own = size // mesh.dp_shard
            yield _reduce(name, "all-reduce", "dp_replicate", mesh.dp_replicate, own, period, units)
        if mesh.dp_shard == 1:
            continue
        if level in kept:
            average, calls, worst = size / period, units / period, float(size)
        else:  # blocks for forward and again for backward, what is outside of them once per micro-batch
            average = worst = count * (2.0 * blocks + roots)
            calls = count * (2.0 * share.layers + (roots > 0))
        yield Flow("dp gather", name, "all-gather", "dp_shard", mesh.dp_shard, average, worst, calls)


def bucket_count(sizes: Sequence[int]) -> int:
    """Reductions of neighbouring tensors of these sizes in bytes, joined while they stay within `BUCKET_BYTES`."""
    buckets, room = 0, 0
    for size in sizes:
        if not buckets or size > room:
            buckets, room = buckets + 1, BUCKET_BYTES
        room -= size
    return buckets


def _reduce(name: str, operation: str, dim: Dim, ranks: int, size: int, period: int, units: int) -> Flow:
    return Flow("dp reduce", name, operation, dim, ranks, size / period, size, units / period)
