"""The whole model: gradients everywhere, the recurrent form, documents, recompute, initial weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hope_train.model.hope import HopeModel, build_model
from hope_train.model.self_modifying import TitansState
from tests.model.small import ARCHITECTURES, CHUNK, gradients, relative, small_config, small_model, text

BAR = 1e-10
TOKENS = 29  # no multiple of the chunk
MEMORIES: list[dict[str, Any]] = [
    {"kind": kind, "adaptive_q": adaptive_q, "momentum": momentum}
    for kind in ("mlp", "linear")
    for adaptive_q in (False, True)
    for momentum in (False, True)
]


def describe(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


# Gradients


@pytest.mark.parametrize("memory", MEMORIES, ids=describe)
@pytest.mark.parametrize("read", ["after", "before", "start"])
def test_every_parameter_gets_a_gradient_from_the_loss(memory: dict[str, Any], read: str) -> None:
    """All initial states and theta included: nothing on the way through the writes is detached."""
    model = small_model(memory={**memory, "read": read})
    got = gradients(model, text(2, TOKENS), text(2, TOKENS, 1))
    assert got.keys() == dict(model.named_parameters()).keys()
    boxes = {"k", "v", "eta", "alpha", "mem"} | ({"q"} if memory["adaptive_q"] else set())
    names = ["w"] if memory["kind"] == "linear" else ["w1", "w2"]
    wanted = {f"{name}_{box}" for name in names for box in boxes} | ({"theta_logit"} if memory["momentum"] else set())
    for number in range(2):
        prefix = f"blocks.{number}.mixer.memory."
        assert {name.removeprefix(prefix) for name in got if name.startswith(prefix)} == wanted
    seen = set(text(2, TOKENS).flatten().tolist())
    for name, grad in got.items():
        assert grad.isfinite().all(), name
        rows = grad[sorted(seen)] if name == "embed.weight" else grad
        # Every head of every matrix, not only some of them; 1e-7 is far above rounding and below all that is measured.
        assert rows.flatten(1).norm(dim=1).min() > 1e-7 if rows.ndim > 1 else rows.abs().max() > 1e-7, name


@pytest.mark.parametrize("arch", ["hope_attention", "transformer_pp"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_the_relatives_gets_a_gradient(arch: str, tied: bool) -> None:
    model = small_model(arch, tie_embeddings=tied)
    got = gradients(model, text(2, TOKENS), text(2, TOKENS, 1))
    assert got.keys() == dict(model.named_parameters()).keys()
    assert ("head.weight" in got) is not tied
    assert all(grad.norm() > 1e-7 for grad in got.values())


def test_gradients_are_those_of_finite_differences() -> None:
    """Along random directions of all initial states at once, through three chunks."""
    model = small_model(n_layers=1)
    tokens, targets = text(2, TOKENS), text(2, TOKENS, 1)
    got = gradients(model, tokens, targets)
    generator = torch.Generator().manual_seed(2)
    for name in [name for name in got if ".memory." in name]:
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):  # to +1e-5, then from there to -1e-5
                parameter.add_(direction, alpha=step)
                total, count = model.loss(tokens, targets)
                losses.append((total / count).item())
            parameter.add_(direction, alpha=1e-5)
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx((got[name] * direction).sum().item(), rel=1e-5, abs=1e-9), name


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, tokens, targets = small_model(), text(2, TOKENS), text(2, TOKENS, 1)
    targets[0, :5] = -100
    total, count = model.loss(tokens, targets, chunk=7)
    want = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    assert count == 2 * TOKENS - 5
    assert relative(total, want) < 1e-12


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("position", [0, 3, CHUNK - 1, CHUNK, 20])
def test_no_token_sees_a_later_one(arch: str, position: int) -> None:
    model, tokens = small_model(arch), text(2, TOKENS)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 23
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] - after[:, position:]).abs().amax((1, 2)).min() > 1e-3
    # ... and far ahead the change is still felt: something remembers.
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-9


# The recurrent form


def stepped(model: HopeModel, tokens: Tensor, cuts: list[int], starts: Tensor | None = None) -> Tensor:
    """Logits of `step` over pieces that begin at 0 and at each of `cuts`."""
    state = model.initial_state(tokens.shape[0])
    parts = []
    for first, last in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        here = None if starts is None else starts[:, first:last]
        logits, state = model.step(tokens[:, first:last], state, here)
        parts.append(logits)
    return torch.cat(parts, 1)


def boundaries(rows: int, tokens: int) -> Tensor:
    """First tokens of documents: at a chunk's edge, inside one, several in one, two in a row; rows differ."""
    starts = torch.zeros(rows, tokens, dtype=torch.bool)
    starts[0, [CHUNK, CHUNK + 3, CHUNK + 4, 22]] = True
    starts[1, [0, 5, 2 * CHUNK]] = True
    return starts


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("hope_attention", {}),
    ("transformer_pp", {}),
    ("hope", {}),
    ("hope", {"memory": {"kind": "linear"}}),
    ("hope", {"memory": {"adaptive_q": True, "momentum": True}}),
    ("hope", {"memory": {"chunk_size": 8, "generator_chunk_size": 4, "read": "before"}}),
    ("hope", {"memory": {"chunk_size": 4, "generator_chunk_size": 8, "read": "start", "decay_to": "zero"}}),
    ("hope", {"memory": {"conv_width": 1, "in_proj": False}}),
    ("hope", {"memory": {"conv_width": 7, "clamp": 1.02}}),
]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("arch", "changes"), VARIANTS, ids=describe)
def test_prefill_then_token_by_token_equals_the_full_forward(
    arch: str, changes: dict[str, Any], documents: bool
) -> None:
    """Prefill of every length from 1 on, splits inside a chunk and inside the convolution's window included."""
    model, tokens = small_model(arch, **changes), text(2, TOKENS)
    starts = boundaries(2, TOKENS) if documents else None
    with torch.no_grad():
        whole = model(tokens, starts)
        for prefill in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 20, TOKENS):
            logits = stepped(model, tokens, list(range(prefill, TOKENS)), starts)
            assert relative(logits, whole) < BAR, prefill


