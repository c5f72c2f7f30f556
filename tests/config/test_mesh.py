"""The mesh in numbers: what it resolves to, and what it refuses, with the number to change."""

from __future__ import annotations

from typing import Any

import pytest

from hope_train.config.load import validate
from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError


def make_config(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    """12 layers, 12 heads of 16, 48 sequences a step in micro-batches of 2."""
    tree = {
        "model": {
            "d_model": 192,
            "n_layers": 12,
            "n_heads": 12,
            "vocab_size": 1001,
            "cms": {"levels": [{"width": 240}, {"width": 480, "period": 4}]},
            **(model or {}),
        },
        "train": {"context_length": 64, "batch_tokens": 64 * 48, "micro_batch_size": 2, **(train or {})},
        "parallel": parallel,
    }
    return validate(RunConfig, tree)


@pytest.mark.parametrize(
    ("world", "parallel", "expected"),
    [
        (1, {}, MeshSizes()),
        (8, {}, MeshSizes(dp_replicate=8)),
        (8, {"tp": 2}, MeshSizes(dp_replicate=4, tp=2)),
        (24, {"tp": 2, "pp": 3, "dp_shard": 2}, MeshSizes(pp=3, dp_replicate=2, dp_shard=2, tp=2)),
        (2, {"tp": 2, "dp_replicate": 1}, MeshSizes(tp=2)),
        (12, {"tp": 12}, MeshSizes(tp=12)),
    ],
)
def test_auto_takes_what_the_world_leaves(world: int, parallel: dict[str, Any], expected: MeshSizes) -> None:
    if parallel.get("tp") == 12:
        parallel = {**parallel, "sequence_parallel": False}
    sizes = resolve_mesh(make_config(**parallel), world)
    assert sizes == expected
    assert sizes.world == world
    assert sizes.dp == sizes.dp_replicate * sizes.dp_shard


@pytest.mark.parametrize(
    ("world", "model", "train", "parallel", "named"),
    [
        (3, {}, {}, {"tp": 2}, r"3 ranks cannot be divided by .*tp = 1\*1\*2 = 2.*multiple of 2 processes"),
        (1, {}, {}, {"pp": 2}, "1 rank cannot be divided"),
        (8, {}, {}, {"dp_replicate": 2, "tp": 2}, "has 4 ranks, the job has 8.*start 4 processes"),
        (8, {}, {}, {"tp": 8}, "model.n_heads=12 .*parallel.tp=8"),
        (2, {"cms": {"levels": [{"width": 240}, {"width": 481}]}}, {}, {"tp": 2}, r"model.cms.levels\[1\].width=481"),
        (
            2,
            {"arch": "transformer_pp", "mlp_width": 301, "cms": {"levels": []}},
            {},
            {"tp": 2},
            "model.mlp_width=301",
        ),
        (2, {"memory": {"in_proj": False}}, {}, {"tp": 2}, "model.memory.in_proj=false"),
        (12, {"vocab_size": 13}, {}, {"tp": 12, "sequence_parallel": False}, "model.vocab_size=13 .*parallel.tp=12"),
        (3, {}, {}, {"tp": 3}, "train.context_length=64 .*parallel.sequence_parallel=false"),
        (32, {}, {}, {}, "train.batch_tokens=3072 is 48 sequences.*32 data-parallel ranks.*multiple of 4096"),
        (16, {}, {"micro_batch_size": 4}, {}, "train.micro_batch_size=4"),
        (16, {}, {}, {"pp": 16, "dp_replicate": 1}, "model.n_layers=12 cannot fill 16 pipeline parts"),
        (8, {}, {}, {"pp": 8, "schedule": "zbv"}, "cannot fill 16"),
        (2, {}, {"compile": "model"}, {"tp": 2}, "train.compile=model compiles across the exchanges"),
        (2, {}, {}, {"pp": 2, "layers_per_stage": [4, 4, 4]}, "names 3 parts: parallel.pp=2 .* needs 2"),
        (2, {}, {}, {"pp": 2, "layers_per_stage": [4, 4]}, "holds 8 layers, model.n_layers is 12"),
        (4, {}, {"micro_batch_size": 24}, {"pp": 4}, "1f1b cannot run 2 micro-batches over parallel.pp=4 stages"),
        (
            2,
            {},
            {"batch_tokens": 64 * 10},
            {"pp": 2, "schedule": "interleaved_1f1b"},
            "5 micro-batches over parallel.pp=2 in 2 rounds",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    world: int, model: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named) as error:
        resolve_mesh(make_config(model, train, **parallel), world)
    assert "\n" not in str(error.value)


def test_interleaved_parts_count() -> None:
    options: dict[str, Any] = {"pp": 2, "schedule": "interleaved_1f1b", "stages_per_rank": 3}
    assert resolve_mesh(make_config(**options, layers_per_stage=[2] * 6), 2) == MeshSizes(pp=2)
