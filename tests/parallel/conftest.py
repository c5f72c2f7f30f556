"""Ranks, started once for all files of this folder (once per worker)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.harness import Gang
from tests.train.conftest import corpus as corpus
from tests.train.conftest import tiny as tiny


@pytest.fixture(scope="session")
def gangs() -> Iterator[dict[int, Gang]]:
    """The gangs in use, by their number of ranks."""
    gangs: dict[int, Gang] = {}
    yield gangs
    for gang in gangs.values():
        gang.close()


def _of(ranks: int, gangs: dict[int, Gang], factory: pytest.TempPathFactory) -> Gang:
    if ranks in gangs and not gangs[ranks].alive():
        gangs.pop(ranks).close()
    if ranks not in gangs:
        gangs[ranks] = Gang(factory.mktemp(f"gang_{ranks}"), ranks)
    return gangs[ranks]


@pytest.fixture
def gang(gangs: dict[int, Gang], tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """Four ranks that wait for jobs; a job may want fewer."""
    return _of(4, gangs, tmp_path_factory)


@pytest.fixture
def gang_of_8(gangs: dict[int, Gang], tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """Eight of them."""
    return _of(8, gangs, tmp_path_factory)
