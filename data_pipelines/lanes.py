"""A lane: an endless stream of documents that depends on the configuration and the seed alone.

Sources without weights form one group, sources with weights a group each. A group's units (a shard, or every n-th
record of one, where there are fewer shards than lanes) are dealt to the lanes anew in each epoch. A lane reads its
units one after the other, a block of documents at a time, and gives the documents of a block in shuffled order. So
where a lane is takes a few numbers to say: the epoch, the unit, the record at which the block begins, and how many
documents of the block have been given. The block itself is read again at a resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.order import permute
from data_pipelines.records import Place, Record
from data_pipelines.selecting import LONG_CHARACTERS, Selector, reading_again
from data_pipelines.shards import Shard
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError

_BLOCK_CHARACTERS = 1 << 22
"""A block ends with the document by which it has this much text."""

_EMPTY_EPOCHS = 3
"""A lane that has had no document in its first epochs, so many of them, has too little text."""

_ENCODE_CHARACTERS = 1 << 17
"""Text that is tokenised at a time."""


class Unit(NamedTuple):
    """What a lane reads in one go: every `parts`-th record of a shard, from number `part` + 1."""

    shard: Shard
    part: int
    parts: int


class LaneDocument(NamedTuple):
    """A tokenised document."""

    tokens: np.ndarray
    """int32, without end-of-text."""
    source: int
    id: str


class Position(NamedTuple):
    """Where a group's stream is, in front of a document."""

    epoch: int = 0
    unit: int = 0
    """Of the lane's units of this epoch, in their order."""
    cursor: int = 0
    number: int = 0
    """With `cursor`: the `Place` in the unit at which the block begins."""
    taken: int = 0
    """Documents of the block given already."""
    counts: tuple[tuple[str, int], ...] = ()
    """Of all records before the block."""


@dataclass(frozen=True)
class Corpus:
    """What all lanes of a run read from."""

    data: DataConfig
    shards: Sequence[Shard]
    tokenizer: Tokenizer
    seed: int

    @property
    def groups(self) -> list[list[Shard]]:
        """The shards of each group."""
        if not any(source.weight is not None for source in self.data.sources):
            return [list(self.shards)]
        numbers = range(len(self.data.sources))
        return [[shard for shard in self.shards if shard.source == number] for number in numbers]

    @property
    def weights(self) -> list[float]:
        """Of each group."""
        weights = [source.weight for source in self.data.sources if source.weight is not None]
        return weights or [1.0]


@dataclass
class _Block:
    texts: list[tuple[str, int, str]] = field(default_factory=list)
    """(text, source, id)."""
    after: Position = Position()  # noqa: RUF009 - immutable
    """Where the next block begins."""


