"""What is wrong with local text: each fault has one behaviour and one counter, the same in every reading."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data_pipelines import unpacking
from data_pipelines.batches import DataBundle, open_data
from data_pipelines.feeding import ProcessFeed
from data_pipelines.records import Place, read_records
from data_pipelines.streams import StreamSource, merge_metrics
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.unpacking import GzipIndexes
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError
from tests.data_pipelines.conftest import make_texts

TRAIN = TrainConfig(context_length=32, batch_tokens=32 * 8, micro_batch_size=1, tokens=32 * 8)


def lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() + b"\n" for text in texts]


class Streams:
    """Opens streams over one folder, and closes them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.opened: list[DataBundle] = []

    def open(self, on_fault: str = "skip", workers: int = 0, **source: Any) -> StreamSource:
        tree = {
            "mode": "streaming",
            "sources": [{"path": str(self.folder), **source}],
            "tokenizer": self.tokenizer.path,
            "validation_fraction": 0.0,
            "cache_dir": str(self.folder.parent / "cache"),
            "on_fault": on_fault,
            "retries": 1,
            "retry_seconds": 0.0,
            "stream": {"lanes": 2, "workers": workers, "shuffle_documents": 4},
        }
        bundle = open_data(DataConfig.model_validate(tree), TRAIN, 3, self.tokenizer.vocab_size)
        assert isinstance(bundle.train, StreamSource)
        self.opened.append(bundle)
        return bundle.train


@pytest.fixture
def streams(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Streams]:
    (tmp_path / "text").mkdir()
    made = Streams(tmp_path / "text", tokenizer)
    yield made
    for bundle in made.opened:
        bundle.train.close()


