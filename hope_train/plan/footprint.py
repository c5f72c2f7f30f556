"""Bytes on one device while a run trains, term by term, and what a sequence costs at inference (no torch).

Parameters, gradients and optimizer state are exact for every mesh. Activations
are what autograd keeps, counted from the model's eager code in units that follow from its shapes; a test measures them
through torch's saved-tensor hooks. `train.compile` usually keeps less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hope_train.config.mesh import MeshSizes, micro_batches
from hope_train.config.model import ModelConfig
from hope_train.config.parallel import ParallelConfig
from hope_train.config.tree import RunConfig
from hope_train.levels.schedule import REST_AT_A_TIME, LevelPlan, level_of
from hope_train.optim.kinds import KINDS, batch_size, kind_of, rule_of, state_numbers
from hope_train.plan.devices import GIB, Device
from hope_train.plan.parameters import memory_state_shapes, parameter_shapes
from hope_train.plan.pipeline import heads_in_flight, layers_in_flight
from hope_train.plan.sharding import RankShare, padded_shard, rank_shares
from hope_train.plan.stages import part_count
from hope_train.plan.traffic import kept_levels, set_numbers

FP32 = 4

RESERVED_SHARE = 0.06
"""Part of an accelerator's memory that is not ours to fill: fragmentation of the allocator's blocks."""

BATCH_COPIES = 6
"""Of a batch of whole matrices while it is orthogonalised: what went in, X twice, X X^T and its square, the result."""

CONTEXT_BYTES = int(1.0 * GIB)
"""Libraries, kernels and their workspaces on an accelerator."""


@dataclass(frozen=True)
class Item:
    """One term of the sum. `transient` terms exist in a part of the step only; the largest of them counts. What is
    `on_host` lies in main memory and does not count."""

    name: str
    bytes: int
    transient: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class Footprint:
    """Memory of one device at the peak of a training step."""

    items: tuple[Item, ...]

    @property
    def peak(self) -> int:
        """All lasting terms and the largest transient one, in bytes."""
        lasting = sum(item.bytes for item in self.items if not item.transient and not item.on_host)
        return lasting + max((item.bytes for item in self.items if item.transient), default=0)

    @property
    def on_host(self) -> int:
        """Bytes in main memory instead."""
        return sum(item.bytes for item in self.items if item.on_host)

    def fits(self, device: Device) -> bool:
        """Whether the peak stays within what the device can give."""
        return self.peak <= usable_bytes(device)


def usable_bytes(device: Device) -> int:
    """Memory of a device that a run can fill."""
    return int(device.memory_bytes * (1 - RESERVED_SHARE)) - (0 if device.name == "cpu" else CONTEXT_BYTES)


def training_footprint(
    config: RunConfig,
    on_accelerator: bool = True,
    mesh: MeshSizes | None = None,
    share: RankShare | None = None,
) -> Footprint:
    """The memory of one device, for micro-batches of `train.micro_batch_size` sequences of `train.context_length`.

    mesh, share: the mesh and what the ranks at one place of its pipeline hold (`sharding.rank_shares`); without them
    a device that holds the whole model.
    """
    if mesh is None or share is None:
        config, mesh = config.model_copy(update={"parallel": ParallelConfig()}), MeshSizes()
        share = rank_shares(config, mesh)[0]
    model, train = config.model, config.train
    items = [*_static_items(config, mesh, share, on_accelerator), *_gathered_items(config, mesh, share)]
    flight, heads = layers_in_flight(config, mesh, share), heads_in_flight(config, mesh)
    low = 2 if train.precision == "bf16" else FP32
    if low != FP32:
        copies = 1 if train.recompute else -(-flight // share.layers)
        items.append(Item("bf16 copies of the weight matrices", low * copies * _cast_matrices(share)))
    tokens = train.micro_batch_size * train.context_length
    stream = tokens // mesh.tp if config.parallel.sequence_parallel else tokens
    kept, passing = _block_bytes(model, tokens, stream, train.micro_batch_size, low, mesh.tp)
    block_input = FP32 * model.d_model * stream
    if train.recompute:
        items.append(Item("inputs of the blocks (recompute)", flight * block_input))
        items.append(Item("one block's recomputed activations", sum(kept.values()) + passing, transient=True))
    else:
        items += [Item(f"activations: {name}", flight * size) for name, size in kept.items()]
        if passing:
            items.append(Item("recomputed chunks of one layer", passing, transient=True))
    if mesh.pp > 1:
        # Buffers in which activations and their gradients arrive: torch makes them for every micro-batch and part.
        last = part_count(config.parallel) - 1
        ends = sum((number > 0) + (number < last) for number, _ in share.parts)
        buffers = micro_batches(config, mesh) * ends * block_input
        items.append(Item("receive buffers of the pipeline", buffers))
    if share.has_head:
        # After the blocks: final norm and its input, the loss's gradients of hidden states and head.
        whole = FP32 * model.d_model * tokens
        items.append(Item("final hidden states and their gradient", heads * 2 * (block_input + whole)))
        rows_of_head = share.shapes["embed.weight" if model.tie_embeddings else "head.weight"][0]
        items.append(Item("gradient of the output head held by the loss", heads * FP32 * rows_of_head * model.d_model))
        rows = min(train.loss_chunk, tokens)
        logits = rows * rows_of_head * (2 * FP32 + (2 * low if low != FP32 else 0))
        items.append(Item("logits of one chunk", logits, transient=True))
    if mesh.dp_replicate > 1 and mesh.dp_shard == 1:
        numbers, levels = set_numbers(share), model.cms.levels
        slow = [count for level, count in numbers.items() if level is not None and levels[level].period > 1]
        # Of the sets of period 1 together, of a slow one alone at its boundary.
        most = max([sum(numbers.values()) - sum(slow), *slow])
        items.append(Item("buckets of the reductions", FP32 * most, transient=True))
    items.append(Item("optimizer's temporaries", _step_bytes(config, mesh, share, on_accelerator), transient=True))
    return Footprint(tuple(items))


def shard_numbers(mesh: MeshSizes, share: RankShare) -> dict[int | None, int]:
    """Parameters that a rank owns between steps, padding of its shards included, by level (None: the core)."""
    numbers: dict[int | None, int] = {}
    for name, shape in share.shapes.items():
        level = level_of(name)
        numbers[level] = numbers.get(level, 0) + padded_shard(shape, mesh.dp_shard)
    return numbers


def state_item(config: RunConfig, which: str = "") -> str:
    """What the bytes that the update rules keep are called."""
    rules = {rule_of(config.optimizer, kind) for kind in KINDS}
    return " ".join(filter(None, ["AdamW moments" if rules == {"adamw"} else "states of the rules", which, "(fp32)"]))


def rule_state_bytes(config: RunConfig, mesh: MeshSizes, share: RankShare, from_period: int = 1) -> int:
    """What the update rules of all parameters of these periods keep on a rank, padding of its shards included."""
    whole, periods = (
        parameter_shapes(config.model),
        {part.level: part.period for part in LevelPlan.from_config(config).sets},
    )
    numbers = 0
    for name, shape in share.shapes.items():
        if periods[level_of(name)] >= from_period:
            rule, own = rule_of(config.optimizer, kind_of(name, len(shape))), padded_shard(shape, mesh.dp_shard)
            numbers += state_numbers(config.optimizer, rule, own, whole[name])
    return FP32 * numbers


def memory_state_bytes(config: RunConfig, mesh: MeshSizes, share: RankShare) -> int:
    """Fast weights of one micro-batch in all layers of a rank, fp32: the live state, without what backward keeps."""
    if config.model.arch != "hope":
        return 0
    weights = sum(math.prod(shape) for shape in memory_state_shapes(config.model).values())
    return FP32 * share.layers * config.train.micro_batch_size * weights // mesh.tp


def _static_items(config: RunConfig, mesh: MeshSizes, share: RankShare, on_accelerator: bool) -> list[Item]:
    """What exists between steps: fp32 weights, gradients, moments, accumulators, initial states.

    A slow level is reduced only at its boundary, so that its accumulator is whole on every rank, sharded or not.
    """
    own, whole = shard_numbers(mesh, share), set_numbers(share)
    plan = LevelPlan.from_config(config)
    slow = sum(whole.get(part.level, 0) for part in plan.sets if part.level is not None and part.period > 1)
    anchored_names = plan.anchored_sets()
    anchored = sum(
        own.get(part.level, 0) for part in plan.sets if part.level is not None and part.name in anchored_names
    )
    count = sum(own.values())
    rest = config.optimizer.rest_from_period
    kept = rule_state_bytes(config, mesh, share)
    away = 0 if rest is None else rule_state_bytes(config, mesh, share, from_period=rest)
    items = [
        Item("parameters (fp32)", FP32 * count),
        Item("gradients (fp32)", FP32 * count),
        Item(state_item(config), kept - (away if on_accelerator else 0)),
    ]
    if away:
        some = min(away, REST_AT_A_TIME)
        items.append(Item("moments that rest in host memory, while they are stepped", some, transient=True))
        if on_accelerator:
            items.append(Item(state_item(config, f"of periods from {rest} on"), away, on_host=True))
    if slow:
        items.append(Item("accumulators of slow levels (fp32)", FP32 * slow))
    if anchored:
        items.append(Item("initial states of nested levels (fp32)", FP32 * anchored))
    return items


def _gathered_items(config: RunConfig, mesh: MeshSizes, share: RankShare) -> list[Item]:
    """Sharding: what is gathered for longer than a product, and gradients that wait for the step's one reduction."""
    if mesh.dp_shard == 1:
        return []
    numbers, kept = set_numbers(share), kept_levels(config, share)
    periods = [level.period for level in config.model.cms.levels]
    items = [
        Item(f"level {level} kept gathered (period {periods[level]}, fp32)", FP32 * numbers[level]) for level in kept
    ]
    blocks: dict[str, int] = {}
    outside = 0
    for name, shape in share.shapes.items():
        if not name.startswith("blocks."):
            outside += math.prod(shape)
        elif level_of(name) not in kept:
            number = name.split(".")[1]
            blocks[number] = blocks.get(number, 0) + math.prod(shape)
    ahead = 2 * max(blocks.values(), default=0)  # the next block is gathered while one computes
    items.append(Item("gathered: embedding, head and two blocks (fp32)", FP32 * (outside + ahead)))
    fast = sum(count for level, count in numbers.items() if level is None or periods[level] == 1)
    if micro_batches(config, mesh) > 1:
        items.append(Item("whole gradients of the core and of levels of period 1 (fp32)", FP32 * fast))
    else:
        items.append(Item("whole gradients of the outside and two blocks (fp32)", FP32 * (outside + ahead)))
    return items


