"""Growing batches: the same samples on any number of ranks and workers, in every mode, and after a resume on others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.batches import DataBundle, open_data
from data_pipelines.samples import BatchSource
from data_pipelines.streams import merge_states
from data_pipelines.tokenising import tokenise
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig

LENGTH = 16
TRAIN = TrainConfig(
    context_length=LENGTH,
    micro_batch_size=1,
    batch_tokens=96 * LENGTH,
    batch_ramp={"start_tokens": 24 * LENGTH, "increment_tokens": 24 * LENGTH, "over_tokens": 300 * LENGTH},
    tokens=2000 * LENGTH,
)
ROWS = [24] * 5 + [48] * 2 + [72] * 2 + [96] * 3
"""Rows of the first batches."""

MODES = ("cached", "indexed", "blended", "split", "best_fit")
RANKS = (1, 2, 3, 4, 6, 8)

Open = Callable[..., BatchSource]


@pytest.fixture
def opened(
    texts: list[str], make_config: Callable[..., DataConfig], tokenizer: Tokenizer, tmp_path: Path
) -> Iterator[Open]:
    """Opens a source of a mode; a small one, whose epochs wrap."""
    bundles: list[DataBundle] = []

    def make(mode: str, **stream: Any) -> BatchSource:
        more: dict[str, Any] = {"reset_at_documents": True}
        if mode in ("indexed", "blended"):
            sets = [tmp_path / f"set-{number}" for number in range(2)]
            for number, place in enumerate(sets):
                if not place.exists():
                    tokenise(make_config(texts[60 * number : 60 + 60 * number]), tokenizer, place, 1)
            weights = [{"weight": weight} if mode == "blended" else {} for weight in (3, 1)]
            sources = [{"indexed": str(place), **weight} for place, weight in zip(sets, weights, strict=True)]
            more |= {"mode": "indexed", "sources": sources}
        elif mode != "cached":
            settings = {"lanes": 6, "workers": 0, "shuffle_documents": 16, "pack_rows": 6, "packing": mode, **stream}
            more |= {"mode": "streaming", "stream": settings}
        data = make_config(texts[:120], **more)
        bundles.append(open_data(data, TRAIN, 3, tokenizer.vocab_size))
        return bundles[-1].train

    yield make
    for bundle in bundles:
        bundle.train.close()


def arrays(batch: Any) -> list[np.ndarray]:
    return [batch.tokens, batch.targets, batch.starts]


def assert_shares(sources: list[BatchSource], index: int, expected: Any) -> None:
    """The shares of the ranks, one after the other, are the whole batch."""
    shares = [source.batch(index, rank, len(sources)) for rank, source in enumerate(sources)]
    for joined, whole in zip(zip(*map(arrays, shares), strict=True), arrays(expected), strict=True):
        assert np.array_equal(np.concatenate(joined), whole)


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_the_endless_sequence_cut(opened: Open, mode: str) -> None:
    source, plain = opened(mode), opened(mode)
    assert [source.sizes.samples_of(index)[1] for index in range(len(ROWS))] == ROWS
    whole = {}
    for first in range(0, sum(ROWS), 24):
        rows = plain.samples(first, 24)
        numbers = plain.row_order(first, 24).tolist()
        whole |= dict(zip(numbers, zip(*arrays(rows), strict=True), strict=True))
    seen: list[int] = []
    for index, count in enumerate(ROWS):
        batch, numbers = source.batch(index), source.row_order(sum(ROWS[:index]), count).tolist()
        for number, row in zip(numbers, zip(*arrays(batch), strict=True), strict=True):
            assert all(map(np.array_equal, row, whole[number]))
        seen += numbers
    assert sorted(seen) == list(range(sum(ROWS)))


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_ranks_sees_the_same_batches(opened: Open, mode: str) -> None:
    source = opened(mode)
    expected = [source.batch(index) for index in range(len(ROWS))]
    for ranks in RANKS:
        parts = [opened(mode) for _ in range(ranks)]
        for index, batch in enumerate(expected):
            assert_shares(parts, index, batch)


@pytest.mark.parametrize("mode", ["split", "best_fit"])
@pytest.mark.parametrize(
    ("ranks", "workers"),
    [
        *[(1, 2), (2, 1)],
        *(pytest.param(r, w, marks=pytest.mark.slow) for r in RANKS for w in (1, 3) if (r, w) != (2, 1)),
    ],
)
@pytest.mark.timeout(300)
def test_any_number_of_workers_gives_the_same_batches(opened: Open, mode: str, ranks: int, workers: int) -> None:
    source = opened(mode)
    parts = [opened(mode, workers=workers) for _ in range(ranks)]
    for index in range(len(ROWS)):
        assert_shares(parts, index, source.batch(index))
    for part in parts:
        part.close()


@pytest.mark.parametrize("mode", ["split", "best_fit"])
@pytest.mark.parametrize(("before", "after", "at"), [(1, 1, 3), (3, 2, 6), (2, 8, 5), (6, 4, 8)])
def test_a_resume_in_the_ramp_goes_on_exactly_on_other_ranks(
    opened: Open, mode: str, before: int, after: int, at: int
) -> None:
    source = opened(mode)
    first = [opened(mode) for _ in range(before)]
    for index in range(at):
        for rank, part in enumerate(first):
            part.batch(index, rank, before)
    sample = source.sizes.first_sample(at)
    assert sample == sum(ROWS[:at])
    state = json.loads(json.dumps(merge_states([part.state(sample) for part in first])))
    second = [opened(mode) for _ in range(after)]
    for part in second:
        part.restore(state)
    for index in range(at, len(ROWS)):
        assert_shares(second, index, source.batch(index))
