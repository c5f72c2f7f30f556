"""A tiny corpus, tokenizer and configuration for whole runs that take seconds."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.tokenizer_training import train_tokenizer
from tests.train.tiny import Tiny, write_config

WORDS = (
    "river",
    "stone",
    "lamp",
    "green",
    "walked",
    "under",
    "seven",
    "quietly",
    "the",
    "a",
    "of",
    "into",
    "été",
    "x =",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data section of a corpus of some 10,000 tokens under a tokenizer of 300 pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) + "\n" for _ in range(200)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), encoding="utf-8")
    tokenizer = train_tokenizer(texts, folder / "tiny.model", 300)
    return {
        "sources": [{"path": str(text)}],
        "tokenizer": tokenizer.path,
        "validation_fraction": 0.1,
        "cache_dir": str(folder / "cache"),
    }


@pytest.fixture
def tiny(tmp_path: Path, corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Runs in a folder of their own, without WikiText."""
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    return Tiny(tmp_path, write_config(tmp_path / "tiny.yaml", corpus))


@pytest.fixture(autouse=True)
def quiet_library() -> None:
    """The checkpoint library logs every tensor at DEBUG, which drowns the report of a test that fails."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