FAULTS: dict[str, tuple[bytes, str, str]] = {
    "utf8": (b'{"text": "caf\xe9"}\n', "not_utf8", r"not UTF-8 \(byte 0xe9\)"),
    "json": (b'{"text": "half\n', "not_json", "not valid JSON"),
    "list": (b"[1, 2]\n", "not_json", "a JSON object per line is expected"),
    "field": (b'{"body": "x"}\n', "no_text", "no field 'text'"),
    "number": (b'{"text": 7}\n', "no_text", "is not text but a int"),
    "surrogate": (b'{"text": "\\ud800"}\n', "not_unicode", "lone surrogate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_record_stops_or_is_counted(streams: Streams, fault: str) -> None:
    bad, counter, said = FAULTS[fault]
    good = lines(make_texts(60))
    (streams.folder / "a.jsonl").write_bytes(b"".join([*good[:30], bad, *good[30:]]))
    with pytest.raises(UserError, match=rf"a\.jsonl:31: .*{said}"):
        batches_of(streams.open("stop"), 0, 60)
    source = streams.open("skip")
    batches_of(source, 0, 60)  # Far enough to read all there is at least once.
    counts = merge_metrics([source.metrics()])
    assert counts[counter] >= 1
    assert counts["documents"] >= 60


def batches_of(source: StreamSource, first: int, last: int) -> list[np.ndarray]:
    return [source.batch(index).tokens for index in range(first, last)]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_truncated_file_stops_or_gives_what_is_whole(streams: Streams, packing: str) -> None:
    rng = random.Random(1)
    text = b"".join(lines([f"{n} {rng.random()} " * 3 for n in range(7000)]))
    (streams.folder / "good.jsonl").write_bytes(b"".join(lines(make_texts(20))))
    packed = gzip.compress(text) if packing == "gz" else zstandard.compress(text)
    (streams.folder / f"torn.jsonl.{packing}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=rf"torn\.jsonl\.{packing}: cannot be read as .*damaged or cut short"):
        batches_of(streams.open("stop"), 0, 3000)
    one, other = streams.open("skip"), streams.open("skip")
    batches_of(one, 0, 3000)
    assert merge_metrics([one.metrics()])["damaged"] >= 1
    other.restore(json.loads(json.dumps(one.state(3000 * 8))))
    assert np.array_equal(other.batch(3000).tokens, one.batch(3000).tokens)


def test_empty_documents_are_counted_and_long_ones_used(streams: Streams) -> None:
    huge = "word after word, line after line\n" * (10_000_000 // 33 + 1)
    (streams.folder / "a.jsonl").write_bytes(b"".join(lines(["", huge, "", *make_texts(20)])) + b"\n\n")
    source = streams.open("stop")
    for index in range(5):
        source.batch(index)
    counts = merge_metrics([source.metrics()])
    assert counts["long"] >= 1
    assert counts["empty"] >= 1
    state = source.state(40)
    expected = source.batch(5)
    resumed = streams.open("stop")
    resumed.restore(state)
    assert np.array_equal(resumed.batch(5).tokens, expected.tokens)
    small = streams.open("stop", max_characters=1 << 20)
    small.batch(0)
    assert merge_metrics([small.metrics()])["too_long"] == 1


def test_a_filter_that_fails_stops(streams: Streams) -> None:
    (streams.folder / "a.jsonl").write_bytes(b"".join(lines(make_texts(20))))
    with pytest.raises(UserError, match=r"filter tests\.data_pipelines\.filters:broken failed on record \d+: KeyError"):
        streams.open(filter="tests.data_pipelines.filters:broken").batch(0)
    with pytest.raises(UserError, match="has no function nothing"):
        streams.open(filter="tests.data_pipelines.filters:nothing")
    with pytest.raises(UserError, match="cannot be imported"):
        streams.open(filter="no_such_module_here:f")


def test_a_source_that_is_gone_is_told_and_can_come_back(streams: Streams) -> None:
    for number in range(6):
        (streams.folder / f"{number}.jsonl").write_bytes(b"".join(lines(make_texts(40, seed=number))))
    whole = streams.open("stop")
    expected = batches_of(whole, 0, 40)
    source = streams.open("stop")
    source.batch(0)
    moved = streams.folder.with_name("moved")
    streams.folder.rename(moved)
    with pytest.raises(UserError, match=r"\.jsonl: cannot be read.*\(tried 2 times\)"):
        batches_of(source, 1, 40)
    assert merge_metrics([source.metrics()])["retries"] == 1
    moved.rename(streams.folder)
    assert np.array_equal(batches_of(source, 1, 40), expected[1:])


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_is_a_clear_stop(streams: Streams) -> None:
    (streams.folder / "a.jsonl").write_bytes(b"".join(lines(make_texts(200))))
    source = streams.open("stop", workers=1)
    source.batch(0)
    assert isinstance(source._feed, ProcessFeed)
    os.kill(source._feed._workers[0].process.pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker has ended \(exit code -9\): was it killed"):
        batches_of(source, 1, 200)


@pytest.mark.timeout(120)
def test_workers_outlive_signals_and_end_with_their_trainer(streams: Streams, tmp_path: Path) -> None:
    (streams.folder / "a.jsonl").write_bytes(b"".join(lines(make_texts(200))))
    source = streams.open("stop", workers=2)
    source.batch(0)
    recipe = {"data": source.recipe.data.model_dump(mode="json"), "tokenizer": streams.tokenizer.path}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    program = (
        "import json, os, sys, time\n"
        "from data_pipelines.batches import open_data\nfrom hope_train.config.data import DataConfig\n"
        "from hope_train.config.train import TrainConfig\n"
        "if __name__ == '__main__':\n"
        "    tree = json.load(open(sys.argv[1]))\n"
        "    train = TrainConfig(context_length=32, batch_tokens=256, micro_batch_size=1, tokens=256)\n"
        "    source = open_data(DataConfig.model_validate(tree['data']), train, 3, 400).train\n"
        "    source.batch(0)\n"
        "    print([w.process.pid for w in source._feed._workers], flush=True)\n"
        "    sys.stdin.readline()\n"
        "    source.batch(300)\n"
        "    print('still there', flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "trainer.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(tmp_path / "trainer.py"), str(tmp_path / "recipe.json")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as trainer:  # type: ignore[call-overload]
        pids = json.loads(trainer.stdout.readline())
        assert len(pids) == 2
        for pid in pids:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(pid, number)
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "still there\n"
        trainer.kill()
        trainer.wait(30)
    for _ in range(300):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail("the workers live on")


def test_a_large_gz_is_entered_by_its_index(streams: Streams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = random.Random(2)
    texts = [f"{n} " + "".join(rng.choices("abcdefgh ", k=4000)) for n in range(4000)]
    file = streams.folder / "large.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(lines(texts)), 1))
    monkeypatch.setattr(unpacking, "LARGE", 1 << 20)
    indexes = GzipIndexes(tmp_path / "indexes")
    records = list(read_records(file, "text", indexes=indexes))
    assert [record.text for record in records] == texts
    assert len(list((tmp_path / "indexes").glob("*.gzidx"))) == 1
    skipped: list[int] = []
    skip = unpacking._skip
    monkeypatch.setattr(unpacking, "_skip", lambda stream, count: (skipped.append(count), skip(stream, count))[1])
    for start in (1, 1999, 3990):
        place = records[start].after
        assert list(read_records(file, "text", place, indexes=indexes)) == records[start + 1 :]
    assert skipped == []
    assert list(read_records(file, "text", records[3000].after)) == records[3001:]
    assert len(skipped) == 1
    os.utime(file)  # Another file, as far as anybody can tell: no index.
    assert list(read_records(file, "text", records[3990].after, indexes=indexes)) == records[3991:]
    assert len(skipped) == 2


def test_a_large_gz_that_is_torn_gets_no_index(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = b"".join(lines([f"{n} {random.Random(n).random()}" for n in range(20000)]))
    file = streams.folder / "torn.jsonl.gz"
    file.write_bytes(gzip.compress(text)[:-1000])
    monkeypatch.setattr(unpacking, "LARGE", 1)
    found = list(read_records(file, "text", Place(), indexes=GzipIndexes(tmp_path / "indexes")))
    assert found[-1].fault is not None
    assert found[-1].fault.kind == "damaged"
    assert found == list(read_records(file, "text"))
    assert not list((tmp_path / "indexes").glob("*.gzidx"))
