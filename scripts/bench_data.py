"""The data pipeline's speed and memory: `make bench-data`, one JSON line per row.

All rows are on one corpus, cut into documents of the lengths of web pages: a file or folder (`--corpus`), or Python's
own documentation. Ratios compare rows of one run. Machines are shared, so speeds are per second of processor time, of
the process itself or of its workers; what the clock said stands beside it. Each row says its bar and if it was met.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batches import DataBundle, open_data
from data_pipelines.feeding import ProcessFeed
from data_pipelines.sources import parse_source, read_source
from data_pipelines.streams import StreamSource
from data_pipelines.tokenising import tokenise
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig

LENGTH, ROWS = 2048, 32
MEDIAN_CHARACTERS, SPREAD = 2500, 1.0
"""Lengths of documents: log-normal, as those of web pages about are; the mean is 4100 characters."""

COPIES = 2
"""The streamed corpus is the text so many times over (each copy's documents told apart by a first line)."""

CONSUMED, WORKERS = 40_000, 8
"""Tokens/s that hope_1b3 is taken to consume on one H200, and the workers that are to deliver ten times that."""

Row = dict[str, Any]
TRAIN = TrainConfig(context_length=LENGTH, batch_tokens=LENGTH * ROWS, micro_batch_size=1, tokens=LENGTH * ROWS)


def say(row: Row) -> None:
    print(json.dumps(row), flush=True)


def prepare(corpus: str, work: Path) -> tuple[list[str], Tokenizer]:
    """The documents, as texts and as plain and packed files under `work`, and a tokenizer."""
    pieces = []
    lengths = random.Random(0)
    for document in read_source(parse_source(corpus)):
        text, at = document.text, 0
        while at < len(text):
            size = int(lengths.lognormvariate(math.log(MEDIAN_CHARACTERS), SPREAD)) + 1
            pieces.append(text[at : at + size])
            at += size
    (work / "plain").mkdir()
    (work / "packed").mkdir()
    with gzip.open(work / "packed" / "all.jsonl.gz", "wb", 3) as packed:
        for copy in range(COPIES):
            with (work / "plain" / f"part-{copy}.jsonl").open("wb") as plain:
                for text in pieces:
                    line = json.dumps({"text": f"{copy}\n{text}"}).encode() + b"\n"
                    plain.write(line)
                    packed.write(line)
    size = 32_000 if sum(map(len, pieces)) > 20_000_000 else 8_000
    tokenizer = train_tokenizer(pieces, work / "bench.model", size, max_bytes=8_000_000)
    return pieces, tokenizer


def best(action: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    """The fewest seconds of a few tries."""
    seconds = []
    for _ in range(repeats):
        start = clock()
        action()
        seconds.append(clock() - start)
    return min(seconds)


def tokenising(pieces: list[str], tokenizer: Tokenizer) -> Row:
    """One thread: our encode of texts against SentencePiece's own over the same list."""
    texts = pieces[:3000]
    # In turn, so that a machine that changes its pace changes it for both.
    ours, theirs = [], []
    for _ in range(5):
        theirs.append(best(lambda: tokenizer._model.encode(texts, num_threads=1), 1))
        ours.append(best(lambda: tokenizer.encode_batch(texts), 1))
    size = sum(len(text.encode()) for text in texts)
    ratio = min(theirs) / min(ours)
    return {
        "row": "tokenising",
        "mb_per_s": round(size / min(ours) / 1e6, 3),
        "sentencepiece_mb_per_s": round(size / min(theirs) / 1e6, 3),
        "ratio": round(ratio, 3),
        "bar": 0.9,
        "met": ratio >= 0.9,
    }


def open_stream(work: Path, tokenizer: Tokenizer, files: str, **stream: Any) -> DataBundle:
    tree = {
        "mode": "streaming",
        "sources": [{"path": str(work / files)}],
        "tokenizer": tokenizer.path,
        "validation_fraction": 0.0,
        "cache_dir": str(work / "cache"),
        "stream": {"lanes": 8, "workers": 2, **stream},
    }
    return open_data(DataConfig.model_validate(tree), TRAIN, 0, tokenizer.vocab_size)


def resident(pid: int) -> int:
    """Bytes of main memory a process has now."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def streaming(work: Path, tokenizer: Tokenizer, tokens: int) -> Iterator[Row]:
    """A whole epoch by two workers: tokens/s, and the workers' memory along the way."""
    for packing in ("split", "best_fit"):
        bundle = open_stream(work, tokenizer, "plain", packing=packing)
        source = bundle.train
        assert isinstance(source, StreamSource)
        source.batch(0)
        assert isinstance(source._feed, ProcessFeed)
        pids = [worker.process.pid or 0 for worker in source._feed._workers]
        memory: list[int] = []
        batches = tokens // (LENGTH * ROWS)
        start, busy = time.perf_counter(), sum(map(processor_seconds, pids))
        padding = 0
        for index in range(1, batches):
            padding += int((source.batch(index).targets < 0).sum())
            memory.append(max(map(resident, pids)))
        seconds = time.perf_counter() - start
        busy = sum(map(processor_seconds, pids)) - busy
        source.close()
        made = (batches - 1) * LENGTH * ROWS
        per_worker = made / busy
        third = len(memory) // 3
        growth = max(memory[-third:]) / max(memory[third : 2 * third])
        yield {
            "row": f"streaming {packing}",
            "tokens_per_s_and_worker": round(per_worker),
            "tokens_per_s_of_2_workers_by_the_clock": round(made / seconds),
            "tokens_per_s_of_8_workers_extrapolated": round(per_worker * WORKERS),
            "bar": 10 * CONSUMED,
            "met": per_worker * WORKERS >= 10 * CONSUMED,
            "padding_share": round(padding / made, 5),
        }
        yield {
            "row": f"memory of a worker over an epoch, {packing}",
            "mib_in_the_middle_third": round(max(memory[third : 2 * third]) / 2**20, 1),
            "mib_in_the_last_third": round(max(memory[-third:]) / 2**20, 1),
            "ratio": round(growth, 3),
            "bar": 1.1,
            "met": growth <= 1.1,
        }


def alternative(work: Path, tokenizer: Tokenizer, tokens: int) -> Row:
    """The usual way with `datasets`, in one process: stream, tokenise document by document, concatenate, cut."""
    import datasets

    datasets.disable_progress_bars()
    files = [str(path) for path in sorted((work / "plain").iterdir())]
    start = time.process_time()
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=256)
    held: list[int] = []
    made = 0
    for row in rows:
        held += [tokenizer.eot_id, *tokenizer.encode(row["text"])]
        while len(held) > LENGTH:
            np.array(held[: LENGTH + 1])
            held = held[LENGTH:]
            made += LENGTH
        if made >= tokens // 4:
            break
    return {"row": "datasets streaming, one process", "tokens_per_s": round(made / (time.process_time() - start))}


def alone(work: Path, tokenizer: Tokenizer, tokens: int) -> Row:
    """Ours in the training process itself, beside that."""
    bundle = open_stream(work, tokenizer, "plain", workers=0)
    start = time.process_time()
    batches = tokens // 4 // (LENGTH * ROWS)
    for index in range(batches):
        bundle.train.batch(index)
    return {
        "row": "streaming, no workers",
        "tokens_per_s": round(batches * LENGTH * ROWS / (time.process_time() - start)),
    }


def resuming(work: Path, tokenizer: Tokenizer, tokens: int) -> Iterator[Row]:
    """Seconds from nothing to the first batch, at 1% and at 90% of an epoch, of plain files and of one large .gz."""
    for files, stream in (("plain", {}), ("packed", {"lanes": 2})):
        bundle = open_stream(work, tokenizer, files, workers=0, **stream)
        last = tokens // (LENGTH * ROWS)
        places = {share: max(1, int(last * share)) for share in (0.01, 0.9)}
        states, expected = {}, {}
        for index in range(places[0.9] + 1):
            for share, place in places.items():
                if index == place:
                    states[share] = json.loads(json.dumps(bundle.train.state(index * ROWS)))
            batch = bundle.train.batch(index)
            for share, place in places.items():
                if index == place:
                    expected[share] = batch.tokens
        seconds: dict[float, list[float]] = {share: [] for share in places}
        clock: dict[float, list[float]] = {share: [] for share in places}
        same = True
        for _, share in itertools.product(range(3), places):
            began, start = time.perf_counter(), time.process_time()
            resumed = open_stream(work, tokenizer, files, workers=0, **stream)
            resumed.train.restore(states[share])
            batch = resumed.train.batch(places[share])
            seconds[share].append(time.process_time() - start)
            clock[share].append(time.perf_counter() - began)
            same &= np.array_equal(batch.tokens, expected[share])
            resumed.train.close()
        early, late = min(seconds[0.01]), min(seconds[0.9])
        yield {
            "row": f"resume, {files}",
            "seconds_at_1_percent": round(early, 3),
            "seconds_at_90_percent": round(late, 3),
            "by_the_clock": [round(min(clock[share]), 3) for share in places],
            "ratio": round(late / early, 3),
            "same_batch": same,
            "state_bytes": len(json.dumps(states[0.9])),
            "bar": 2.0,
            "met": late / early < 2.0 and same,
        }
        bundle.train.close()


def indexed(work: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    """Batches of an indexed set against the bare copy of the same windows out of the same map, by CPU time."""
    data = DataConfig.model_validate({"sources": [{"path": str(work / "plain")}], "validation_fraction": 0.0})
    tokenise(data, tokenizer, work / "warm", 1)  # Imports megatron-core.
    start = time.process_time()
    manifest = tokenise(data, tokenizer, work / "set", 1)
    seconds = time.process_time() - start
    size = manifest["splits"]["train"]["bytes"]
    yield {"row": "hope data tokenize, one worker", "mb_per_s": round(size / seconds / 1e6, 3)}
    tree = {
        "mode": "indexed",
        "sources": [{"indexed": str(work / "set")}],
        "tokenizer": tokenizer.path,
        "validation_fraction": 0.0,
    }
    source = open_data(DataConfig.model_validate(tree), TRAIN, 0, tokenizer.vocab_size).train
    count = 64
    numbers = [source.window_numbers(index * ROWS, ROWS) for index in range(count)]
    joined = np.concatenate([np.fromfile(path, np.uint16) for path in sorted((work / "set").glob("train-*.bin"))])
    joined.tofile(work / "joined.bin")
    memory = np.memmap(work / "joined.bin", np.uint16, "r")

    def ours() -> None:
        for index in range(count):
            source.batch(index)

    def pairs() -> None:
        """Inputs and targets as the contract has them: int64 each."""
        for windows in numbers:
            tokens, targets = np.empty((ROWS, LENGTH), np.int64), np.empty((ROWS, LENGTH), np.int64)
            for row, first in enumerate((windows * LENGTH).tolist()):
                tokens[row] = memory[first : first + LENGTH]
                targets[row] = memory[first + 1 : first + LENGTH + 1]

    def raw() -> None:
        """One copy, in the type of the file."""
        for windows in numbers:
            np.stack([memory[first : first + LENGTH + 1] for first in (windows * LENGTH).tolist()])

    times: dict[str, list[float]] = {"ours": [], "pairs": [], "raw": []}
    for _ in range(7):
        for name, action in (("ours", ours), ("pairs", pairs), ("raw", raw)):
            times[name].append(best(action, 1))
    taken = {name: min(values) for name, values in times.items()}
    tokens = count * ROWS * LENGTH
    yield {
        "row": "indexed",
        "tokens_per_s": round(tokens / taken["ours"]),
        "gather_into_int64_pairs_tokens_per_s": round(tokens / taken["pairs"]),
        "gather_of_the_files_type_tokens_per_s": round(tokens / taken["raw"]),
        "ratio": round(taken["pairs"] / taken["ours"], 3),
        "ratio_to_one_copy_in_the_files_type": round(taken["raw"] / taken["ours"], 3),
        "bar": 0.5,
        "met": taken["pairs"] / taken["ours"] >= 0.5,
    }


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default=os.environ.get("HOPE_CORPUS") or "builtin:python-docs")
    names = ("tokenising", "indexed", "streaming", "alternative", "resuming")
    parser.add_argument("--part", action="append", choices=names, help="may be repeated; default: all of them")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        pieces, tokenizer = prepare(arguments.corpus, work)
        tokens = COPIES * sum(map(len, tokenizer.encode_batch(pieces, threads=2)))
        say(
            {
                "row": "setting",
                "corpus": Path(arguments.corpus).name,
                "characters": COPIES * sum(map(len, pieces)),
                "tokens": tokens,
                "pieces": tokenizer.vocab_size,
                "context_length": LENGTH,
                "cores": len(os.sched_getaffinity(0)),
                "machine": platform.machine(),
                "python": platform.python_version(),
            }
        )
        parts: dict[str, Callable[[], Iterable[Row]]] = {
            "tokenising": lambda: [tokenising(pieces, tokenizer)],
            "indexed": lambda: indexed(work, tokenizer),
            "streaming": lambda: streaming(work, tokenizer, tokens),
            "alternative": lambda: [alone(work, tokenizer, tokens), alternative(work, tokenizer, tokens)],
            "resuming": lambda: resuming(work, tokenizer, tokens),
        }
        for name in arguments.part or parts:
            for row in parts[name]():
                say(row)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
