"""Streams: the same samples for any ranks, workers and batch sizes, from any place, over epochs and mixtures."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batches import DataBundle, open_data
from data_pipelines.carving import is_held_out, text_hash
from data_pipelines.packing import fit
from data_pipelines.samples import IGNORED
from data_pipelines.streams import StreamSource, merge_metrics, merge_states
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError
from tests.data_pipelines.conftest import make_texts

ROWS, LENGTH = 24, 32
TRAIN = TrainConfig(context_length=LENGTH, batch_tokens=LENGTH * ROWS, micro_batch_size=1, tokens=LENGTH * ROWS * 100)

Open = Callable[..., DataBundle]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents in every kind of file, 150 others in one .gz."""
    texts, place = make_texts(300, seed=1), tmp_path_factory.mktemp("streams")
    (place / "mixed").mkdir()
    (place / "mixed" / "a.jsonl").write_bytes(lines(texts[:70]))
    (place / "mixed" / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts[70:120])))
    (place / "mixed" / "c.jsonl.zst").write_bytes(zstandard.compress(lines(texts[120:170])))
    table = pyarrow.table({"text": texts[170:230], "n": list(range(60))})
    pyarrow.parquet.write_table(table, place / "mixed" / "d.parquet", row_group_size=17)
    table = pyarrow.table({"text": texts[230:270]})
    with (
        pyarrow.OSFile(str(place / "mixed" / "e.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=7)
    with (
        pyarrow.OSFile(str(place / "mixed" / "f.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(pyarrow.table({"text": texts[270:290]}), max_chunksize=7)
    for number, text in enumerate(texts[290:]):
        (place / "mixed" / f"g{number}.txt").write_text(text, encoding="utf-8")
    (place / "other.jsonl.gz").write_bytes(gzip.compress(lines(make_texts(150, seed=2))))
    return place


@pytest.fixture
def opened(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Open]:
    """Opens a stream over both sources, its workers ended after the test."""
    bundles: list[DataBundle] = []

    def make(
        train: TrainConfig = TRAIN, weights: bool = True, seed: int = 3, tree: Any = None, **stream: Any
    ) -> DataBundle:
        sources = [{"path": str(folder / "mixed")}, {"path": str(folder / "other.jsonl.gz")}]
        if weights:
            sources = [{**source, "weight": weight} for source, weight in zip(sources, (3, 1), strict=True)]
        data = {
            "mode": "streaming",
            "tokenizer": tokenizer.path,
            "sources": sources,
            "validation_fraction": 0.1,
            "reset_at_documents": True,
            "cache_dir": str(tmp_path / "cache"),
            **(tree or {}),
            "stream": {"lanes": 6, "workers": 0, "shuffle_documents": 16, "pack_rows": 6, **stream},
        }
        bundles.append(open_data(DataConfig.model_validate(data), train, seed, tokenizer.vocab_size))
        return bundles[-1]

    yield make
    for bundle in bundles:
        bundle.train.close()


def arrays(batch: Any) -> list[np.ndarray]:
    return [batch.tokens, batch.targets, batch.starts]


def same(one: Any, other: Any) -> bool:
    return all(map(np.array_equal, arrays(one), arrays(other)))


PACKINGS = ("split", "best_fit")
EPOCHS = 80
"""Batches after which the smaller source has begun anew several times in every lane."""


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_any_number_of_ranks_sees_the_same_batches(opened: Open, packing: str, ranks: int) -> None:
    whole = opened(packing=packing).train
    parts = [opened(packing=packing).train for _ in range(ranks)]
    for index in (0, 1, 2, 9, EPOCHS):
        batch = whole.batch(index)
        shares = [part.batch(index, rank, ranks) for rank, part in enumerate(parts)]
        joined = [np.concatenate(arrays_) for arrays_ in zip(*map(arrays, shares), strict=True)]
        assert all(map(np.array_equal, joined, arrays(batch)))


def test_a_rank_makes_only_the_lanes_of_its_rows(opened: Open) -> None:
    for ranks, lanes in ((1, 6), (2, 3), (3, 2), (6, 1), (4, 2)):
        source = opened().train
        assert isinstance(source, StreamSource)
        for index in range(3):
            source.batch(index, 1 % ranks, ranks)
        assert len(source._running) == lanes


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.timeout(120)
def test_any_number_of_workers_gives_the_same_batches(opened: Open, packing: str) -> None:
    here = opened(packing=packing).train
    for workers in (1, 3):
        there = opened(packing=packing, workers=workers).train
        for index in (0, 1, 7):
            assert same(here.batch(index), there.batch(index))
        there.close()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 2), (2, 8), (6, 4)])
def test_a_resume_on_other_ranks_goes_on_exactly(
    opened: Open, packing: str, weights: bool, before: int, after: int
) -> None:
    whole = opened(packing=packing, weights=weights).train
    expected = [whole.batch(index) for index in range(14)]
    first = [opened(packing=packing, weights=weights).train for _ in range(before)]
    for index in range(9):
        for rank, source in enumerate(first):
            source.batch(index, rank, before)
    state = json.loads(json.dumps(merge_states([source.state(9 * ROWS) for source in first])))
    assert len(json.dumps(state)) < 8000
    second = [opened(packing=packing, weights=weights).train for _ in range(after)]
    for source in second:
        source.restore(state)
    for index in range(9, 14):
        shares = [source.batch(index, rank, after) for rank, source in enumerate(second)]
        joined = [np.concatenate(arrays_) for arrays_ in zip(*map(arrays, shares), strict=True)]
        assert all(map(np.array_equal, joined, arrays(expected[index])))


def test_a_resume_does_not_read_what_came_before(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines import lanes

    source = opened(shuffle_documents=4).train
    for index in range(EPOCHS):
        source.batch(index)
    state, expected = source.state(EPOCHS * ROWS), source.batch(EPOCHS)
    assert all(place["groups"][1][0] >= 1 for place in state["lanes"].values())  # In a second epoch already.
    judged: list[int] = []
    judge = lanes.Selector.judge

    def counting(self: Any, record: Any) -> str:
        judged.append(record.number)
        return judge(self, record)

    monkeypatch.setattr(lanes.Selector, "judge", counting)
    resumed = opened(shuffle_documents=4).train
    resumed.restore(state)
    assert same(resumed.batch(EPOCHS), expected)
    read_by_resume = len(judged)
    judged.clear()
    assert same(opened(shuffle_documents=4).train.batch(EPOCHS), expected)
    assert read_by_resume < len(judged) / 4


def test_a_stop_in_a_large_batch_goes_on_from_where_the_batch_began(opened: Open) -> None:
    train = TRAIN.model_copy(update={"batch_tokens": LENGTH * 480})
    source = opened(train=train, lanes=1).train
    for index in range(3):
        source.batch(index)
    source.prepare(3)  # Of 60 chunks, after any of which a source may go away.
    assert source.state(3 * 480)["lanes"]["0"]["first"] == 3 * 480


@settings(max_examples=12)
@given(order=st.lists(st.integers(0, 12), min_size=1, max_size=6), packing=st.sampled_from(PACKINGS), data=st.data())
def test_batches_are_a_function_of_their_number(
    folder: Path,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    order: list[int],
    packing: str,
    data: st.DataObject,
) -> None:
    """In any order, by any ranks, from a state or without one."""
    with stream(folder, tokenizer, packing) as fresh, stream(folder, tokenizer, packing) as used:
        for index in order:
            ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
            rank = data.draw(st.integers(0, ranks - 1))
            mine = used.batch(index, rank, ranks)
            rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
            whole = fresh.batch(index)
            assert np.array_equal(mine.tokens, whole.tokens[rows])
            assert np.array_equal(mine.targets, whole.targets[rows])


@settings(max_examples=12)
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8), packing=st.sampled_from(PACKINGS))
def test_batches_of_growing_size_hold_the_same_samples(
    folder: Path, tokenizer: Tokenizer, cuts: list[int], packing: str
) -> None:
    with stream(folder, tokenizer, packing) as source:
        ends = np.cumsum([0, *cuts]).tolist()
        whole = by_sample(source, 0, ends[-1])
        for first, count in zip(ends, cuts, strict=False):
            for sample, row in by_sample(source, first, count).items():
                assert np.array_equal(row, whole[sample])


def by_sample(source: StreamSource, first: int, count: int) -> dict[int, np.ndarray]:
    return dict(zip(source.window_numbers(first, count).tolist(), source.samples(first, count).tokens, strict=True))


@contextmanager
def stream(folder: Path, tokenizer: Tokenizer, packing: str, lanes: int = 4) -> Iterator[StreamSource]:
    tree = {
        "mode": "streaming",
        "tokenizer": tokenizer.path,
        "sources": [
            {"path": str(folder / "other.jsonl.gz"), "weight": 1},
            {"path": str(folder / "mixed"), "weight": 2},
        ],
        "validation_fraction": 0.0,
        "cache_dir": str(folder / "cache"),
        "stream": {"lanes": lanes, "workers": 0, "shuffle_documents": 8, "packing": packing, "pack_rows": 5},
    }
    bundle = open_data(DataConfig.model_validate(tree), TRAIN, 3, tokenizer.vocab_size)
    assert isinstance(bundle.train, StreamSource)
    yield bundle.train
    bundle.train.close()


def lane_documents(source: StreamSource, tokenizer: Tokenizer, rows: int) -> list[list[str]]:
    """The documents of each lane's first `rows` rows of `split` packing, the cut last one left out."""
    found = []
    for lane in range(source.lanes):
        rows_of_lane = [source.samples(row * source.lanes + lane, 1).tokens[0] for row in range(rows)]
        tokens = np.concatenate(rows_of_lane)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))
        assert len(parts[0]) == 0
        found.append([tokenizer.decode(part[1:]) for part in parts[1:-1]])
    return found


