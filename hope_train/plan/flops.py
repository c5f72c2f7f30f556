"""Floating-point operations per token, as a list of named matrix products (no torch).

Convention, printed with every plan: a multiply-add is 2 FLOPs; matrix products only (norms, activations, softmax and
the optimizer are left out); what is causal or triangular counts half, as in causal attention; the backward pass is
twice the forward pass; recomputation is stated apart and not part of the model's FLOPs that MFU refers to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hope_train.config.model import MemoryConfig, ModelConfig
from hope_train.config.train import TrainConfig
from hope_train.plan.parameters import SCALAR_BOXES, memory_boxes

CONVENTION = (
    "multiply-add = 2 FLOPs, matrix products only, causal and triangular products at half, "
    "backward = 2x forward, recomputation apart"
)


@dataclass(frozen=True)
class Term:
    """One named matrix product: its forward FLOPs per token in one layer (or in the output head)."""

    part: str
    name: str
    flops: float


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per token of the whole model."""

    layer_terms: tuple[Term, ...]
    """The products of ONE layer, forward."""

    n_layers: int
    head: float
    """The output head, forward."""

    recompute: float
    """Extra forward work in the backward pass (`train.recompute`, `memory.save_every`), all layers."""

    recompute_memory: float
    """The part of it that the memories do."""

    @property
    def layer(self) -> float:
        """Forward FLOPs per token of one layer."""
        return sum(term.flops for term in self.layer_terms)

    @property
    def forward(self) -> float:
        """Forward FLOPs per token of the model."""
        return self.n_layers * self.layer + self.head

    @property
    def training(self) -> float:
        """Forward and backward, without recomputation: what MFU refers to."""
        return 3 * self.forward

    @property
    def executed(self) -> float:
        """Forward, backward and recomputation."""
        return self.training + self.recompute

    def by_part(self) -> dict[str, float]:
        """Forward FLOPs per token of one layer, summed by part."""
        parts: dict[str, float] = {}
        for term in self.layer_terms:
            parts[term.part] = parts.get(term.part, 0.0) + term.flops
        return parts


def count_flops(model: ModelConfig, train: TrainConfig) -> FlopCount:
    """FLOPs per token at the run's context length."""
    terms = tuple(layer_terms(model, train.context_length))
    layer = sum(term.flops for term in terms)
    memory = sum(term.flops for term in terms if term.part == "memory")
    saved = model.arch == "hope" and model.memory.save_every > 1
    recompute_memory = model.n_layers * memory * (train.recompute + saved)
    recompute = recompute_memory + (model.n_layers * (layer - memory) if train.recompute else 0.0)
    head = 2.0 * model.d_model * model.vocab_size
    return FlopCount(terms, model.n_layers, head, recompute, recompute_memory)


def layer_terms(model: ModelConfig, context: int) -> Iterator[Term]:
    """The matrix products of one block on sequences of `context` tokens, forward FLOPs per token."""
    width = model.d_model
    if model.arch == "hope":
        yield from _hope_mixer_terms(model)
    else:
        for name in ("q", "k", "v", "out"):
            yield Term("projections", f"{name} projection", 2.0 * width * width)
        yield Term("attention", "scores q k^T (causal half)", 2.0 * width * context / 2)
        yield Term("attention", "weighted sum of values (causal half)", 2.0 * width * context / 2)
    if model.arch == "transformer_pp":
        yield Term("mlp", "SwiGLU MLP", 2.0 * 3 * width * (model.mlp_width or 0))
    for index, level in enumerate(model.cms.levels):
        matrices = 3 if level.activation == "swiglu" else 2
        name = f"level {index} ({level.activation}, width {level.width})"
        yield Term("cms", name, 2.0 * matrices * width * level.width)


def _hope_mixer_terms(model: ModelConfig) -> Iterator[Term]:
    memory, width = model.memory, model.d_model
    square = 2.0 * width * width
    if memory.in_proj:
        yield Term("projections", "in projection W_x", square)
    if not memory.adaptive_q:
        yield Term("projections", "query projection W_q", square)
    yield Term("projections", "out projection W_o", square)
    if memory.conv_width > 1:
        yield Term("projections", f"depthwise convolution, window {memory.conv_width}", 2.0 * width * memory.conv_width)
    for name, multiply_adds in _memory_multiply_adds(memory, model.head_dim):
        yield Term("memory", name, 2.0 * model.n_heads * multiply_adds)


def _memory_multiply_adds(memory: MemoryConfig, n: int) -> Iterator[tuple[str, float]]:
    """Multiply-adds per token and head of the chunk-parallel form.

    With e n = E, output width o (n, or 1 for eta and alpha) and chunk C of the memory in question: a read of the
    chunk's first state costs E n + o E, a triangular C x C product with a width-x factor C x / 2 per token, a
    triangular inverse C^2 / 6 per token.
    """
    boxes = [(box, 1 if box in SCALAR_BOXES else n) for box in memory_boxes(memory)]
    chunk = {box: memory.chunk_size if box == "mem" else memory.generator_chunk_size for box, _ in boxes}
    distinct = sorted(set(chunk.values()))
    generators = [(box, o) for box, o in boxes if box != "mem"]
    is_mlp = memory.kind == "mlp"
    hidden = memory.expansion * n if is_mlp else 0
    solved_w1 = is_mlp and memory.rank_one == "both"

    def state(o: int) -> float:
        return hidden * n + o * hidden if is_mlp else o * n

    yield "generators read at the chunk's first state", float(sum(state(o) for _, o in generators))
    yield "targets M(v) of every memory", float(sum(state(o) for _, o in boxes))
    yield "pre-activations at the keys", float(sum(state(o) for _, o in boxes))
    if is_mlp:
        yield "gradient through W1", float(sum(o * hidden for _, o in boxes))
    if memory.decay_to == "init":
        yield "W_init at the keys", float(sum(state(o) for _, o in boxes))
    yield "key products k k^T (triangular)", sum(n * size / 2 for size in distinct)
    if solved_w1:
        yield "hidden products h h^T (triangular)", sum(hidden * chunk[box] / 2 for box, _ in boxes)
    inverted = distinct + ([chunk[box] for box, _ in boxes] if solved_w1 else [])
    yield "triangular inverses", sum(size * size / 6 for size in inverted)
    first = sum((hidden if is_mlp else o) * chunk[box] / 2 for box, o in boxes)
    second = sum(o * chunk[box] / 2 for box, o in boxes) if solved_w1 else 0.0
    yield "inverses applied to the right-hand sides (triangular)", first + second
    yield "chunk commits", float(sum(state(o) for _, o in boxes))
    if memory.momentum:
        yield "momentum: second decay (triangular)", sum(4 * size * size / 2 for size in distinct)
        yield "momentum: carried speeds and their commits", 3.0 * sum(state(o) for _, o in boxes)
        inner = sum((n + hidden if is_mlp else n + o) * chunk[box] / 2 for box, o in boxes)
        outer = sum((hidden + o) * chunk[box] / 2 for box, o in boxes) if is_mlp else 0.0
        yield "momentum: writes inside the chunk (triangular)", inner + outer
    yield "output read: state", float(state(n))
    if memory.read == "start":
        return
    if memory.decay_to == "init":
        yield "output read: W_init", float(state(n))
    own = chunk["mem"]
    # Two passes of (queries x keys, then weights x right-hand sides) for an MLP, one for a linear memory.
    inside = (n + hidden + hidden + n) * own / 2 if is_mlp else (n + n) * own / 2
    yield "output read: inside the chunk (triangular)", inside
