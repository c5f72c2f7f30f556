"""Counted parameters against the built model's, name by name and to the last one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from hope_train.config.load import load_config
from hope_train.config.model import ModelConfig
from hope_train.levels.schedule import level_of
from hope_train.model.hope import build_model
from hope_train.plan.parameters import counts_by_component, level_counts, parameter_count, parameter_shapes

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SIZES = ("tiny", "small", "340m", "760m", "1b3")


def built_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_model(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_counted_exactly(path):
    model = load_config(path).model
    built = built_shapes(model)
    assert parameter_shapes(model) == built
    assert parameter_count(model) == sum(math.prod(shape) for shape in built.values())
    for level, count in level_counts(model).items():
        assert count == sum(math.prod(shape) for name, shape in built.items() if level_of(name) == level)


def test_all_sizes_are_there():
    expected = {f"{arch}_{size}" for arch in ("hope", "transformer_pp") for size in SIZES} | {"hope_attention_1b3"}
    assert expected <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("size", SIZES)
def test_twins_have_equal_parameters_and_training(size):
    hope, twin = (load_config(FOLDER / f"{arch}_{size}.yaml") for arch in ("hope", "transformer_pp"))
    assert parameter_count(twin.model) == pytest.approx(parameter_count(hope.model), rel=0.01)
    for section in ("data", "optimizer", "train", "eval"):
        assert getattr(twin, section) == getattr(hope, section)
    assert hope.model.head_dim == twin.model.head_dim == 64


def test_hope_attention_1b3_is_of_the_same_size():
    hope, other = (load_config(FOLDER / f"{name}.yaml") for name in ("hope_1b3", "hope_attention_1b3"))
    assert parameter_count(other.model) == pytest.approx(parameter_count(hope.model), rel=0.01)
    assert 1.25e9 < parameter_count(hope.model) < 1.35e9


@pytest.mark.parametrize(
    ("kind", "expansion", "adaptive_q", "momentum", "in_proj", "variant", "tied"),
    [
        options
        for options in itertools.product(
            ("mlp", "linear"), (1, 2), (False, True), (False, True), (True, False),
            ("sequential", "nested", "independent"), (False, True),
        )
        if not (options[0] == "linear" and options[1] == 2)
    ],
)  # fmt: skip
def test_every_option_is_counted_exactly(kind, expansion, adaptive_q, momentum, in_proj, variant, tied):
    model = ModelConfig.model_validate(
        {
            "arch": "hope",
            "d_model": 24,
            "n_layers": 2,
            "n_heads": 3,
            "vocab_size": 11,
            "tie_embeddings": tied,
            "memory": {
                "kind": kind,
                "expansion": expansion,
                "adaptive_q": adaptive_q,
                "momentum": momentum,
                "in_proj": in_proj,
                "conv_width": 1 if in_proj and tied else 4,
            },
            "cms": {
                "variant": variant,
                "levels": [{"width": 10, "period": 1}, {"width": 7, "period": 2, "activation": "gelu"}],
            },
        }
    )
    assert parameter_shapes(model) == built_shapes(model)
    assert sum(counts_by_component(model).values()) == parameter_count(model)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_components_add_up(path):
    model = load_config(path).model
    counts = counts_by_component(model)
    assert sum(counts.values()) == parameter_count(model)
    assert ("attention" in counts) == (model.arch != "hope")
    assert ("memory initial states" in counts) == (model.arch == "hope")
