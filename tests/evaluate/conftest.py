"""A tokenizer for the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import train_tokenizer
from tests.evaluate.tiny import wikitext_like


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """400 pieces, BPE, trained on other pages than the tests score."""
    texts = [wikitext_like(seed) for seed in range(100, 110)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tiny.model", 400)


@pytest.fixture
def wikitext_folder(tmp_path: Path) -> Path:
    """A folder with a small validation and test file in WikiText's form."""
    for seed, split in enumerate(("valid", "test")):
        (tmp_path / f"wiki.{split}.raw").write_text(wikitext_like(seed), encoding="utf-8")
    return tmp_path