def _step_bytes(config: RunConfig, mesh: MeshSizes, share: RankShare, on_accelerator: bool) -> int:
    """The old weights that update ratios are measured against, and the fused-over-tensors kernels' square roots; with
    rules for matrices their updates (M3's of all matrices at once) and a batch of whole ones with what it takes to
    orthogonalise it."""
    own, rules = shard_numbers(mesh, share), config.optimizer
    foreach = on_accelerator and not rules.fused
    numbers = sum(own.values()) + (max(own.values()) if foreach else 0)
    if rules.name in ("muon", "m3", "delta_momentum", "deep_momentum"):
        whole = parameter_shapes(config.model)
        names = [name for name, shape in share.shapes.items() if kind_of(name, len(shape)) == "matrices"]
        batches = [batch_size(whole[name], FP32) * math.prod(whole[name]) for name in names]
        numbers += BATCH_COPIES * max(batches)
        if rules.name == "m3":
            numbers += sum(padded_shard(share.shapes[name], mesh.dp_shard) for name in names)
    return FP32 * numbers


def _cast_matrices(share: RankShare) -> int:
    """Weights of linear layers, which autocast copies once per micro-batch; the head's too."""
    return sum(
        math.prod(shape)
        for name, shape in share.shapes.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and (share.has_head if name.startswith(("embed.", "head.")) else True)
        and not (name.startswith("embed.") and "head.weight" in share.shapes)
    )


