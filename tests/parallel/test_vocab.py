"""The divided vocabulary against the whole one; sizes that do not divide evenly; no logits of others."""

from __future__ import annotations

import pytest

from tests.parallel import jobs
from tests.parallel.harness import Gang


@pytest.mark.parametrize(("ranks", "size"), [(2, 10), (2, 11), (3, 67), (4, 13)])
@pytest.mark.parametrize("chunk", [4, 100])
def test_loss_gradients_logits_and_embedding(gang: Gang, ranks: int, size: int, chunk: int) -> None:
    for errors in gang.run(jobs.vocabulary, ranks, size=size, dtype="float64", chunk=chunk):
        assert max(errors.values()) < 1e-12, errors


def test_in_single_precision(gang: Gang) -> None:
    for errors in gang.run(jobs.vocabulary, 2, size=11, dtype="float32", chunk=5):
        assert max(errors.values()) < 2e-5, errors


def test_no_logits_travel(gang: Gang) -> None:
    # Two numbers per position and rank, once per chunk of positions, however large the vocabulary; none in backward.
    assert gang.run(jobs.loss_traffic, 2, size=1001, chunk=8) == [[16, 16, 4]] * 2
