"""Nodes that vary: the largest data parallelism that divides the batch, everything else as it is."""

from __future__ import annotations

from typing import Any

import pytest

from hope_train.config.batches import BatchRampConfig
from hope_train.config.load import validate
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from launch.layout import elastic_layout, fixed_layout


def config(rows: int, micro: int = 1, **parallel: Any) -> RunConfig:
    tree = {
        "model": {"arch": "transformer_pp", "d_model": 32, "n_heads": 4, "mlp_width": 64, "vocab_size": 300},
        "train": {"context_length": 32, "batch_tokens": rows * 32, "micro_batch_size": micro},
        "parallel": parallel,
    }
    return validate(RunConfig, tree)


@pytest.mark.parametrize(
    ("rows", "micro", "nodes", "per_node", "expected"),
    [
        (8, 1, 4, 2, (4, 2)),
        (8, 1, 3, 2, (2, 2)),  # 6 ranks cannot share 8 rows
        (8, 1, 5, 1, (4, 1)),
        (9, 1, 3, 2, (3, 1)),  # 3 of 6
        (8, 4, 4, 2, (1, 2)),  # two micro-batches: two ranks, on one node
        (1, 1, 4, 4, (1, 1)),
        (512, 4, 13, 8, (8, 8)),  # 128 shares: 64 ranks of 104
    ],
)
def test_the_largest_that_divides_the_batch(
    rows: int, micro: int, nodes: int, per_node: int, expected: tuple[int, int]
) -> None:
    layout = elastic_layout(config(rows, micro), nodes, per_node)
    assert (layout.nodes, layout.ranks_per_node) == expected
    assert layout.sizes.world == layout.ranks
    assert rows % (layout.sizes.dp * micro) == 0


def test_every_batch_of_a_ramp_is_divided() -> None:
    grown = config(24)
    ramp = BatchRampConfig(start_tokens=6 * 32, increment_tokens=9 * 32, over_tokens=100 * 32)
    grown = grown.model_copy(update={"train": grown.train.model_copy(update={"batch_ramp": ramp})})
    assert elastic_layout(grown, 8, 1).sizes.dp == 3


def test_no_larger_one_would_do() -> None:
    for rows in (6, 8, 12, 30):
        for nodes in range(1, 7):
            found = elastic_layout(config(rows), nodes, 2)
            possible = {n * k for n in range(1, nodes + 1) for k in (1, 2) if rows % (n * k) == 0}
            assert found.ranks == max(possible)


def test_tensor_parallel_ranks_stay_on_a_node() -> None:
    layout = elastic_layout(config(8, tp=2), 3, 3)
    assert layout.ranks_per_node % 2 == 0
    assert layout.sizes.tp == 2


def test_a_fixed_number_of_copies_gives_way() -> None:
    assert elastic_layout(config(8, dp_replicate=4), 2, 1).sizes.dp_replicate == 2


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="4"):
        elastic_layout(config(8, dp_shard=4), 1, 2)
    with pytest.raises(UserError, match="sequences"):
        fixed_layout(config(8), 3, 1)
