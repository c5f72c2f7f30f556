"""Memory terms against what torch really holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hope_train.config.load import load_config
from hope_train.config.train import OptimizerConfig
from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from hope_train.memory import chunked
from hope_train.memory.rules import parameter_shapes
from hope_train.model.hope import build_model
from hope_train.plan.footprint import (
    saved_memory_values,
    state_bytes_per_sequence,
    training_footprint,
)

FOLDER = Path(__file__).resolve().parents[2] / "configs"


def run_config(train=None, **model):
    return RunConfig.model_validate(
        {
            "model": {"d_model": 128, "n_layers": 2, "n_heads": 2, "vocab_size": 64, **model},
            "train": {"context_length": 256, "batch_tokens": 512, "micro_batch_size": 2, **(train or {})},
        }
    )


HOPE = {"arch": "hope", "cms": {"levels": [{"width": 96}, {"width": 64, "period": 4}, {"width": 32, "period": 8}]}}


def named(config, prefix):
    return sum(item.bytes for item in training_footprint(config).items if item.name.startswith(prefix))


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_optimizer_state_is_exact(variant):
    levels = [{"width": 16, "period": 1}, {"width": 24, "period": 2}, {"width": 8, "period": 4}]
    config = run_config(arch="hope", cms={"variant": variant, "levels": levels})
    model = build_model(config.model)
    optimizer = build_optimizer(model.named_parameters(), config)
    optimizer.materialize_state()
    held: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, tensor in state.items():
            held[key] = held.get(key, 0) + tensor.nbytes
    assert named(config, "AdamW moments") == held["exp_avg"] + held["exp_avg_sq"]
    assert named(config, "accumulators") == held["accumulator"]
    assert named(config, "initial states") == held.get("anchor", 0)
    assert named(config, "parameters") == sum(p.nbytes for p in model.parameters())


def test_moments_that_rest_are_not_on_the_device():
    levels = [{"width": 16, "period": 1}, {"width": 24, "period": 2}, {"width": 8, "period": 4}]
    config = run_config(arch="hope", cms={"levels": levels})
    resting = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"rest_from_period": 2})})
    model = build_model(config.model)
    optimizer = build_optimizer(model.named_parameters(), resting)
    optimizer.materialize_state()
    slow = [p for name, p in model.named_parameters() if ".levels.1." in name or ".levels.2." in name]
    away = sum(optimizer.state[p][key].nbytes for p in slow for key in ("exp_avg", "exp_avg_sq"))
    without, found = training_footprint(config), training_footprint(resting)
    assert found.on_host == away
    assert without.on_host == 0
    assert named(config, "AdamW moments") == named(resting, "AdamW moments"), "none are lost"
    assert named(resting, "moments that rest") == away, "less than what is on the device at once"
    lasting = [
        sum(item.bytes for item in each.items if not item.transient and not item.on_host) for each in (without, found)
    ]
    assert lasting[0] - lasting[1] == away
    on_cpu = training_footprint(resting, on_accelerator=False)
    assert on_cpu.on_host == 0
    assert on_cpu.peak >= training_footprint(config, on_accelerator=False).peak


@pytest.mark.parametrize("rule", ["sgd", "muon", "m3", "delta_momentum", "deep_momentum", "dgd"])
def test_states_of_other_rules_are_exact(rule):
    levels = [{"width": 16, "period": 1}, {"width": 24, "period": 2}]
    config = run_config(arch="hope", cms={"levels": levels})
    config = config.model_copy(update={"optimizer": OptimizerConfig(name=rule, embeddings="sgd")})
    model = build_model(config.model)
    optimizer = build_optimizer(model.named_parameters(), config)
    optimizer.materialize_state()
    held = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if tensor.ndim and key != "accumulator"
    )
    assert named(config, "states of the rules") == held


def measured_activations(config):
    """Bytes of distinct storages that autograd keeps, parameters and casts of them left out, per layer."""

    def total(layers):
        model = build_model(config.model.model_copy(update={"n_layers": layers})).train()
        known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        sizes = {tuple(p.shape) for p in matrices} | {tuple(p.mT.shape) for p in matrices}
        seen: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor):
            key = tensor.untyped_storage().data_ptr()
            if key not in known and not (tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in sizes):
                seen[key] = (tensor.untyped_storage().nbytes(), tensor)  # kept alive: no address is used twice
            return tensor

        tokens = torch.zeros(config.train.micro_batch_size, config.train.context_length, dtype=torch.int64)
        low = config.train.precision == "bf16"
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=low),
        ):
            kept = model.hidden(tokens)
        assert kept.requires_grad
        return sum(size for size, _ in seen.values())

    return total(2) - total(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        HOPE,
        {**HOPE, "memory": {"kind": "linear"}},
        {**HOPE, "memory": {"expansion": 2}},
        {**HOPE, "memory": {"generator_chunk_size": 32}},
        {**HOPE, "memory": {"chunk_size": 16, "generator_chunk_size": 16}},
        {"arch": "hope_attention", "cms": {"levels": [{"width": 96}, {"width": 64, "activation": "gelu"}]}},
        {"arch": "transformer_pp", "mlp_width": 320},
    ],
    ids=["hope", "linear", "expansion2", "generators32", "chunk16", "hope_attention", "transformer_pp"],
)
def test_activations_are_what_autograd_keeps(model, precision):
    """One layer's activations. If this fails, the model keeps other tensors than `footprint` counts: recount there."""
    config = run_config(train={"precision": precision}, **model)
    assert named(config, "activations") / 2 == pytest.approx(measured_activations(config), rel=0.06)