def test_an_epoch_has_every_training_document_once(folder: Path, tokenizer: Tokenizer) -> None:
    with stream(folder, tokenizer, "split") as source:
        texts = Counter(make_texts(150, seed=2) + make_texts(300, seed=1))
        seen: Counter[str] = Counter()
        documents = lane_documents(source, tokenizer, 400)
        for lane in documents:
            seen.update(lane)
        assert set(seen) == set(texts)
        # The smaller source has a third of the tokens: every document of it comes round about as often as the others.
        few = [seen[text] for text in make_texts(150, seed=2)]
        many = [seen[text] for text in make_texts(300, seed=1)]
        assert max(few) - min(few) <= 2
        assert max(many) - min(many) <= 2
        order = [lane[:20] for lane in documents]
        assert len({text for lane in order for text in lane}) > 70  # Lanes do not repeat each other.


def test_shares_are_those_of_the_weights(opened: Open) -> None:
    source = opened(packing="best_fit").train
    tokens: Counter[str] = Counter()
    for index in range(20):
        batch = source.batch(index)
        for row, segments in enumerate(source.contents(index * ROWS, ROWS)):
            filled = int((batch.targets[row] != IGNORED).sum())
            ends = [*(segment.position for segment in segments[1:]), filled]
            for segment, end in zip(segments, ends, strict=True):
                tokens[segment.source] += end - segment.position
    shares = sorted(count / sum(tokens.values()) for count in tokens.values())
    assert shares == pytest.approx([0.25, 0.75], abs=0.02)


