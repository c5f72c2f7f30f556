"""What a stream takes of its sources: by length, language and a function's word, in every kind of file."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipelines.batches import open_data
from data_pipelines.streams import StreamSource, merge_metrics
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from tests.data_pipelines.conftest import make_texts

TRAIN = TrainConfig(context_length=32, batch_tokens=32 * 8, micro_batch_size=1, tokens=32 * 8)


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    """Two files of rows."""
    for number, part in enumerate((rows[::2], rows[1::2])):
        file, plain = folder / f"{number}.{kind}", b"".join(json.dumps(row).encode() + b"\n" for row in part)
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), file, row_group_size=5)
        elif kind == "arrow":
            table = pyarrow.Table.from_pylist(part)
            with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
                out.write_table(table, max_chunksize=5)
        else:
            pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
            file.write_bytes(pack(plain))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_takes_what_its_configuration_says(
    tokenizer: Tokenizer, tmp_path: Path, kind: str, workers: int
) -> None:
    (tmp_path / "text").mkdir()
    bodies = [text + (" rhythm" if number % 5 == 0 else "") for number, text in enumerate(make_texts(120))]
    rows = [{"id": n, "body": body, "lang": ("en", "de", "fr")[n % 3]} for n, body in enumerate(bodies)]
    write(tmp_path / "text", kind, rows)
    lengths = sorted(map(len, bodies))
    source = {
        "path": str(tmp_path / "text"),
        "text_field": "body",
        "min_characters": lengths[10],
        "max_characters": lengths[-10],
        "language": ["en", "fr"],
        "language_field": "lang",
        "filter": "tests.data_pipelines.filters:no_rhythm_in_body",
    }
    wanted, counts = [], Counter[str]()
    for row in rows:
        size = len(row["body"])
        verdict = "too_short" if size < lengths[10] else "too_long" if size > lengths[-10] else None
        verdict = verdict or ("other_language" if row["lang"] == "de" else None)
        verdict = verdict or ("filtered" if "rhythm" in row["body"] else "documents")
        counts[verdict] += 1
        wanted += [row["body"]] if verdict == "documents" else []
    tree = {
        "mode": "streaming",
        "sources": [source],
        "tokenizer": tokenizer.path,
        "validation_fraction": 0.0,
        "cache_dir": str(tmp_path / "cache"),
        "stream": {"lanes": 1, "workers": workers, "shuffle_documents": 1},
    }
    train = open_data(DataConfig.model_validate(tree), TRAIN, 3, tokenizer.vocab_size).train
    assert isinstance(train, StreamSource)
    seen: list[str] = []
    tokens = np.zeros(0, np.int64)
    for index in range(200):
        tokens = np.concatenate([tokens, train.batch(index).tokens.ravel()])
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))
        seen = [tokenizer.decode(part) for part in parts[:-1] if len(part)]
        if len(seen) > len(wanted):
            break
    assert sorted(seen[: len(wanted)]) == sorted(wanted)
    metrics = merge_metrics([train.metrics()])
    assert set(metrics) == {*counts, "retries"}
    assert all(metrics[name] >= count for name, count in counts.items())
    train.close()