def kept_by_the_memories(model, tokens):
    """Numbers that autograd keeps of one layer's memories, two sequences of `tokens`, initial states left out."""
    shapes = parameter_shapes(model.memory, model.n_heads, model.head_dim)
    init = {name: (0.1 * torch.randn(shape)).requires_grad_() for name, shape in shapes.items()}
    z = torch.randn(2, tokens, model.n_heads, model.head_dim, requires_grad=True)
    q = None if model.memory.adaptive_q else torch.randn_like(z, requires_grad=True)
    known = {weight.untyped_storage().data_ptr() for weight in init.values()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked.run(model.memory, z, q, init)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / 4


@pytest.mark.parametrize("chunks", [(16, 16), (64, 64), (64, 16), (16, 32)], ids=str)
@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"expansion": 3},
        {"kind": "linear"},
        {"clamp": None},
        {"adaptive_q": True},
        {"momentum": True},
        {"kind": "linear", "adaptive_q": True},
        {"kind": "linear", "momentum": True},
        {"adaptive_q": True, "momentum": True},
    ],
    ids=str,
)
def test_memories_keep_what_is_counted(memory, chunks):
    main, generators = chunks
    memory = {**memory, "chunk_size": main, "generator_chunk_size": generators}
    model = run_config(**HOPE | {"d_model": 48, "memory": memory}).model
    per_token = (kept_by_the_memories(model, 256) - kept_by_the_memories(model, 128)) / 128 / 2 / model.n_heads
    assert sum(saved_memory_values(model).values()) == pytest.approx(per_token, rel=0.02)


@pytest.mark.parametrize("memory", [{"decay_to": "zero"}, {"rank_one": "w2"}, {"read": "start"}], ids=str)
def test_other_memories_keep_no_more(memory):
    model = run_config(**HOPE | {"memory": memory}).model
    per_token = (kept_by_the_memories(model, 256) - kept_by_the_memories(model, 128)) / 128 / 2 / model.n_heads
    assert sum(saved_memory_values(model).values()) >= per_token


def test_inference_state_of_hope_is_constant_and_that_of_attention_grows():
    hope, twin = run_config(**HOPE), run_config(arch="transformer_pp", mlp_width=64)
    assert state_bytes_per_sequence(hope.model, 100) == state_bytes_per_sequence(hope.model, 100_000)
    assert state_bytes_per_sequence(twin.model, 2000) == 2 * state_bytes_per_sequence(twin.model, 1000)


def test_fast_weights_of_the_design():
    """4.2 MB of fast weights per sequence and layer at width 2048, heads of 64, fp32; the state holds them twice."""
    config = load_config(FOLDER / "hope_1b3.yaml").model
    per_layer = state_bytes_per_sequence(config, 4096) / config.n_layers
    assert per_layer / 2 == pytest.approx(4.2e6, rel=0.01)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"micro_batch_size": 1}, {"micro_batch_size": 2}),
        ({"recompute": True}, {"recompute": False}),
        ({"context_length": 128, "micro_batch_size": 2}, {"context_length": 256}),
    ],
    ids=["micro_batch", "recompute", "context"],
)
@pytest.mark.parametrize("model", [HOPE, {"arch": "transformer_pp", "mlp_width": 320}], ids=["hope", "twin"])
def test_more_work_at_once_needs_more(small, large, model):
    assert training_footprint(run_config(small, **model)).peak < training_footprint(run_config(large, **model)).peak


def test_saving_fewer_chunk_states_needs_less():
    train = {"context_length": 4096, "batch_tokens": 8192}
    peaks = [training_footprint(run_config(train, **HOPE, memory={"save_every": n})).peak for n in (1, 8)]
    assert peaks[1] < 0.5 * peaks[0]