def test_held_out_documents_are_never_trained_on(opened: Open, tokenizer: Tokenizer) -> None:
    bundle = opened(packing="best_fit")
    held = {text for text in make_texts(300, seed=1) + make_texts(150, seed=2) if is_held_out(text_hash(text), 0.1)}
    assert bundle.validation is not None
    tokens = np.asarray(bundle.validation.split.tokens[0 : len(bundle.validation.split.tokens)])
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))
    assert {tokenizer.decode(part[1:]) for part in parts[1:-1]} == held
    seen: set[str] = set()
    for index in range(30):
        batch = bundle.train.batch(index)
        for row, starts in zip(batch.tokens, batch.starts if batch.starts is not None else (), strict=True):
            seen.update(tokenizer.decode(part[1:]) for part in np.split(row, np.flatnonzero(starts)))
    assert not seen & held
    assert len(seen) > 200
    assert merge_metrics([bundle.train.metrics()])["held_out"] > 0


def test_split_rows_are_the_text_and_starts_its_documents(opened: Open, tokenizer: Tokenizer) -> None:
    source = opened().train
    batch = source.batch(3)
    assert batch.starts is not None
    assert np.array_equal(batch.starts[:, 1:], batch.tokens[:, 1:] == tokenizer.eot_id)
    assert batch.starts[:, 0].all()
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert (batch.targets >= 0).all()
    assert (batch.tokens.dtype, batch.targets.dtype, batch.starts.dtype) == (np.int64, np.int64, np.bool_)


