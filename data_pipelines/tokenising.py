"""`hope data tokenize`: text to a token set (tokenset.py), in parallel, shard by shard, restartable after a kill."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.megatron import IndexedWriter, indexed_dtype
from data_pipelines.records import Place
from data_pipelines.selecting import LONG_CHARACTERS, Selector, load_filter, reading_again
from data_pipelines.shards import Shard, fingerprint_shards, list_shards
from data_pipelines.sources import describe_source
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenset import (
    FORMAT,
    MANIFEST,
    PLAN,
    content_of,
    file_entry,
    prefix_of,
    read_json,
    read_manifest,
    shard_file,
    write_json,
)
from hope_train.config.data import DataConfig
from hope_train.errors import UserError

FEWEST_PARTS = 16
"""Where there are fewer files than this, each is divided (record by record) until there are about so many shards."""

_BATCH_CHARACTERS = 1 << 20

_HELD_OUT = {"documents": "train", "held_out": "validation"}


def tokenise(
    data: DataConfig,
    tokenizer: Tokenizer,
    out: Path,
    workers: int,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the documents of `data.sources` as a token set into `out`; the manifest.

    Shards that an earlier, interrupted call finished are kept. The result does not depend on `workers`.

    Raises:
        UserError: no or bad text; `out` holds something else, or the beginnings of another set; a full disk.
    """
    if not data.sources:
        raise UserError("data.sources is empty: name at least one path, hub data set or builtin text")
    if any(source.indexed is not None for source in data.sources):
        raise UserError("data.sources are tokenised already (indexed)")
    if any(source.max_bytes is not None for source in data.sources):
        raise UserError("max_bytes limits a stream that is read in order, and shards are not: leave it out")
    import filelock

    shards = list_shards(data.sources, data.hub_timeout)
    plan = make_plan(data, tokenizer, shards)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock")
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{out}: another process is writing this token set") from None
    except OSError as error:
        raise _unwritable(out, error) from None
    try:
        _check_folder(out, plan)
        write_json(out / PLAN, plan)
        jobs = [number for number in range(len(plan["shards"])) if not _is_done(out, number)]
        if len(jobs) < len(plan["shards"]):
            tell(f"{len(plan['shards']) - len(jobs)} of {len(plan['shards'])} shards are there already")
        done = len(plan["shards"]) - len(jobs)
        for entry in _run(data, tokenizer, out, jobs, workers):
            done += 1
            tell(
                f"shard {done}/{len(plan['shards'])}: {entry['file']}: {entry['counts'].get('documents', 0)} documents"
            )
        return _finish(out, plan, data)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        lock.release()


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({error.strerror or error}): make room, and run the same command again")