def _block_bytes(
    model: ModelConfig, tokens: int, stream: int, sequences: int, low: int, tp: int
) -> tuple[dict[str, int], int]:
    """One block: bytes kept for backward by part, and bytes that exist only while chunks are recomputed.

    The factors count tensors that autograd keeps per token: `low` bytes each where autocast makes them, 4 where not.
    stream: tokens of the residual stream and the norms on this rank (fewer with sequence parallelism). The gathered
    input of a product is whole on every tensor-parallel rank; what is per head or hidden unit is split.
    """
    width = model.d_model
    kept: dict[str, int] = {}
    passing = 0

    def part(everything: float, readers: int, inner: float = 0.0) -> int:
        """Of `everything` per channel the stream's 8 bytes follow its tokens, the gathered input of the `readers` is
        whole (one for all; under autocast each product casts its own), and the rest is split."""
        whole = FP32 if low == FP32 else low * readers
        rest = (everything - 8 - whole) * width + inner
        return round(8 * width * stream + whole * width * tokens + rest * tokens / tp)

    if model.arch == "hope":
        kept["projections, convolution, norms"] = part(
            22 + 5 * low, model.memory.in_proj + (not model.memory.adaptive_q)
        )
        memory, values = model.memory, saved_memory_values(model)
        per_token = {group: FP32 * model.n_heads / tp * value for group, value in values.items()}
        every = memory.save_every
        if every == 1:
            kept["memories inside their chunks"] = round(sum(per_token.values()) * tokens)
        else:
            # What goes into the scans: z and static q; of two scans also k, v (adaptive q), eta, alpha.
            inputs = (2 - memory.adaptive_q) * width
            if "joint" not in values:
                inputs = 4 * width + 2 * model.n_heads
            kept["inputs of the memories"] = FP32 * inputs * tokens // tp
            kept[f"every {every}th chunk state"] = round(saved_state_bytes(model) * tokens / every / tp)
            # One batch of chunks at a time is recomputed: of all memories together, or of one scan after the other.
            chunks = {
                "joint": memory.chunk_size,
                "memory": memory.chunk_size,
                "generators": memory.generator_chunk_size,
            }
            passing = max(
                round(size * min(tokens, sequences * chunks[group] * every)) for group, size in per_token.items()
            )
    else:
        kept["attention and its norm"] = part(16 + 4 * low, 3)
    hidden = [(model.mlp_width or 0, True)] if model.arch == "transformer_pp" else []
    hidden += [(level.width, level.activation == "swiglu") for level in model.cms.levels]
    mlp = sum(part(12, 2 if gated else 1, (4 if gated else 2) * low * inner) for inner, gated in hidden)
    kept["MLP" if model.arch == "transformer_pp" else "CMS levels"] = mlp
    return kept, passing


