"""Training on text that is tokenised on the way: sample k is row k // L of lane k mod L, of L lanes.

Lanes are independent of each other (lanes.py), so who makes which one changes nothing, and a rank makes only those that
its rows come from: the rows of a batch stand in the order of their lanes, so that with L lanes and R ranks each has
about L / R of them. What a checkpoint holds of each lane is where it was, a few numbers; from there it goes on without
reading what came before. Without them it begins at its beginning, and gives the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines.feeding import Feed, LocalFeed, ProcessFeed, Recipe
from data_pipelines.holding import held_out_split
from data_pipelines.lanes import Corpus
from data_pipelines.pack import CorpusSplit
from data_pipelines.packing import Chunk
from data_pipelines.samples import Batch, BatchSource, Segment
from data_pipelines.selecting import load_filter
from data_pipelines.shards import fingerprint_shards, list_shards
from data_pipelines.sources import describe_source
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.unpacking import GzipIndexes
from hope_train.config.batches import BatchSizes
from hope_train.config.data import DataConfig
from hope_train.errors import UserError

_KNOWN = 16
"""Places of a lane that are remembered, to go back to."""


class StreamSource(BatchSource):
    """Batches of streamed text."""

    reads_on = True

    def __init__(self, recipe: Recipe, sizes: BatchSizes, tell: Callable[[str], None]) -> None:
        """Starts nothing yet. `tell` gets a line for every try to reach a source again."""
        data = recipe.data
        self.recipe = recipe
        self.context_length = recipe.context_length
        self.sizes = sizes
        self.seed = recipe.seed
        self.reset_at_documents = data.reset_at_documents
        self.windows = None
        self.lanes = data.stream.lanes
        self._tell = tell
        self._feed: Feed | None = None
        self._chunks: dict[int, Chunk] = {}
        self._running: set[int] = set()
        self._known: dict[int, list[dict[str, Any]]] = {}
        self._asked: dict[int, int] = {}
        self._counts: dict[int, Counter[str]] = {}
        self._prepared: tuple[tuple[int, int, int], Batch] | None = None

    def prepare(self, index: int, rank: int = 0, ranks: int = 1) -> None:
        """Wait for the rows. Raises UserError: a source is gone for good, or a worker."""
        self._prepared = (index, rank, ranks), super().batch(index, rank, ranks)

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> Batch:
        """As `BatchSource.batch`; what has been prepared is given once."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == (index, rank, ranks):
            return prepared[1]
        return super().batch(index, rank, ranks)

    # Which sample

    def row_order(self, first: int, count: int) -> np.ndarray:
        """Lane by lane, and in each lane in order."""
        samples = np.arange(first, first + count, dtype=np.int64)
        return samples[np.argsort(samples % self.lanes, kind="stable")]

    def window_numbers(self, first: int, count: int) -> np.ndarray:
        """The samples' own numbers: there are no windows to name."""
        return self.row_order(first, count)

    def contents(self, first: int, count: int) -> list[list[Segment]]:
        """Documents of each row; a sample that is far from the last one asked for takes long."""
        names = [describe_source(source) for source in self.recipe.data.sources]
        found = []
        for sample in self.row_order(first, count).tolist():
            chunk, row = self._row(sample)
            found.append([Segment(place, names[source], name) for place, source, name in chunk.segments[row]])
        return found

    # Rows

    def _rows(self, samples: np.ndarray) -> Batch:
        shape = (len(samples), self.context_length)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        starts = np.empty(shape, bool) if self.reset_at_documents else None
        self._start(samples)
        for row, sample in enumerate(samples.tolist()):
            chunk, place = self._row(sample)
            tokens[row], targets[row] = chunk.tokens[place], chunk.targets[place]
            if starts is not None:
                starts[row] = chunk.starts[place]
        return Batch(tokens, targets, starts)

    def _start(self, samples: np.ndarray) -> None:
        """Let all lanes begin before the first is waited for."""
        _, first = np.unique(samples % self.lanes, return_index=True)
        for sample in samples[first].tolist():
            lane, row = sample % self.lanes, sample // self.lanes
            self._asked[lane] = row
            if lane not in self._running:
                self._begin(lane, row)

    def _begin(self, lane: int, row: int) -> None:
        """Start a lane from the last known place that is not behind `row`."""
        if self._feed is None:
            workers = self.recipe.data.stream.workers
            ahead = self.recipe.data.stream.prefetch_rows
            self._feed = (
                ProcessFeed(self.recipe, workers, ahead, self._tell) if workers else LocalFeed(self.recipe, self._tell)
            )
        places = [place for place in self._known.get(lane, []) if place["first"] <= row]
        self._feed.start(lane, max(places, key=lambda place: int(place["first"]), default=None))
        self._running.add(lane)
        self._chunks.pop(lane, None)

    def _row(self, sample: int) -> tuple[Chunk, int]:
        """The chunk that has a sample, and its row there."""
        lane, row = sample % self.lanes, sample // self.lanes
        chunk = self._chunks.get(lane)
        if lane not in self._running or (chunk is not None and row < chunk.first):
            self._begin(lane, row)
            chunk = None
        assert self._feed is not None
        while chunk is None or row >= chunk.first + len(chunk.tokens):
            try:
                chunk = self._feed.next(lane)
            except BaseException:
                self._running.discard(lane)
                self._chunks.pop(lane, None)
                raise
            self._remember(lane, chunk)
        return chunk, row - chunk.first

    def _remember(self, lane: int, chunk: Chunk) -> None:
        self._chunks[lane] = chunk
        self._counts[lane] = chunk.counts
        known = self._known.setdefault(lane, [])
        if all(place["first"] != chunk.first for place in known):
            known.append(chunk.snapshot)
            if len(known) > _KNOWN:
                # The newest, of the older ones every other, and where this batch began: it may fail.
                known.sort(key=lambda place: int(place["first"]))
                began = [place for place in known if place["first"] <= self._asked.get(lane, 0)][-1:]
                del known[1 : -_KNOWN // 2 : 2]
                known += [place for place in began if place not in known]

    # For checkpoints and logs

    def state(self, sample: int) -> dict[str, Any]:
        """{lane: place} of every lane that this rank knows of: the last place that is not behind what comes next."""
        found = {}
        for lane, places in sorted(self._known.items()):
            row = -(-(sample - lane) // self.lanes)
            before = [place for place in places if place["first"] <= row]
            if before:
                found[str(lane)] = max(before, key=lambda place: int(place["first"]))
        return {"lanes": found}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Of several ranks' states: `merge_states` them first."""
        for lane, place in states.get("lanes", {}).items():
            self._known.setdefault(int(lane), []).append(place)
            self._counts[int(lane)] = Counter(place["counts"])

    def metrics(self) -> dict[str, Any]:
        """{"lanes": {lane: records by what became of them}, "retries": tries to reach a source again, here}."""
        retries = 0 if self._feed is None else self._feed.retries()
        return {"lanes": {str(lane): dict(counts) for lane, counts in self._counts.items()}, "retries": retries}

    def close(self) -> None:
        """End the workers."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None
        self._running.clear()
        self._chunks.clear()


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks: each lane from the rank that is furthest in it."""
    lanes: dict[str, dict[str, Any]] = {}
    for state in states:
        for lane, place in state.get("lanes", {}).items():
            if lane not in lanes or place["first"] > lanes[lane]["first"]:
                lanes[lane] = place
    return {"lanes": lanes} if lanes else {}


def merge_metrics(ranks: list[dict[str, Any]]) -> dict[str, int]:
    """Counters of all lanes, each lane counted once, by the rank that is furthest in it."""
    lanes: dict[str, Counter[str]] = {}
    for own in ranks:
        for lane, counts in own["lanes"].items():
            lanes[lane] = max(lanes.get(lane, Counter()), Counter(counts), key=Counter.total)
    total = sum(lanes.values(), Counter[str]())
    found = {name: count for name, count in sorted(total.items()) if count}
    return {**found, "retries": sum(own["retries"] for own in ranks)}


def open_stream(
    data: DataConfig,
    tokenizer: Tokenizer,
    context_length: int,
    sizes: BatchSizes,
    seed: int,
    indexes: GzipIndexes,
    tell: Callable[[str], None],
) -> tuple[StreamSource, dict[str, Any], CorpusSplit | None]:
    """(batches, what they depend on, held-out text). Raises UserError."""
    if any(source.max_bytes is not None for source in data.sources):
        raise UserError("max_bytes limits a source that is read in order, and a stream is not: leave it out")
    shards = list_shards(data.sources, data.hub_timeout, indexes)
    stream = data.stream
    text = fingerprint_shards(shards, data.sources)
    identity = {
        "mode": data.mode,
        "lanes": stream.lanes,
        "shuffle_documents": stream.shuffle_documents,
        "packing": stream.packing if stream.packing == "split" else f"{stream.packing} {stream.pack_rows}",
        "on_fault": data.on_fault,
        "files": text,
        "selection": [
            {
                **source.model_dump(include={"weight", "min_characters", "max_characters", "language_field"}),
                "language": list(source.language),
                "filter": f"{source.filter} {load_filter(source.filter)[1]}" if source.filter else None,
            }
            for source in data.sources
        ],
    }
    recipe = Recipe(data, tokenizer.proto, tokenizer.path, shards, seed, context_length)
    held_out = held_out_split(Corpus(data, shards, tokenizer, seed), identity)
    return StreamSource(recipe, sizes, tell), identity, held_out
