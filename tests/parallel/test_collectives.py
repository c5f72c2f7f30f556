"""Exchanges and what autograd makes of them."""

from __future__ import annotations

import pytest

from tests.parallel import jobs
from tests.parallel.harness import Gang


@pytest.mark.parametrize("ranks", [2, 3])
def test_backward_is_the_transpose_of_forward(gang: Gang, ranks: int) -> None:
    assert gang.run(jobs.exchanges, ranks) == [[True] * 4] * ranks
