"""Ranks, started once per file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.harness import Gang
from tests.train.conftest import corpus as corpus
from tests.train.conftest import tiny as tiny


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Four ranks; a job may want fewer."""
    gang = Gang(tmp_path_factory.mktemp("gang"), 4)
    yield gang
    gang.close()
