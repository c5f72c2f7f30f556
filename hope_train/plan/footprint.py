"""Bytes on one device while a run trains, term by term, and what a sequence costs at inference (no torch).

Every device holds the whole model (data parallelism). Parameters, gradients and optimizer state are exact. Activations
are what autograd keeps, counted from the model's eager code in units that follow from its shapes; a test measures them
through torch's saved-tensor hooks. `train.compile` usually keeps less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hope_train.config.model import ModelConfig
from hope_train.config.tree import RunConfig
from hope_train.levels.schedule import LevelPlan
from hope_train.plan.devices import GIB, Device
from hope_train.plan.parameters import level_counts, memory_state_shapes, parameter_count, parameter_shapes

FP32 = 4

RESERVED_SHARE = 0.06
"""Part of an accelerator's memory that is not ours to fill: fragmentation of the allocator's blocks."""

CONTEXT_BYTES = int(1.0 * GIB)
"""Libraries, kernels and their workspaces on an accelerator."""


@dataclass(frozen=True)
class Item:
    """One term of the sum. `transient` terms exist in a part of the step only; the largest of them counts."""

    name: str
    bytes: int
    transient: bool = False


@dataclass(frozen=True)
class Footprint:
    """Memory of one device at the peak of a training step."""

    items: tuple[Item, ...]

    @property
    def peak(self) -> int:
        """All lasting terms and the largest transient one, in bytes."""
        lasting = sum(item.bytes for item in self.items if not item.transient)
        return lasting + max((item.bytes for item in self.items if item.transient), default=0)

    def fits(self, device: Device) -> bool:
        """Whether the peak stays within what the device can give."""
        return self.peak <= usable_bytes(device)


def usable_bytes(device: Device) -> int:
    """Memory of a device that a run can fill."""
    return int(device.memory_bytes * (1 - RESERVED_SHARE)) - (0 if device.name == "cpu" else CONTEXT_BYTES)


def training_footprint(config: RunConfig, on_accelerator: bool = True) -> Footprint:
    """The memory of one device, for `train.micro_batch_size` sequences of `train.context_length` tokens."""
    model, train = config.model, config.train
    items = [*_static_items(config)]
    low = 2 if train.precision == "bf16" else FP32
    if low != FP32:
        items.append(Item("bf16 copies of the weight matrices", low * _cast_matrices(model)))
    tokens = train.micro_batch_size * train.context_length
    kept, passing = _block_bytes(model, tokens, train.micro_batch_size, low)
    block_input = FP32 * model.d_model * tokens
    if train.recompute:
        items.append(Item("inputs of the blocks (recompute)", model.n_layers * block_input))
        items.append(Item("one block's recomputed activations", sum(kept.values()) + passing, transient=True))
    else:
        items += [Item(f"activations: {name}", model.n_layers * size) for name, size in kept.items()]
        if passing:
            items.append(Item("recomputed chunks of one layer", passing, transient=True))
    # After the blocks: final norm and its input, the loss's gradients of hidden states and head.
    items.append(Item("final hidden states and their gradient", 4 * block_input))
    items.append(Item("gradient of the output head held by the loss", FP32 * model.vocab_size * model.d_model))
    rows = min(train.loss_chunk, tokens)
    logits = rows * model.vocab_size * (2 * FP32 + (2 * low if low != FP32 else 0))
    items.append(Item("logits of one chunk", logits, transient=True))
    items.append(Item("optimizer's temporaries", _step_bytes(config, on_accelerator), transient=True))
    return Footprint(tuple(items))


def _static_items(config: RunConfig) -> list[Item]:
    """What exists between steps: fp32 weights, gradients, moments, accumulators, initial states."""
    model = config.model
    count, levels = parameter_count(model), level_counts(model)
    plan = LevelPlan.from_config(config)
    slow = sum(levels[part.level] for part in plan.sets if part.level is not None and part.period > 1)
    anchored_names = plan.anchored_sets()
    anchored = sum(levels[part.level] for part in plan.sets if part.level is not None and part.name in anchored_names)
    items = [
        Item("parameters (fp32)", FP32 * count),
        Item("gradients (fp32)", FP32 * count),
        Item("AdamW moments (fp32)", 2 * FP32 * count),
    ]
    if slow:
        items.append(Item("accumulators of slow levels (fp32)", FP32 * slow))
    if anchored:
        items.append(Item("initial states of nested levels (fp32)", FP32 * anchored))
    return items


def _step_bytes(config: RunConfig, on_accelerator: bool) -> int:
    """The old weights that update ratios are measured against, and the fused-over-tensors kernels' square roots."""
    levels = level_counts(config.model)
    count = parameter_count(config.model)
    largest_group = max([count - sum(levels.values()), *levels.values()])
    foreach = on_accelerator and not config.optimizer.fused
    return FP32 * count + (FP32 * largest_group if foreach else 0)


def _cast_matrices(model: ModelConfig) -> int:
    """Weights of linear layers, which autocast copies once per micro-batch; the head's too."""
    linear = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(model).items()
        if len(shape) == 2 and name.endswith(".weight") and not name.startswith(("embed.", "head."))
    )
    return linear + model.vocab_size * model.d_model


def _block_bytes(model: ModelConfig, tokens: int, sequences: int, low: int) -> tuple[dict[str, int], int]:
    """One block: bytes kept for backward by part, and bytes that exist only while chunks are recomputed.

    The factors count tensors that autograd keeps per token: `low` bytes each where autocast makes them, 4 where not.
    """
    width = model.d_model
    kept: dict[str, int] = {}
    passing = 0
    if model.arch == "hope":
        kept["projections, convolution, norms"] = (22 + 5 * low) * width * tokens
        memory, values = model.memory, saved_memory_values(model)
        per_token = {group: FP32 * model.n_heads * value for group, value in values.items()}
        every = memory.save_every
        if every == 1:
            kept["memories inside their chunks"] = round(sum(per_token.values()) * tokens)
        else:
            # What goes into the scans: z and static q; of two scans also k, v (adaptive q), eta, alpha.
            inputs = (2 - memory.adaptive_q) * width
            if "joint" not in values:
                inputs = 4 * width + 2 * model.n_heads
            kept["inputs of the memories"] = FP32 * inputs * tokens
            kept[f"every {every}th chunk state"] = round(saved_state_bytes(model) * tokens / every)
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
        kept["attention and its norm"] = (16 + 4 * low) * width * tokens
    hidden = [(model.mlp_width or 0, True)] if model.arch == "transformer_pp" else []
    hidden += [(level.width, level.activation == "swiglu") for level in model.cms.levels]
    mlp = sum(12 * width + (4 if gated else 2) * low * inner for inner, gated in hidden)
    kept["MLP" if model.arch == "transformer_pp" else "CMS levels"] = mlp * tokens
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
