"""A tiny corpus and a tiny tokenizer for all tests of the data pipeline."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.config.data import DataConfig

WORDS = [
    *("river", "stone", "lamp", "green", "walked", "under", "seven", "quietly", "the", "a", "of", "into", "memory"),
    *("clock", "—", "naïve", "été", "数字", "def", "return", "x", "=", "1"),
]


def make_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """`count` different small texts of about `words` words in lines."""
    rng = random.Random(seed)
    return [
        f"Title {number}\n\n"
        + "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", "  "]) for _ in range(rng.randint(1, 2 * words)))
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """500 small documents."""
    return make_texts(500)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """400 pieces, BPE."""
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tiny.model", 400)


@pytest.fixture(scope="session")
def unigram_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """350 pieces, unigram."""
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "unigram.model", 350, "unigram")


@pytest.fixture
def write_jsonl() -> Callable[[Path, list[str]], Path]:
    """Writes texts as .jsonl."""

    def write(path: Path, documents: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_config(
    tmp_path: Path, tokenizer: Tokenizer, write_jsonl: Callable[[Path, list[str]], Path]
) -> Callable[..., DataConfig]:
    """A data section over `documents` written to one .jsonl file, its cache in the test's folder."""

    def make(documents: list[str], **values: object) -> DataConfig:
        path = write_jsonl(tmp_path / "corpus.jsonl", documents)
        defaults = {
            "sources": [{"path": str(path)}],
            "tokenizer": tokenizer.path,
            "validation_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
        }
        return DataConfig.model_validate({**defaults, **values})

    return make
