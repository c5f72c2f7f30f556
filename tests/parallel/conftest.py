"""Ranks, started once for all files of this folder (once per worker)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.harness import Gang
from tests.train.conftest import corpus as corpus
from tests.train.conftest import tiny as tiny


@pytest.fixture(scope="session")
def gangs() -> Iterator[list[Gang]]:
    """The gang in use, if there is one."""
    gangs: list[Gang] = []
    yield gangs
    for gang in gangs:
        gang.close()


@pytest.fixture
def gang(gangs: list[Gang], tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """Four ranks that wait for jobs; a job may want fewer."""
    if gangs and not gangs[0].alive():
        gangs.pop().close()
    if not gangs:
        gangs.append(Gang(tmp_path_factory.mktemp("gang"), 4))
    return gangs[0]
