"""FLOPs per token against published arithmetic and against torch's own counter on the built model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hope_train.config.model import MemoryConfig, ModelConfig
from hope_train.config.train import TrainConfig
from hope_train.memory import chunked
from hope_train.memory.rules import parameter_shapes
from hope_train.model.hope import build_model
from hope_train.plan.flops import count_flops, layer_terms, memory_products


def mixer_mflop(**model):
    """Forward MFLOP per token of one mixer at width 2048, context 4096."""
    config = ModelConfig.model_validate({"d_model": 2048, "n_layers": 1, **model})
    return sum(term.flops for term in layer_terms(config, 4096) if term.part not in ("cms", "mlp")) / 1e6


@pytest.mark.parametrize(
    ("heads", "expansion", "estimate"), [(32, 1, 39.5), (32, 4, 79.6), (16, 1, 51.2)], ids=["n64e1", "n64e4", "n128e1"]
)
def test_memories_cost_at_most_what_the_design_says(heads, expansion, estimate):
    """The estimate solves for the writes to every memory; the code solves once for all rows that share keys."""
    levels = [{"width": 8}]
    counted = mixer_mflop(arch="hope", n_heads=heads, memory={"expansion": expansion}, cms={"levels": levels})
    assert 0.97 * estimate < counted < estimate


def test_attention_costs_what_the_design_says():
    assert mixer_mflop(arch="transformer_pp", n_heads=32, mlp_width=8) == pytest.approx(50.3, abs=0.05)


def run_and_count(tokens=256, **model):
    """(what torch counted in the forward pass, what we count), both per token."""
    config = ModelConfig.model_validate({"d_model": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 32, **model})
    built = build_model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.zeros(1, tokens, dtype=torch.int64))
    flops = count_flops(config, TrainConfig(context_length=tokens, batch_tokens=4 * tokens))
    return counter.get_total_flops() / tokens, flops


@pytest.mark.parametrize(
    "model",
    [
        {"arch": "transformer_pp", "mlp_width": 48},
        {"arch": "hope_attention", "cms": {"levels": [{"width": 32}, {"width": 24, "activation": "gelu"}]}},
    ],
    ids=["transformer_pp", "hope_attention"],
)
def test_projections_and_mlps_are_exact(model):
    """torch's counter knows none of CPU attention, so ours are taken off; everything else agrees to the last FLOP."""
    counted, flops = run_and_count(**model)
    attention = flops.n_layers * flops.by_part()["attention"]
    assert flops.forward - attention == counted


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"kind": "linear"},
        {"expansion": 2},
        {"decay_to": "zero"},
        {"rank_one": "w2"},
        {"read": "start"},
        {"adaptive_q": True, "in_proj": False},
        {"generator_chunk_size": 32},
        {"momentum": True},
    ],
    ids=str,
)
def test_memories_execute_little_more_than_is_counted(memory):
    """Triangular products are executed whole and counted at half, so the model executes somewhat more, never less."""
    counted, flops = run_and_count(arch="hope", cms={"levels": [{"width": 8}]}, memory=memory)
    assert 0.95 < counted / flops.forward < 1.45


@pytest.mark.parametrize("chunks", [(16, 16), (64, 64), (64, 32), (16, 64)], ids=str)
@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"expansion": 2},
        {"kind": "linear"},
        {"decay_to": "zero"},
        {"rank_one": "w2"},
        {"read": "start"},
        {"adaptive_q": True},
        {"momentum": True},
        {"momentum": True, "rank_one": "w2"},
        {"momentum": True, "kind": "linear"},
    ],
    ids=str,
)
def test_products_of_the_memories_are_those_executed(memory, chunks):
    """Every product of the chunk functions is in the list: torch's counter agrees to the last multiply-add."""
    config = MemoryConfig.model_validate({**memory, "chunk_size": chunks[0], "generator_chunk_size": chunks[1]})
    width, tokens = 16, 64
    init = {name: torch.ones(shape) for name, shape in parameter_shapes(config, 1, width).items()}
    z = torch.ones(1, tokens, 1, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunked.run(config, z, None if config.adaptive_q else z, init)
    products = memory_products(config, width)
    assert 2 * tokens * sum(product.executed for product in products) == counter.get_total_flops()
    assert all(
        product.counted in (product.executed, product.executed / 2) or "inverses" in product.name
        for product in products
    )


def test_training_is_three_times_forward_and_recomputation_is_apart():
    model = ModelConfig.model_validate({"arch": "hope", "memory": {"save_every": 4}, "cms": {"levels": [{"width": 8}]}})
    every = model.model_copy(update={"memory": model.memory.model_copy(update={"save_every": 1})})
    plain = count_flops(every, TrainConfig())
    saved = count_flops(model, TrainConfig())
    both = count_flops(model, TrainConfig(recompute=True))
    assert plain.training == 3 * plain.forward == saved.training == both.training
    memory = model.n_layers * plain.by_part()["memory"]
    assert (plain.recompute, saved.recompute) == (0.0, pytest.approx(memory))
    assert both.recompute == pytest.approx(model.n_layers * plain.layer + memory)


def test_attention_grows_with_the_context_and_hope_does_not():
    hope = ModelConfig.model_validate({"arch": "hope", "cms": {"levels": [{"width": 8}]}})
    twin = ModelConfig.model_validate({"arch": "transformer_pp", "mlp_width": 8})

    def per_token(model, context):
        return count_flops(model, TrainConfig(context_length=context, batch_tokens=context * 4)).forward

    assert per_token(hope, 4096) == per_token(hope, 512)
    assert per_token(twin, 4096) > per_token(twin, 512)
