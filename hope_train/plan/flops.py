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
    for product in memory_products(memory, model.head_dim):
        yield Term("memory", product.name, 2.0 * model.n_heads * product.counted)


@dataclass(frozen=True)
class Product:
    """A product of the memories, in multiply-adds per token and head."""

    name: str
    counted: float
    """By the convention: triangular ones at half, a triangular inverse C^2 / 6."""

    executed: float
    """What the chunk functions compute: triangular ones whole."""


def memory_products(memory: MemoryConfig, n: int) -> list[Product]:
    """The products of the chunk-parallel form (`hope_train.memory.pieces`), whole chunks.

    Rows of one number (W1 of eta and alpha) are read by sums, not products, and left out; so is the substitution into
    16 x 16 blocks on the diagonal of an inverse from what is executed.
    """
    wide = len(memory_boxes(memory)) - len(SCALAR_BOXES)
    if memory.chunk_size == memory.generator_chunk_size:
        found = [*_group_products(memory, n, len(SCALAR_BOXES), wide, memory.chunk_size, wide - 1, True)]
    else:
        size = memory.generator_chunk_size
        found = [*_group_products(memory, n, len(SCALAR_BOXES), wide - 1, size, wide - 1, False)]
        found += _group_products(memory, n, 0, 1, memory.chunk_size, 0, True)
    products: dict[str, Product] = {}
    for name, counted, executed in found:
        known = products.get(name, Product(name, 0.0, 0.0))
        products[name] = Product(name, known.counted + counted, known.executed + executed)
    return [product for product in products.values() if product.executed or product.counted]


def _group_products(
    memory: MemoryConfig, n: int, scalars: int, matrices: int, chunk: int, generators: int, read: bool
) -> Iterator[tuple[str, float, float]]:
    """(name, counted, executed) of one group: `generators` of its matrix boxes make k, v (q), `read`: one answers."""

    def whole(name: str, multiply_adds: float) -> tuple[str, float, float]:
        return name, multiply_adds, multiply_adds

    def triangular(name: str, widths: float) -> tuple[str, float, float]:
        """A C x C factor applied to (or made of) so many columns."""
        return f"{name} (triangular)", widths * chunk / 2, float(widths * chunk)

    is_mlp = memory.kind == "mlp"
    hidden = memory.expansion * n
    last = hidden if is_mlp else n  # rows of the read box among those that share the keys
    scalar_rows = scalars * hidden if is_mlp else scalars
    rows = scalar_rows + matrices * last
    w1 = matrices * n * hidden if is_mlp else 0
    state = rows * n + w1
    to_init, momentum = memory.decay_to == "init", memory.momentum
    solved_w1 = is_mlp and memory.rank_one == "both"
    if generators:
        own_w1 = generators * n * hidden if is_mlp else 0
        yield whole("generators read at the chunk's first state", (scalar_rows + generators * last) * n + own_w1)
    yield whole("targets M(v) of every memory", state)
    yield whole("M(k) of every memory", state)
    yield whole("gradient through W1", w1)
    if to_init:
        yield whole("W_init at the keys", rows * n + (w1 if solved_w1 else 0))
    yield triangular("key products k k^T", n)
    inverses = 1 + (matrices if solved_w1 else 0)
    if solved_w1:
        yield triangular("hidden products h h^T", (matrices + scalars) * hidden)
    yield "triangular inverses", inverses * chunk * chunk / 6, float(inverses * _inverse_products(chunk))
    # Rows that are read inside the chunk need writes; for the others one solve with the keys does (`solve_unread`).
    alone = read and rows == last
    solved = rows if momentum or alone else n + (last if read else 0)
    yield triangular("inverses applied", solved + (matrices * n if solved_w1 else 0))
    commits = state + (scalars * hidden if is_mlp else 0)
    if not (momentum and is_mlp and not solved_w1):
        yield whole("chunk commits", commits)
    else:  # W1 has no rank-one factor: what is written to it is all momentum
        yield whole("chunk commits", rows * n)
    if momentum:
        yield triangular("momentum: second decay", 2 * chunk)
        yield whole("momentum: second decay of carried speeds", 2 * chunk)
        yield whole("momentum: carried speeds at the keys", rows * n + (w1 if solved_w1 else 0))
        yield whole("momentum: commits", 2 * commits)
        inner = (matrices + scalars) * hidden + matrices * n + scalars if solved_w1 else 0
        yield triangular("momentum: writes inside the chunk", n + rows + inner)
    if not read:
        return
    own = last * n + (n * hidden if is_mlp else 0)
    yield whole("output read: state", own)
    if memory.read == "start":
        return
    if to_init:
        yield whole("output read: W_init", own)
    # Two passes of (queries x keys, then weights x writes) for an MLP, one for a linear memory.
    pairs = 2 * n + 2 * hidden if is_mlp else 2 * n
    first = 2 * n if not is_mlp else n + hidden
    yield triangular("output read: inside the chunk", pairs if not momentum or solved_w1 or not is_mlp else first)
    if momentum:
        yield whole("momentum: output read of carried speeds", own)
        yield triangular("momentum: output read inside the chunk", pairs)


def _inverse_products(chunk: int) -> int:
    """Multiply-adds per token of block elimination (`hope_train.memory.triangular`): w^2 for each level of width w."""
    if chunk % 16 or (chunk // 16) & (chunk // 16 - 1):
        return 0
    return sum((16 << level) ** 2 for level in range((chunk // 16).bit_length() - 1))
