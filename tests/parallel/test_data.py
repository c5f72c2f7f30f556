"""Sums over data-parallel ranks: buckets, order, what is started when, and parameters without a gradient."""

from __future__ import annotations

import pytest
import torch

from hope_train.parallel.data import in_buckets
from tests.parallel import jobs
from tests.parallel.harness import Gang


def test_buckets_are_runs_of_one_type() -> None:
    sizes = [10, 10, 30, 5, 5, 5, 5, 5]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.float64)]
    runs = in_buckets(tensors, limit=80)
    assert [[tensor.numel() for tensor in run] for run in runs] == [[10, 10], [30], [5, 5, 5, 5], [5], [2]]
    assert all(one is other for one, other in zip([t for run in runs for t in run], tensors, strict=True))
    assert in_buckets([]) == []


# Backward ends with the first parameter, here one without a gradient; `second` is only complete later.
@pytest.mark.parametrize(("bucket_bytes", "calls", "early"), [(1, 4, 2), (70, 3, 1), (10**6, 2, 0)])
def test_sums_whatever_the_buckets(gang: Gang, bucket_bytes: int, calls: int, early: int) -> None:
    for found in gang.run(jobs.data_sums, 3, bucket_bytes=bucket_bytes):
        assert found["errors"] == {"first": 0.0, "second": 0.0, "third": 0.0}
        assert found["slow"] == found["own slow"], "a slow set's gradient stays this rank's own"
        assert found["unused"] is None
        assert found["idle"] == 0, "a backward that is not the last one sends nothing"
        assert found["bytes"] == {"core": 4 * (12 + 4 + 4 + 7)}
        assert found["calls"]["core"] == calls
        assert found["early"] == early, "on its way before backward has ended"
