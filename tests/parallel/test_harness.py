"""What the tests' own ranks do when something goes wrong: every rank is heard."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel import jobs
from tests.parallel.harness import Gang


@pytest.mark.timeout(120)
def test_a_failure_and_a_hang_show_every_rank(tmp_path: Path) -> None:
    gang = Gang(tmp_path, 2)
    try:
        assert gang.run(jobs.ranks_and_sum, 2) == [(0, 2, 1), (1, 2, 1)]
        with pytest.raises(AssertionError, match=r"(?s)rank 1:.*ZeroDivisionError"):
            gang.run(jobs.fail_on, 2, rank=1)
        assert gang.run(jobs.ranks_and_sum, 1) == [(0, 1, 0)], "the ranks live on"
        with pytest.raises(AssertionError, match=r"(?s)hangs.*rank 0:.*in wait_for.*rank 1:.*in wait_for"):
            gang.run(jobs.hang, 2, timeout=3.0)
    finally:
        gang.close()
