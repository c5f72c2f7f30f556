"""A tiny corpus, tokenizer and configuration for whole runs that take seconds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import Tiny, write_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data section of a small corpus with its tokenizer: see `write_corpus`."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny(tmp_path: Path, corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Runs in a folder of their own, without WikiText."""
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    return Tiny(tmp_path, write_config(tmp_path / "tiny.yaml", corpus))


@pytest.fixture(autouse=True)
def quiet_library() -> None:
    """The checkpoint library logs every tensor at DEBUG, which drowns the report of a test that fails."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
