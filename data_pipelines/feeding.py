"""Chunks of rows from lanes, made here or by worker processes ahead of time; either way the same ones."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from data_pipelines.lanes import Corpus, Lane
from data_pipelines.packing import Chunk, packed_rows
from data_pipelines.shards import Shard
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError

_ROWS_EACH = 8
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Recipe:
    """All that makes rows, in a form that goes to another process."""

    data: DataConfig
    proto: bytes
    tokenizer_name: str
    shards: list[Shard]
    seed: int
    context_length: int

    def open(self) -> tuple[Corpus, int]:
        """The corpus and the end-of-text id. Raises UserError."""
        tokenizer = Tokenizer.from_proto(self.proto, self.tokenizer_name, self.data.lossy_tokenizer)
        return Corpus(self.data, self.shards, tokenizer, self.seed), tokenizer.eot_id


def chunks_of(
    recipe: Recipe, corpus: Corpus, eot_id: int, lane: int, snapshot: dict[str, Any] | None, tell: Any
) -> Iterator[Chunk]:
    """A lane's chunks from a snapshot on (None: from its beginning)."""
    stream = recipe.data.stream
    first, offset = (0, 0) if snapshot is None else (int(snapshot["first"]), int(snapshot["offset"]))
    opened = Lane(corpus, lane, snapshot, tell)
    return packed_rows(
        *(opened, recipe.context_length, eot_id, stream.packing, stream.pack_rows, recipe.seed, first, offset)
    )


class Feed(Protocol):
    """Where chunks come from."""

    def start(self, lane: int, snapshot: dict[str, Any] | None) -> None:
        """Begin a lane, or begin it again, from a snapshot on."""

    def next(self, lane: int) -> Chunk:
        """The lane's next chunk. Raises UserError; the lane has to be started again then."""

    def retries(self) -> int:
        """How often a source had to be tried again so far."""

    def close(self) -> None:
        """End all work."""


class LocalFeed:
    """Chunks made when they are asked for, in this process."""

    def __init__(self, recipe: Recipe, tell: Any) -> None:
        self._recipe, self._tell = recipe, tell
        self._corpus, self._eot_id = recipe.open()
        self._lanes: dict[int, Iterator[Chunk]] = {}
        self._retries = 0

    def _note(self, line: str) -> None:
        self._retries += 1
        self._tell(line)

    def start(self, lane: int, snapshot: dict[str, Any] | None) -> None:
        """Nothing is read yet."""

        def begin() -> Iterator[Chunk]:
            yield from chunks_of(self._recipe, self._corpus, self._eot_id, lane, snapshot, self._note)

        self._lanes[lane] = begin()

    def next(self, lane: int) -> Chunk:
        """Raises UserError."""
        return next(self._lanes[lane])

    def retries(self) -> int:
        """Tries counted here."""
        return self._retries

    def close(self) -> None:
        """Let go of open files."""
        self._lanes.clear()


class _Worker:
    """One process and what it has sent."""

    def __init__(self, recipe: Recipe, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, recipe), name=f"data-{number}", daemon=True)
        self.process.start()
        theirs.close()


class ProcessFeed:
    """Chunks from worker processes, some ahead for each lane; a lane stays with its worker."""

    def __init__(self, recipe: Recipe, workers: int, prefetch_rows: int, tell: Any) -> None:
        stream = recipe.data.stream
        self._ahead = max(1, prefetch_rows // (stream.pack_rows if stream.packing == "best_fit" else _ROWS_EACH))
        self._tell = tell
        self._workers = [_Worker(recipe, number) for number in range(workers)]
        self._of_lane: dict[int, _Worker] = {}
        self._run: dict[int, int] = {}
        self._ready: dict[int, deque[Chunk | Exception]] = {}
        self._changed = threading.Condition()
        self._lost: dict[_Worker, str] = {}
        self._retries = 0
        self._closing = False
        for worker in self._workers:
            threading.Thread(target=self._listen, args=(worker,), daemon=True).start()

    def start(self, lane: int, snapshot: dict[str, Any] | None) -> None:
        """What is still under way for the lane from before is dropped."""
        worker = self._of_lane.setdefault(lane, self._workers[len(self._of_lane) % len(self._workers)])
        with self._changed:
            self._run[lane] = self._run.get(lane, 0) + 1
            self._ready[lane] = deque()
        with contextlib.suppress(OSError):  # A worker that has ended is noticed by `next`.
            worker.pipe.send(("start", lane, self._run[lane], snapshot, self._ahead))

    def next(self, lane: int) -> Chunk:
        """Raises UserError, also where the worker has ended."""
        worker = self._of_lane[lane]
        with self._changed:
            self._changed.wait_for(lambda: self._ready[lane] or worker in self._lost)
            if not self._ready[lane]:
                raise UserError(
                    f"a data worker has ended ({self._lost[worker]}): was it killed, for want of memory perhaps? "
                    "The same command goes on; fewer data.stream.workers or prefetch_rows need less"
                )
            found = self._ready[lane].popleft()
        if isinstance(found, Exception):
            raise found
        with contextlib.suppress(OSError):
            worker.pipe.send(("more", lane))
        return found

    def retries(self) -> int:
        """Of all workers."""
        return self._retries

    def close(self) -> None:
        """End the workers."""
        self._closing = True
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(_JOIN_SECONDS)
            worker.pipe.close()

    def _listen(self, worker: _Worker) -> None:
        while True:
            try:
                kind, lane, run, content = worker.pipe.recv()
            except (EOFError, OSError, TypeError):
                break
            if kind == "retry":
                self._retries += 1
                self._tell(content)
                continue
            with self._changed:
                if run == self._run.get(lane):
                    self._ready[lane].append(content)
                    self._changed.notify_all()
        if not self._closing:
            worker.process.join(_JOIN_SECONDS)
            with self._changed:
                self._lost[worker] = f"exit code {worker.process.exitcode}"
                self._changed.notify_all()


def _work(pipe: Connection, recipe: Recipe) -> None:
    """A worker: serves its lanes in turn, no further ahead than it has been asked to. Ends with its parent."""
    # What a terminal or a scheduler sends to every process is the trainer's, which finishes its step first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    lanes: dict[int, tuple[int, Iterator[Chunk]]] = {}
    wanted: dict[int, int] = {}
    opened: list[tuple[Corpus, int]] = []
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while pipe.poll(None if not any(wanted.values()) else 0):
                kind, lane, *rest = pipe.recv()
                if kind == "start":
                    run, snapshot, ahead = rest
                    lanes[lane] = (run, _beginning(recipe, opened, lane, snapshot, pipe))
                    wanted[lane] = ahead
                elif lane in lanes:
                    wanted[lane] += 1
                if any(wanted.values()):
                    break
            for lane in [lane for lane, count in wanted.items() if count]:
                run, chunks = lanes[lane]
                wanted[lane] -= 1
                content: Any
                try:
                    content = next(chunks)
                except UserError as error:
                    content = error
                except Exception:
                    content = RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")
                if isinstance(content, Exception):
                    del lanes[lane]
                    wanted[lane] = 0
                pipe.send(("chunk", lane, run, content))


def _beginning(
    recipe: Recipe, opened: list[tuple[Corpus, int]], lane: int, snapshot: dict[str, Any] | None, pipe: Connection
) -> Iterator[Chunk]:
    if not opened:
        opened.append(recipe.open())
    corpus, eot_id = opened[0]
    yield from chunks_of(recipe, corpus, eot_id, lane, snapshot, lambda line: pipe.send(("retry", lane, 0, line)))
