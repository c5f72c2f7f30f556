"""The seam between update rules and spread matrices: where parts are, who works on what, what comes back."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from hope_train.config.mesh import MeshSizes
from hope_train.optim.wholes import Job
from hope_train.parallel.wholes import deal, spread_of
from tests.parallel import cases
from tests.parallel.harness import Gang


@pytest.mark.parametrize(("tp", "dp_shard", "dp_replicate"), [(1, 1, 2), (2, 1, 2), (1, 3, 1), (2, 3, 2), (4, 5, 1)])
@pytest.mark.parametrize("shape", [(8, 12), (4, 4)], ids=str)
@pytest.mark.parametrize("divided", [0, 1])
def test_the_parts_of_a_copy_are_the_whole(
    tp: int, dp_shard: int, dp_replicate: int, shape: tuple[int, int], divided: int
) -> None:
    sizes = MeshSizes(tp=tp, dp_shard=dp_shard, dp_replicate=dp_replicate)
    places = [
        {"dp_replicate": copy, "dp_shard": row, "tp": part}
        for copy, row, part in product(range(dp_replicate), range(dp_shard), range(tp))
    ]
    spread = spread_of(shape, divided, places, sizes)
    for copy in range(dp_replicate):
        count = torch.zeros(shape)
        for rank, place in enumerate(places):
            if place["dp_replicate"] == copy:
                assert count[spread.parts[rank]].shape == spread.local(rank)
                count[spread.parts[rank]] += 1
        assert (count == 1).all()


def test_work_is_dealt_out_by_its_cost() -> None:
    jobs = [Job(torch.empty(size, 64), list) for size in (64, 8, 8, 64, 32, 8, 8, 16, 64, 8)]
    dealt = deal(jobs, lambda tensor: tuple(tensor.shape), 3)
    assert sorted(id(job) for mine in dealt for job in mine) == sorted(map(id, jobs))
    costs = [sum(job.parameter.numel() * min(job.parameter.shape) for job in mine) for mine in dealt]
    assert max(costs) - min(costs) <= 32 * 64 * 32


@pytest.mark.parametrize(
    "sizes", [{"dp_shard": 4}, {"tp": 2, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}], ids=str
)
@pytest.mark.parametrize("limit", [1, 10**6])
def test_parts_come_together_and_go_back(gang: Gang, sizes: dict[str, Any], limit: int) -> None:
    # Rows that do not divide, ranks without any, batches of one matrix and of many.
    for worked_on, errors in gang.run(cases.parts_and_back, 4, sizes=sizes, limit=limit):
        assert errors == {"parts": 0.0, "wholes": 0.0, "mean squares": 0.0}
        assert worked_on > 0