def make_plan(data: DataConfig, tokenizer: Tokenizer, shards: list[Shard]) -> dict[str, Any]:
    """All that the set depends on, and its shards: (file, part, parts) each."""
    parts = max(1, -(-FEWEST_PARTS // len(shards)))
    selection = [
        source.model_dump(mode="json", exclude={"path", "weight"}) | {"place": describe_source(source)}
        for source in data.sources
    ]
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "dtype": indexed_dtype(tokenizer.vocab_size).name,
        "validation_fraction": data.validation_fraction,
        "on_fault": data.on_fault,
        "sources": selection,
        "text": fingerprint_shards(shards, data.sources),
        "filters": {s.filter: load_filter(s.filter)[1] for s in data.sources if s.filter},
        "shards": [
            {"file": shard.name, "source": shard.source, "part": part, "parts": parts}
            for shard in shards
            for part in range(parts)
        ],
    }


def _check_folder(out: Path, plan: dict[str, Any]) -> None:
    if (out / PLAN).is_file():
        there = read_json(out / PLAN)
        differ = [key for key in plan if there.get(key) != plan[key]]
        if differ:
            raise UserError(
                f"{out} holds another token set ({', '.join(differ)} differ): choose another --out, or remove it"
            )
    elif {path.name for path in out.iterdir()} - {".lock"}:
        raise UserError(f"{out} is not empty and no token set: choose another --out")


def _is_done(out: Path, number: int) -> bool:
    path = shard_file(out, number)
    if not path.is_file():
        return False
    try:
        entry = read_json(path)
        files = {name: file for part in entry["splits"].values() for name, file in part["files"].items()}
        return all((out / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (UserError, OSError, KeyError, TypeError):
        return False


def _run(data: DataConfig, tokenizer: Tokenizer, out: Path, jobs: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Write the shards `jobs`; their entries as they are finished."""
    tree, proto = data.model_dump(mode="json"), tokenizer.proto
    if workers <= 1 or len(jobs) <= 1:
        _start_worker(tree, proto, tokenizer.path, str(out), ignore_interrupts=False)
        yield from map(_write_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), _start_worker, (tree, proto, tokenizer.path, str(out))) as pool:
        yield from pool.imap_unordered(_write_shard, jobs)


class _Job:
    """What every shard of this process is written with."""

    data: DataConfig
    tokenizer: Tokenizer
    out: Path
    shards: list[Shard]
    plan: dict[str, Any]


def _start_worker(tree: dict[str, Any], proto: bytes, name: str, out: str, ignore_interrupts: bool = True) -> None:
    if ignore_interrupts:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers.
    _Job.data = DataConfig.model_validate(tree)
    _Job.tokenizer = Tokenizer.from_proto(proto, name, _Job.data.lossy_tokenizer)
    _Job.out = Path(out)
    _Job.shards = list_shards(_Job.data.sources, _Job.data.hub_timeout)
    _Job.plan = read_json(_Job.out / PLAN)


def _write_shard(number: int) -> dict[str, Any]:
    """Write one shard and its entry."""
    job, tokenizer, out = _Job.plan["shards"][number], _Job.tokenizer, _Job.out
    shard = next(s for s in _Job.shards if s.name == job["file"] and s.source == job["source"])
    selector = Selector(_Job.data.sources[shard.source], _Job.data)
    splits = {"train": "documents"} | ({"validation": "held_out"} if _Job.data.validation_fraction else {})
    dtype = np.dtype(_Job.plan["dtype"])
    writers = {split: IndexedWriter(out / prefix_of(split, number), dtype) for split in splits}
    counts: Counter[str] = Counter()
    figures = {split: Counter[str]() for split in splits}
    waiting: list[tuple[str, str]] = []
    characters, began = 0, time.perf_counter()

    def flush() -> None:
        encoded = tokenizer.encode_batch([text for _, text in waiting])
        for (split, text), token_ids in zip(waiting, encoded, strict=True):
            writers[split].add([*token_ids, tokenizer.eot_id])
            figures[split].update(
                documents=1,
                tokens=len(token_ids) + 1,
                bytes=len(text.encode("utf-8")),
                unknowns=tokenizer.count_unknowns(token_ids),
            )
        waiting.clear()

    try:
        for record in reading_again(
            shard, Place(), job["part"], job["parts"], selector.columns, _Job.data.retries, _Job.data.retry_seconds
        ):
            verdict = selector.judge(record)
            counts[verdict] += 1
            if verdict in _HELD_OUT and record.text is not None:
                counts["long"] += len(record.text) > LONG_CHARACTERS
                waiting.append((_HELD_OUT[verdict], record.text))
                characters += len(record.text)
                if characters >= _BATCH_CHARACTERS:
                    flush()
                    characters = 0
        flush()
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    entry = {
        **job,
        "counts": {name: count for name, count in counts.items() if count},
        "seconds": round(time.perf_counter() - began, 3),
        "splits": {
            split: {
                "prefix": prefix_of(split, number),
                **{name: figures[split][name] for name in ("documents", "tokens", "bytes", "unknowns")},
                "files": {
                    f"{prefix_of(split, number)}.{kind}": file_entry(out / f"{prefix_of(split, number)}.{kind}")
                    for kind in ("bin", "idx")
                },
            }
            for split in splits
        },
    }
    write_json(shard_file(out, number), entry)
    return entry


def _finish(out: Path, plan: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """Check that the text is still the one that was planned for, and write the manifest."""
    text = fingerprint_shards(list_shards(data.sources, data.hub_timeout), data.sources)
    if text != plan["text"]:
        changed = [name for name, entry in text.items() if plan["text"].get(name) != entry]
        raise UserError(
            f"the text of {', '.join(changed)} changed while it was tokenised: remove {out}, and begin anew"
        )
    entries = [read_json(shard_file(out, number)) for number in range(len(plan["shards"]))]
    splits = sorted({split for entry in entries for split in entry["splits"]})
    totals = {
        split: {
            name: sum(entry["splits"][split][name] for entry in entries)
            for name in ("documents", "tokens", "bytes", "unknowns")
        }
        | {"content": content_of(entries, split)}
        for split in splits
    }
    if not totals["train"]["documents"]:
        raise UserError(f"there is no training text in {', '.join(map(describe_source, data.sources))}")
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry["counts"])
    manifest = {
        **{key: value for key, value in plan.items() if key != "shards"},
        "splits": totals,
        "counts": dict(counts),
        "shards": entries,
    }
    write_json(out / MANIFEST, manifest)
    return read_manifest(out)
