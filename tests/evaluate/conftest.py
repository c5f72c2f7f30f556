"""A tokenizer for the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.tokenizer import Tokenizer
from tests.evaluate.tiny import tiny_tokenizer, wikitext_like


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """See `tiny_tokenizer`."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def wikitext_folder(tmp_path: Path) -> Path:
    """A folder with a small validation and test file in WikiText's form."""
    for seed, split in enumerate(("valid", "test")):
        (tmp_path / f"wiki.{split}.raw").write_text(wikitext_like(seed), encoding="utf-8")
    return tmp_path
