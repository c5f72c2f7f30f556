"""The tensor-parallel plan: every parameter of every kind of model has its place in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hope_train.model.hope import HopeModel
from hope_train.parallel.plan import PLAN, Split, local_shape, part_of, split_of_module, split_of_parameter
from tests.model.small import small_config

KINDS: dict[str, dict[str, Any]] = {
    "hope": {"memory": {"momentum": True}},
    "linear": {"memory": {"kind": "linear", "adaptive_q": True}},
    "hope_attention": {"arch": "hope_attention", "cms": {"levels": [{"width": 8}], "variant": "independent"}},
    "transformer_pp": {"arch": "transformer_pp"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_the_plan_and_its_parts_make_the_whole(kind: str) -> None:
    with torch.device("meta"):
        model = HopeModel(small_config(**KINDS[kind]))
    for name, parameter in model.named_parameters():
        shape, dim = tuple(parameter.shape), split_of_parameter(name).dim
        parts = [local_shape(name, shape, rank, 2) for rank in range(2)]
        if dim is None:
            assert parts == [shape, shape], name
        else:
            assert sum(part[dim] for part in parts) == shape[dim], name
            assert sum(map(math.prod, parts)) == parameter.numel()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("embed.weight", Split.VOCAB),
        ("blocks.11.mixer.q_proj.weight", Split.COLWISE),
        ("blocks.0.mixer.out_proj.weight", Split.ROWWISE),
        ("blocks.0.mixer.memory.w1_k", Split.HEADWISE),
        ("blocks.0.mixer.out_norm", Split.HEADWISE),
        ("blocks.0.cms.levels.12.gate.weight", Split.COLWISE),
        ("blocks.0.cms.levels.1.norm.weight", Split.SEQUENCE),
        ("blocks.0.cms.mix", Split.REPLICATED),
        ("blocks.0.mlp.down.weight", Split.ROWWISE),
        ("norm.weight", Split.SEQUENCE),
    ],
)
def test_places(name: str, split: Split) -> None:
    assert split_of_parameter(name) is split


def test_what_the_plan_does_not_know_is_refused() -> None:
    with pytest.raises(KeyError, match=r"blocks\.0\.mixer\.surprise\.weight"):
        split_of_parameter("blocks.0.mixer.surprise.weight")
    assert split_of_module("blocks.0") is None
    assert len({rule.pattern for rule in PLAN}) == len(PLAN)


@pytest.mark.parametrize(("size", "ranks", "sizes"), [(67, 2, [34, 33]), (67, 4, [17, 17, 17, 16]), (8, 2, [4, 4])])
def test_uneven_parts_are_consecutive(size: int, ranks: int, sizes: list[int]) -> None:
    parts = [part_of(size, rank, ranks) for rank in range(ranks)]
    assert [len(part) for part in parts] == sizes
    assert [row for part in parts for row in part] == list(range(size))
    # DTensor cuts in the same places, which is what makes a checkpoint's names and shapes those of the whole.
    assert [len(chunk) for chunk in torch.arange(size).chunk(ranks)] == sizes