@settings(max_examples=20)
@given(
    cuts=st.lists(st.integers(1, TOKENS - 1), max_size=8, unique=True),
    arch=st.sampled_from(ARCHITECTURES),
    first=st.sets(st.integers(0, TOKENS - 1), max_size=5),
)
def test_any_pieces_equal_the_full_forward(cuts: list[int], arch: str, first: set[int]) -> None:
    model, tokens = small_model(arch), text(2, TOKENS, 5)
    starts = torch.zeros(2, TOKENS, dtype=torch.bool)
    starts[1, sorted(first)] = True
    with torch.no_grad():
        assert relative(stepped(model, tokens, sorted(cuts), starts), model(tokens, starts)) < BAR


def test_a_state_can_be_used_again() -> None:
    """Steps do not write into the state they are given: several continuations may start from one prefix."""
    for arch in ARCHITECTURES:
        model, tokens = small_model(arch), text(2, TOKENS)
        with torch.no_grad():
            _, state = model.step(tokens[:, :11], model.initial_state(2))
            first, _ = model.step(tokens[:, 11:], state)
            model.step(text(2, 6, 9), state)
            again, _ = model.step(tokens[:, 11:], state)
        assert torch.equal(first, again)


def state_bytes(state: Any) -> int:
    """Bytes of all distinct tensors in a state."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), storage.nbytes() if value.numel() else 0)
        elif dataclasses.is_dataclass(value):
            for entry in dataclasses.fields(value):
                walk(getattr(value, entry.name))
        elif isinstance(value, dict):
            for entry in value.values():
                walk(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                walk(entry)

    walk(state)
    return sum(seen.values())


def test_hopes_state_is_constant_in_the_context_length() -> None:
    """Counted is the storage behind it, so that a view of something longer counts whole. Attention's state grows."""
    grown = {}
    for arch in ("hope", "hope_attention"):
        model = small_model(arch)
        sizes = []
        with torch.no_grad():
            for tokens in (CHUNK + 1, 5 * CHUNK + 1, 25 * CHUNK + 1):
                _, state = model.step(text(1, tokens), model.initial_state(1))
                sizes.append(state_bytes(state))
        grown[arch] = sizes
    assert grown["hope"][0] == grown["hope"][1] == grown["hope"][2]
    assert grown["hope_attention"][2] > 10 * grown["hope_attention"][0]


# Documents


@pytest.mark.parametrize(("arch", "changes"), VARIANTS, ids=describe)
def test_a_document_gives_what_it_gives_alone(arch: str, changes: dict[str, Any]) -> None:
    """Documents of a packed row that begin where a chunk does: convolution, attention and memories start afresh."""
    model, tokens = small_model(arch, **changes), text(1, 5 * CHUNK)
    edges = [0, CHUNK, 3 * CHUNK, 5 * CHUNK]
    starts = torch.zeros(1, 5 * CHUNK, dtype=torch.bool)
    starts[0, edges[:-1]] = True
    with torch.no_grad():
        packed, merged = model(tokens, starts), model(tokens)
        for first, last in itertools.pairwise(edges):
            alone = model(tokens[:, first:last])
            assert relative(packed[:, first:last], alone) < BAR
            assert first == 0 or relative(merged[:, first:last], alone) > 1e-3