def test_fitted_rows_hold_whole_documents(opened: Open, tokenizer: Tokenizer) -> None:
    texts = set(make_texts(300, seed=1) + make_texts(150, seed=2))
    train = TrainConfig(context_length=256, batch_tokens=256 * 24, micro_batch_size=1, tokens=256 * 24)
    source = opened(train=train, packing="best_fit", pack_rows=12).train
    padding = 0
    for index in range(4):
        batch = source.batch(index)
        assert batch.starts is not None
        for row, targets, starts in zip(batch.tokens, batch.targets, batch.starts, strict=True):
            filled = int((targets != IGNORED).sum())
            assert (targets[:filled] != IGNORED).all()
            padding += len(row) - filled
            parts = np.split(row[:filled], np.flatnonzero(starts[:filled]))[1:]
            for part in parts:
                assert part[0] == tokenizer.eot_id
                assert tokenizer.decode(part[1:]) in texts
            ends = np.append(np.flatnonzero(starts[:filled])[1:], filled) - 1
            assert (targets[ends] == tokenizer.eot_id).all()
            inside = np.setdiff1d(np.arange(filled), ends)
            assert np.array_equal(targets[inside], row[inside + 1])
            if filled < len(row):
                assert starts[filled]
                assert not starts[filled + 1 :].any()
    assert padding / (4 * 24 * 256) < 0.12