_KEPT: dict[tuple[str, str], tuple[tuple[float, ...], ...]] = {
    # (kind, group): tensors per token of width n, E, C and 1; then what `adaptive_q`, `momentum` and both add
    ("mlp", "joint"): ((25, 81, 10, 33), (4, 17, 1, 3), (8, 31, 21.4, 9), (2, 6, 2, 0)),
    ("mlp", "generators"): ((17, 62, 6, 29), (5, 17, 1, 3), (4, 24, 16.4, 9), (2, 6, 2, 0)),
    ("mlp", "memory"): ((13, 17, 6, 8), (0, 0, 0, 0), (5, 6, 13.4, 5), (0, 0, 0, 0)),
    ("linear", "joint"): ((20, 0, 4, 16), (2, 0, 0, 0), (12, 0, 9.4, 13), (4, 0, 0, 0)),
    ("linear", "generators"): ((13, 0, 2, 15), (3, 0, 0, 0), (8, 0, 8.4, 13), (4, 0, 0, 0)),
    ("linear", "memory"): ((12, 0, 4, 5), (0, 0, 0, 0), (6, 0, 9.4, 5), (0, 0, 0, 0)),
}
"""What the chunk functions keep besides states; equal chunk sizes make one joint group of all memories.

Counted with saved-tensor hooks for two sequences and several heads over head widths, expansions and chunks; least
squares over that grid give these numbers (momentum's factors of theta are shared by the sequences,
hence no whole ones).
"""


def saved_memory_values(model: ModelConfig) -> dict[str, float]:
    """Numbers (fp32) kept per token and head inside the chunks, by group of memories, chunk states included.

    Each chunk keeps its states twice (before the chunk and without the initial state), once more with the clamp and
    once more with momentum; a joint group of MLPs also copies W1s where it takes some of a stack. Decay to zero,
    `rank_one: w2` and `read: start` keep less.
    """
    memory, n = model.memory, model.head_dim
    copies = 2 + (memory.clamp is not None) + memory.momentum
    groups = {"joint": memory.chunk_size}
    if memory.chunk_size != memory.generator_chunk_size:
        groups = {"generators": memory.generator_chunk_size, "memory": memory.chunk_size}
    values = {}
    for group, chunk in groups.items():
        switched = (True, memory.adaptive_q, memory.momentum, memory.adaptive_q and memory.momentum)
        widths = (n, memory.expansion * n, chunk, 1)
        kept = copies * _state_values(model, group) / model.n_heads
        if group == "joint" and memory.kind == "mlp":
            kept += (3 + memory.adaptive_q + memory.momentum) * memory.expansion * n * n / chunk
        for counts, on in zip(_KEPT[memory.kind, group], switched, strict=True):
            kept += on * sum(count * width for count, width in zip(counts, widths, strict=True))
        values[group] = kept
    return values


def _state_values(model: ModelConfig, group: str = "joint") -> float:
    """Numbers in the fast weights of one layer's group (`joint`: all of them), over the length of each one's chunk."""
    memory = model.memory
    total = 0.0
    for name, shape in memory_state_shapes(model).items():
        is_main = name.endswith("_mem")
        if group == "joint" or (group == "memory") == is_main:
            total += math.prod(shape) / (memory.chunk_size if is_main else memory.generator_chunk_size)
    return total


def saved_state_bytes(model: ModelConfig) -> float:
    """Bytes of chunk states per token and layer when every chunk's state is kept."""
    return FP32 * _state_values(model) * (2 if model.memory.momentum else 1)


def state_bytes_per_sequence(model: ModelConfig, context: int) -> int:
    """What one sequence carries at inference after `context` tokens, all layers, fp32.

    Constant in the context for Hope (fast weights twice, at the chunk's start and now, and the convolution's inputs);
    attention's keys and values grow with it.
    """
    if model.arch != "hope":
        return model.n_layers * 2 * FP32 * model.d_model * context
    weights = sum(math.prod(shape) for shape in memory_state_shapes(model).values())
    copies = 3 if model.memory.momentum else 2
    return model.n_layers * FP32 * (copies * weights + (model.memory.conv_width - 1) * model.d_model)