class GroupStream:
    """One group's documents in one lane."""

    def __init__(
        self,
        corpus: Corpus,
        lane: int,
        group: int,
        position: Position,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            lane: its number, below data.stream.lanes.
            position: where to begin, as `position` gave it; none of the documents before it is read.
            tell: gets a line for every try to reach a source again.
        """
        self._corpus, self._lane, self._group, self._tell = corpus, lane, group, tell
        shards = corpus.groups[group]
        lanes = corpus.data.stream.lanes
        parts = max(1, -(-lanes // len(shards)))
        self._units = [Unit(shard, part, parts) for shard in shards for part in range(parts)]
        self._selectors = {number: Selector(source, corpus.data) for number, source in enumerate(corpus.data.sources)}
        self._reading: tuple[tuple[int, int, Place], Iterator[Record]] | None = None
        self.position = position._replace(taken=0)
        self._block = self._read_block()
        self._open(position.taken)

    def units(self, epoch: int) -> list[Unit]:
        """The lane's units of an epoch, in the order in which it reads them."""
        count, lanes = len(self._units), self._corpus.data.stream.lanes
        places = np.arange(self._lane, count, lanes, dtype=np.int64)
        order = permute(places, count, self._corpus.seed, epoch, f"units-{self._group}")
        return [self._units[number] for number in order.tolist()]

    @property
    def counts(self) -> Counter[str]:
        """Of all records read, those of the block at hand included."""
        return Counter(dict(self._block.after.counts))

    def next(self) -> LaneDocument:
        """The next document; `position` is behind it afterwards."""
        if self.position.taken == len(self._order):
            self.position = self._block.after
            self._block = self._read_block()
            self._open(0)
        place = self.position.taken
        if place >= self._encoded_to:
            self._encode(place)
        _, source, document_id = self._block.texts[self._order[place]]
        tokens = self._encoded.pop(place)
        self.position = self.position._replace(taken=place + 1)
        return LaneDocument(tokens, source, document_id)

    def _open(self, taken: int) -> None:
        """Begin to give the block's documents, but for the first `taken`."""
        start = self.position
        count = len(self._block.texts)
        name = f"block-{self._group}-{self._lane}-{start.unit}-{start.cursor}-{start.number}"
        self._order = permute(np.arange(count), count, self._corpus.seed, start.epoch, name).tolist() if count else []
        self._encoded: dict[int, np.ndarray] = {}
        self._encoded_to = taken
        self.position = start._replace(taken=taken)

    def _encode(self, place: int) -> None:
        end, characters = place, 0
        while end < len(self._order) and characters < _ENCODE_CHARACTERS:
            characters += len(self._block.texts[self._order[end]][0])
            end += 1
        texts = [self._block.texts[number][0] for number in self._order[place:end]]
        for number, tokens in enumerate(self._corpus.tokenizer.encode_batch(texts), start=place):
            self._encoded[number] = np.array(tokens, dtype=np.int32)
        for number in self._order[place:end]:  # The text itself is not needed any more.
            _, source, document_id = self._block.texts[number]
            self._block.texts[number] = ("", source, document_id)
        self._encoded_to = end

    def _read_block(self) -> _Block:
        """The documents of the block at `position`. Raises UserError for a lane without any text."""
        first = self.position
        epoch, unit, place = first.epoch, first.unit, Place(first.cursor, first.number)
        counts = Counter(dict(first.counts))
        empty_epochs = 0 if unit or place != Place() else 1
        block, characters = _Block(), 0
        while True:
            units = self.units(epoch)
            while unit < len(units):
                for document, behind in self._documents(epoch, unit, units[unit], place, counts):
                    block.texts.append(document)
                    characters += len(document[0])
                    full = len(block.texts) >= self._corpus.data.stream.shuffle_documents
                    if full or characters >= _BLOCK_CHARACTERS:
                        block.after = Position(epoch, unit, *behind, 0, _frozen(counts))
                        return block
                unit, place = unit + 1, Place()
            epoch, unit = epoch + 1, 0
            if block.texts:
                block.after = Position(epoch, 0, 0, 0, 0, _frozen(counts))
                return block
            if empty_epochs == (1000 if counts["documents"] else _EMPTY_EPOCHS):
                lanes = self._corpus.data.stream.lanes
                advice = "use data.mode=cached for so little text" if not counts else "look at what is filtered out"
                raise UserError(
                    f"lane {self._lane} of data.stream.lanes={lanes} has no training document ({say_counts(counts)}): "
                    f"set fewer lanes, or {advice}"
                )
            empty_epochs += 1

    def _documents(
        self, epoch: int, number: int, unit: Unit, place: Place, counts: Counter[str]
    ) -> Iterator[tuple[tuple[str, int, str], Place]]:
        """(text, source, id) of the training documents of a unit from `place` on, and the place behind each."""
        data, source = self._corpus.data, unit.shard.source
        selector = self._selectors[source]
        if self._reading is None or self._reading[0] != (epoch, number, place):
            records = reading_again(
                unit.shard,
                place,
                unit.part,
                unit.parts,
                selector.columns,
                retries=data.retries,
                wait=data.retry_seconds,
                tell=self._tell,
            )
        else:  # The block before ended here: the file is open.
            records = self._reading[1]
        self._reading = None
        for record in records:
            verdict = selector.judge(record)
            counts[verdict] += 1
            if verdict == "documents":
                assert record.text is not None
                counts["long"] += len(record.text) > LONG_CHARACTERS
                name = unit.shard.name if record.whole_file else f"{unit.shard.name}:{record.number}"
                self._reading = (epoch, number, record.after), records
                yield (record.text, source, name), record.after


def _frozen(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, count) for name, count in counts.items() if count))


def say_counts(counts: Counter[str]) -> str:
    """What became of records, in words."""
    return ", ".join(f"{count} {name}" for name, count in _frozen(counts)) or "no records at all"


Snapshot = dict[str, Any]
"""Where a lane is, in a form that JSON holds: {"drawn": tokens per group, "groups": positions}."""


class Lane:
    """Documents of all groups, mixed by weight: the next one comes from the group that is furthest behind."""

    def __init__(
        self, corpus: Corpus, number: int, snapshot: Snapshot | None, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        """`snapshot`: where to begin, from `snapshot()`; None: at the beginning."""
        self.number = number
        self._weights = corpus.weights
        groups = range(len(self._weights))
        positions = [Position() for _ in groups] if snapshot is None else map(read_position, snapshot["groups"])
        self._drawn = [0 for _ in groups] if snapshot is None else list(snapshot["drawn"])
        self._streams = [
            GroupStream(corpus, number, group, position, tell)
            for group, position in zip(groups, positions, strict=True)
        ]

    def snapshot(self) -> Snapshot:
        """Where the lane is now, in front of the document that `draw` gives next."""
        return {"drawn": list(self._drawn), "groups": [list(stream.position) for stream in self._streams]}

    def draw(self) -> LaneDocument:
        """The next document."""
        behind = [drawn / weight for drawn, weight in zip(self._drawn, self._weights, strict=True)]
        group = behind.index(min(behind))
        document = self._streams[group].next()
        self._drawn[group] += len(document.tokens) + 1
        return document

    def counts(self) -> Counter[str]:
        """Of all records read so far."""
        total: Counter[str] = Counter()
        for stream in self._streams:
            total.update(stream.counts)
        return total


def read_position(values: Sequence[Any]) -> Position:
    """A `Position` that has been through JSON."""
    epoch, unit, cursor, number, taken = map(int, values[:5])
    counts = tuple((str(name), int(count)) for name, count in values[5])
    return Position(epoch, unit, cursor, number, taken, counts)