def test_long_documents_fill_rows_of_their_own(tokenizer: Tokenizer, tmp_path: Path, opened: Open) -> None:
    text = "word after word " * 400
    (tmp_path / "long.jsonl").write_bytes(lines([text] * 3))
    tree = {"sources": [{"path": str(tmp_path / "long.jsonl")}], "validation_fraction": 0.0}
    source = opened(tree=tree, packing="best_fit", lanes=1, pack_rows=4).train
    length = len(tokenizer.encode(text)) + 1
    batch = source.samples(0, -(-length // LENGTH) + 1)
    assert ((batch.targets != IGNORED).sum(axis=1) == LENGTH).sum() >= length // LENGTH
    assert int((batch.targets != IGNORED).sum()) >= length


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_loses_nothing_and_fits(lengths: list[int]) -> None:
    rows = fit(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= 50 for row in rows)
    # Two rows that would fit into one are never both left (best fit opens a row only where none takes the item).
    sums = sorted(sum(lengths[item] for item in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 50


def test_a_file_is_opened_once_an_epoch(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block goes on where the one before ended: opening a .gz there would unpack everything before it."""
    from data_pipelines import shards

    opens: list[str] = []
    read = shards.read_records

    def noting(file: Any, *rest: Any) -> Any:
        opens.append(file.name)
        return read(file, *rest)

    monkeypatch.setattr(shards, "read_records", noting)
    source = opened(lanes=1, shuffle_documents=4, tree={"validation_fraction": 0.0}).train
    for index in range(30):
        source.batch(index)
    assert isinstance(source, StreamSource)
    epochs = max(position[0] for position in source.state(30 * ROWS)["lanes"]["0"]["groups"]) + 1
    assert max(Counter(opens).values()) <= epochs


def test_shuffling_is_by_blocks_epochs_and_seeds(opened: Open, tokenizer: Tokenizer) -> None:
    def firsts(seed: int, **stream: Any) -> list[str]:
        source = opened(seed=seed, weights=False, **stream).train
        return [segments[-1].document for segments in source.contents(0, 48)]

    assert firsts(3) == firsts(3)
    assert firsts(3) != firsts(4)
    assert firsts(3, shuffle_documents=1) != firsts(3)
    assert firsts(3, lanes=1, shuffle_documents=1) != firsts(3, shuffle_documents=1)


def test_too_many_lanes_for_the_text_are_refused(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_bytes(lines(make_texts(1)))
    tree: Any = {"sources": [{"path": str(tmp_path / "few.jsonl")}], "validation_fraction": 0.0}
    with pytest.raises(UserError, match=r"lane \d of data\.stream\.lanes=6 has no training document .*set fewer lanes"):
        opened(tree=tree).train.batch(0)
    assert opened(tree=tree, lanes=1).train.batch(0).tokens.shape == (ROWS, LENGTH)
    tree["sources"][0]["min_characters"] = 10_000
    with pytest.raises(UserError, match=r"has no training document \(3 too_short\): .* look at what is filtered out"):
        opened(tree=tree, lanes=1).train.batch(0)


def test_builtin_text_streams(opened: Open) -> None:
    tree = {"sources": [{"builtin": "python-docs"}], "validation_fraction": 0.01}
    bundle = opened(tree=tree, lanes=2, validation_tokens=2000)
    assert bundle.validation is not None
    batch = bundle.train.batch(0)
    resumed = opened(tree=tree, lanes=2, validation_tokens=2000).train
    resumed.restore(bundle.train.state(0))
    assert same(resumed.batch(0), batch)


def test_the_identity_names_what_changed(opened: Open, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines(make_texts(30, seed=number)))
    tree = {"sources": [{"path": str(tmp_path)}], "validation_fraction": 0.0}
    before = opened(tree=tree).identity
    assert opened(tree=tree, workers=0).identity == before
    with (tmp_path / "part-1.jsonl").open("ab") as out:
        out.write(lines(["one more"]))
    after = opened(tree=tree).identity
    files = next(iter(before["files"].values())), next(iter(after["files"].values()))
    assert {name for name in files[0] if files[0][name] != files[1][name]} == {f"{tmp_path}/part-1.jsonl"}
    assert opened(tree=tree, lanes=3).identity != after
    assert len(json.dumps(after)) < 2000


def test_files_that_come_after_a_run_has_begun_change_nothing(opened: Open, tmp_path: Path) -> None:
    """Workers read what the run has looked up, not what is there when they begin."""
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines(make_texts(30, seed=number)))
    tree = {"sources": [{"path": str(tmp_path)}], "validation_fraction": 0.0}
    expected = opened(tree=tree).train.batch(0)
    source = opened(tree=tree).train
    (tmp_path / "part-0b.jsonl").write_bytes(lines(make_texts(30, seed=9)))
    assert same(source.batch(0), expected)
    assert not same(opened(tree=tree).train.batch(0), expected)


def test_the_order_is_the_same_everywhere(opened: Open) -> None:
    """A change of this would give every run under way other samples."""
    names = [segments[0].document.rpartition("/")[2] for segments in opened().train.contents(0, 8)]
    assert names == EXPECTED


EXPECTED = [
    "d.parquet:19",
    "d.parquet:19",
    "f.arrow:15",
    "f.arrow:15",
    "g8.txt",
    "b.jsonl.gz:5",
    "c.jsonl.zst:16",
    "a.jsonl:15",
]