@pytest.mark.parametrize("first", [1, 3, CHUNK - 1, CHUNK + 5])
@pytest.mark.parametrize(("arch", "changes"), VARIANTS, ids=describe)
def test_a_document_may_begin_inside_a_chunk(arch: str, changes: dict[str, Any], first: int) -> None:
    """It gives what it gives alone from that place in the chunk: chunks count from the row's start."""
    model, tokens = small_model(arch, **changes), text(2, TOKENS)
    starts = torch.zeros(2, TOKENS, dtype=torch.bool)
    starts[:, first] = True
    state = model.initial_state(2)
    for block in state.blocks.values():
        if isinstance(block, TitansState):
            block.memory.position = first
    with torch.no_grad():
        alone, _ = model.step(tokens[:, first:], state)
        assert relative(model(tokens, starts)[:, first:], alone) < BAR


# What must not change the result


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_recompute_changes_no_gradient(arch: str) -> None:
    model, tokens, targets, starts = small_model(arch), text(2, TOKENS), text(2, TOKENS, 1), boundaries(2, TOKENS)
    want = gradients(model, tokens, targets, starts)
    model.recompute = True
    got = gradients(model, tokens, targets, starts)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("chunks", [{}, {"generator_chunk_size": CHUNK // 2}])
def test_recomputing_chunk_states_changes_no_gradient(chunks: dict[str, int]) -> None:
    tokens, targets = text(2, TOKENS), text(2, TOKENS, 1)
    kept, again = (gradients(small_model(memory={"save_every": every, **chunks}), tokens, targets) for every in (1, 3))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_bf16_autocast_keeps_the_memories_in_fp32() -> None:
    model = build_model(small_config())
    tokens, targets = text(2, TOKENS), text(2, TOKENS, 1)
    want, _ = model.loss(tokens, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = model.loss(tokens, targets)
        _, state = model.step(tokens, model.initial_state(2))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(want.item(), rel=0.02)
    for block in state.blocks.values():
        for group in block.memory.groups:
            assert all(w.dtype == torch.float32 for w in (*group.now.values(), *group.anchor.values()))
    total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes of compiling, on a machine that may be busy
@pytest.mark.parametrize("memory", [{}, {"kind": "linear", "generator_chunk_size": 4}], ids=describe)
def test_compiled_memory_gives_the_same_loss_and_gradients(memory: dict[str, Any]) -> None:
    """Two whole chunks take compiled functions, the rest of the sequence the plain ones."""
    model = build_model(small_config(n_layers=1, memory=memory))
    tokens, targets = text(2, 2 * CHUNK + 3), text(2, 2 * CHUNK + 3, 1)
    want_loss, _ = model.loss(tokens, targets)
    want = gradients(model, tokens, targets)
    model.compile_memory()
    loss, _ = model.loss(tokens, targets)
    got = gradients(model, tokens, targets)
    assert relative(loss, want_loss) < 1e-5
    assert got.keys() == want.keys()
    assert max(relative(got[name], want[name]) for name in want) < 1e-5


# Initial weights and names


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_initial_weights_come_from_the_seed_alone(arch: str) -> None:
    config = small_config(arch)
    torch.manual_seed(1)
    first = build_model(config, 3).state_dict()
    torch.manual_seed(2)
    second, other = build_model(config, 3).state_dict(), build_model(config, 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if first[name].ndim > 1]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    assert all(torch.equal(first[name], torch.ones_like(first[name])) for name in first if name not in drawn)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_built_without_memory_is_filled_to_the_same_weights(arch: str) -> None:
    """On `meta` nothing is allocated; filled later, whatever the default device is then, it is the same model."""
    config = small_config(arch)
    with torch.device("meta"):
        model = build_model(config, 3)
    assert all(p.is_meta for p in model.parameters())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model = model.to_empty(device="cpu")
    with torch.device("meta"):
        model.init_weights(3)
    want = build_model(config, 3).state_dict()
    assert {name: p.shape for name, p in want.items()} == shapes
    assert all(torch.equal(p, want[name]) for name, p in model.state_dict().items())


def test_initial_scale_of_what_writes_to_the_residual_stream() -> None:
    """init_std / sqrt(2 n_layers); memories have scales of their own, the convolution 1 / sqrt(window)."""
    model = build_model(small_config(d_model=96, n_layers=8, init_std=0.02))
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}
    assert stds["blocks.0.mixer.out_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert stds["blocks.0.cms.levels.0.down.weight"] == pytest.approx(0.02 / 4, rel=0.1)
    assert stds["blocks.0.mixer.in_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["blocks.0.mixer.conv.weight"] == pytest.approx(0.5, rel=0.1)
    assert stds["blocks.0.mixer.memory.w2_k"] == pytest.approx(48**-0.25, rel=0.05)
    assert stds["blocks.0.mixer.memory.w1_mem"] == pytest.approx(0.5 * 48**-0.5, rel=0.05)


def test_a_copy_is_independent() -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("blocks.0.mixer.memory.w2_k").zero_()
    assert model.get_parameter("blocks.0.mixer.memory.w2_k").abs().min() > 0
