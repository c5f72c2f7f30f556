"""`hope data tokenize`: text to a token set (tokenset.py), in parallel, shard by shard, restartable after a kill."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.lanes import say_counts
from data_pipelines.megatron import IndexedWriter, indexed_dtype
from data_pipelines.records import Place
from data_pipelines.selecting import LONG_CHARACTERS, Selector, load_filter, reading_again
from data_pipelines.shards import FileShard, Shard, fingerprint_shards, list_shards
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
from hope_train.config.data import DataConfig, SourceConfig
from hope_train.errors import UserError

_log = logging.getLogger(__name__)

FEWEST_PARTS = 16
"""Where there are fewer files than this, each is divided (record by record) until there are about so many shards."""

_BATCH_CHARACTERS = 1 << 20

_JOIN_SECONDS = 5.0

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

    sources = _at_commits(data.sources, _commits_of_before(out))
    shards = list_shards(sources, data.hub_timeout)
    plan = make_plan(data, tokenizer, shards)
    sources = _at_commits(sources, plan["commits"])
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
        for entry in _run(data, tokenizer, out, shards, jobs, workers):
            done += 1
            tell(
                f"shard {done}/{len(plan['shards'])}: {entry['file']}: {entry['counts'].get('documents', 0)} documents"
            )
        return _finish(out, plan, sources, data.hub_timeout)
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
        "commits": [
            next((shard.commit for shard in shards if shard.source == number and isinstance(shard, FileShard)), None)
            for number in range(len(data.sources))
        ],
        "text": fingerprint_shards(shards, data.sources),
        "filters": {s.filter: load_filter(s.filter)[1] for s in data.sources if s.filter},
        "shards": [
            {"file": shard.name, "source": shard.source, "part": part, "parts": parts}
            for shard in shards
            for part in range(parts)
        ],
    }


def _commits_of_before(out: Path) -> Sequence[str | None]:
    """The hub's commits of the set that an interrupted call began: it is gone on with though the hub has moved."""
    return read_json(out / PLAN).get("commits", []) if (out / PLAN).is_file() else []


def _at_commits(sources: Sequence[SourceConfig], commits: Sequence[str | None]) -> list[SourceConfig]:
    """`sources`, those of the hub that name no revision at these commits."""
    known = [*commits, *[None] * len(sources)]
    return [
        source.model_copy(update={"revision": commit}) if source.hub and source.revision is None else source
        for source, commit in zip(sources, known, strict=False)
    ]


def _check_folder(out: Path, plan: dict[str, Any]) -> None:
    if (out / PLAN).is_file():
        there = read_json(out / PLAN)
        differ = [key for key in plan if key != "commits" and there.get(key) != plan[key]]
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


def _run(
    data: DataConfig, tokenizer: Tokenizer, out: Path, shards: list[Shard], jobs: list[int], workers: int
) -> Iterator[dict[str, Any]]:
    """Write the shards `jobs`; their entries as they are finished. Raises UserError where a worker is killed."""
    setting = (data.model_dump(mode="json"), tokenizer.proto, tokenizer.path, str(out), shards)
    if workers <= 1 or len(jobs) <= 1:
        _start_job(*setting)
        yield from map(_write_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    waiting = deque(jobs)
    running: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            running[ours] = context.Process(target=_work, args=(theirs, *setting), daemon=True)
            running[ours].start()
            theirs.close()
            ours.send(waiting.popleft())
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                yield _answer(pipe, running[pipe])
                if waiting:
                    pipe.send(waiting.popleft())
                else:
                    del running[pipe]
                    pipe.close()  # Its process ends by that.
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            process.join(_JOIN_SECONDS)


def _answer(pipe: Connection, process: BaseProcess) -> dict[str, Any]:
    """The entry that a worker has written. Raises what went wrong there."""
    try:
        found = pipe.recv()
    except (EOFError, OSError):
        process.join(_JOIN_SECONDS)
        raise UserError(
            f"a process that was tokenising has ended (exit code {process.exitcode}): was it killed, for want of "
            "memory perhaps? What is finished stays, and the same command goes on; fewer --workers need less"
        ) from None
    if isinstance(found, BaseException):
        raise found
    entry: dict[str, Any] = found
    return entry


def _work(pipe: Connection, *setting: Any) -> None:
    """A worker: writes the shards it is told to. Ends with its parent, also in the middle of one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _start_job(*setting)
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_write_shard(number))
        except (UserError, OSError) as error:
            pipe.send(error)
        except Exception:
            pipe.send(RuntimeError(f"a process that was tokenising failed:\n{traceback.format_exc()}"))


def _end_with(parent: BaseProcess) -> None:
    """Nobody but the parent knows which shards are written: the next call would write this one beside us."""
    parent.join()
    os._exit(1)


class _Job:
    """What every shard of this process is written with."""

    data: DataConfig
    tokenizer: Tokenizer
    out: Path
    shards: list[Shard]
    plan: dict[str, Any]


def _start_job(tree: dict[str, Any], proto: bytes, name: str, out: str, shards: list[Shard]) -> None:
    _Job.data = DataConfig.model_validate(tree)
    _Job.tokenizer = Tokenizer.from_proto(proto, name, _Job.data.lossy_tokenizer)
    _Job.out = Path(out)
    _Job.shards = shards
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
    characters, retries, began = 0, 0, time.perf_counter()

    def tell(line: str) -> None:
        nonlocal retries
        retries += 1
        _log.warning(line)

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
            shard,
            Place(),
            job["part"],
            job["parts"],
            selector.columns,
            retries=_Job.data.retries,
            wait=_Job.data.retry_seconds,
            tell=tell,
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
        "retries": retries,
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


def _finish(out: Path, plan: dict[str, Any], sources: Sequence[SourceConfig], hub_timeout: float) -> dict[str, Any]:
    """Check that the text is still the one that was planned for, and write the manifest."""
    text = fingerprint_shards(list_shards(sources, hub_timeout), sources)
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
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry["counts"])
    if not totals["train"]["documents"]:
        names = ", ".join(map(describe_source, sources))
        raise UserError(f"there is no training text in {names} ({say_counts(counts)})")
    manifest = {
        **{key: value for key, value in plan.items() if key != "shards"},
        "splits": totals,
        "counts": dict(counts),
        "retries": sum(entry.get("retries", 0) for entry in entries),
        "shards": entries,
    }
    write_json(out / MANIFEST, manifest)
    return read_manifest(out)
