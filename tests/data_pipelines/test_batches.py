"""Global batch i: the same for every number of ranks, nothing lost, nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batches import WindowSource, open_data
from data_pipelines.pack import CorpusSplit
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.batches import BatchSizes
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError

EOT = 1


def make_source(
    tokens: int, length: int = 7, rows: int = 12, seed: int = 3, reset: bool = False, every: int = 10
) -> WindowSource:
    """A split whose token at place p is p + 2, but end-of-text at each multiple of `every`."""
    values = np.arange(tokens, dtype=np.uint32) + 2
    values[::every] = EOT
    split = CorpusSplit("train", values, np.arange(0, tokens, every), tokens // every, tokens, Path("none"))
    return WindowSource(split, length, BatchSizes.constant(rows), seed, reset, EOT)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_batch_of_one_rank(ranks: int) -> None:
    source = make_source(1000, reset=True)
    for index in (0, 1, 17, 10_000):
        whole = source.batch(index)
        parts = [source.batch(index, rank, ranks) for rank in range(ranks)]
        assert all(part.tokens.shape == (12 // ranks, 7) for part in parts)
        for name in ("tokens", "targets", "starts"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_types_and_shapes() -> None:
    batch = make_source(1000, reset=True).batch(0)
    assert (batch.tokens.dtype, batch.targets.dtype) == (np.int64, np.int64)
    assert batch.starts is not None
    assert batch.starts.dtype == np.bool_
    assert batch.tokens.shape == batch.targets.shape == batch.starts.shape == (12, 7)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in (batch.tokens, batch.targets))
    assert make_source(1000).batch(0).starts is None


def test_targets_are_the_next_tokens_of_the_text() -> None:
    source = make_source(1000, every=10**6)
    batch = source.batch(4)
    assert np.array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert np.array_equal(batch.targets, np.where(batch.tokens == EOT, 3, batch.tokens + 1))
    windows = source.window_numbers(4 * 12, 12)
    assert np.array_equal(batch.tokens[windows > 0][:, 0], windows[windows > 0] * 7 + 2)


@given(
    tokens=st.integers(30, 400),
    length=st.integers(2, 9),
    rows=st.integers(1, 8),
    seed=st.integers(0, 99),
    epochs=st.integers(1, 3),
)
def test_an_epoch_has_every_window_once(tokens: int, length: int, rows: int, seed: int, epochs: int) -> None:
    source = make_source(tokens, length, rows, seed)
    assert source.windows == (tokens - 1) // length
    samples = epochs * source.windows
    seen = np.concatenate([source.batch(index).targets for index in range(-(-samples // rows))])[:samples]
    numbers = source.window_numbers(0, samples).reshape(epochs, source.windows)
    assert all(sorted(epoch.tolist()) == list(range(source.windows)) for epoch in numbers)
    # As targets: each token but the first, up to the last whole window, once in an epoch.
    expected = Counter(source.split.tokens[1 : source.windows * length + 1].tolist() * epochs)
    assert Counter(seen.ravel().tolist()) == expected


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    source, other = make_source(1000, seed=3), make_source(1000, seed=4)
    first, second = source.window_numbers(0, 142), source.window_numbers(142, 142)
    assert source.windows == 142
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other.window_numbers(0, 142))
    assert not np.array_equal(first, np.sort(first))


def test_a_batch_may_hold_the_end_of_one_epoch_and_more_than_another() -> None:
    source = make_source(40, rows=30)  # 5 windows.
    counts = Counter(source.batch(0).targets[:, 0].tolist())
    assert set(counts.values()) == {6}
    assert len(counts) == 5


def test_a_batch_depends_on_its_number_alone() -> None:
    source = make_source(1000)
    later = source.batch(50).tokens
    for index in range(5):
        source.batch(index)
    assert np.array_equal(source.batch(50).tokens, later)
    assert np.array_equal(make_source(1000).batch(50).tokens, later)


def test_starts_are_at_end_of_text_and_at_the_row() -> None:
    source = make_source(1000, length=25, reset=True)
    batch = source.batch(2)
    assert batch.starts is not None
    assert batch.starts[:, 0].all()
    assert np.array_equal(batch.starts[:, 1:], batch.tokens[:, 1:] == EOT)
    assert (batch.starts.sum(axis=1) >= 2).all()
    assert (batch.targets >= 0).all()  # All scored, the first token of a document too.


def test_ranks_that_do_not_divide_and_small_corpora_are_refused() -> None:
    source = make_source(1000)
    with pytest.raises(UserError, match=r"12 sequences cannot be divided among 5 ranks: make train\.batch_tokens"):
        source.batch(0, 0, 5)
    for index, rank, ranks in ((-1, 0, 1), (0, 2, 2), (0, -1, 2)):
        with pytest.raises(ValueError):
            source.batch(index, rank, ranks)
    assert make_source(8).windows == 1
    with pytest.raises(UserError, match=r"the train part of the corpus has 7 tokens, fewer than one window"):
        make_source(7)


def test_batches_end_where_their_samples_have_no_number() -> None:
    last = (2**63 - 1) // 6 - 1
    source = make_source(100, rows=6)
    assert len(source.batch(last).tokens) == 6
    with pytest.raises(UserError, match="is too far"):
        source.batch(last + 1)


def test_validation_takes_the_text_in_order_and_all_of_it() -> None:
    source = make_source(200, rows=4, reset=True)
    batches = list(source.validation_batches(rows=5))
    assert [len(batch.tokens) for batch in batches] == [5, 5, 5, 5, 5, 3]
    targets = np.concatenate([batch.targets for batch in batches]).ravel()
    assert np.array_equal(targets, source.split.tokens[1 : 28 * 7 + 1])
    assert all(batch.starts is not None for batch in batches)


def test_limited_validation_is_spread_and_the_same_each_time() -> None:
    source = make_source(7001)  # 1000 windows.
    first, second = ([b.tokens for b in source.validation_batches(4, limit=5)] for _ in range(2))
    assert all(map(np.array_equal, first, second))
    windows = (np.concatenate(first)[:, 1] - 3) // 7
    assert windows.tolist() == list(range(0, 1000, 50))
    assert list(source.validation_batches(4, limit=0)) == []
    assert sum(len(batch.tokens) for batch in source.validation_batches(300, limit=9)) == 1000


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_validation(ranks: int) -> None:
    source = make_source(200)
    whole = list(source.validation_batches(5, limit=4))
    shares = [list(source.validation_batches(5, limit=4, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert all(len(share) == len(whole) for share in shares)
    for index, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([share[index].tokens for share in shares]), batch.tokens)


TRAIN = TrainConfig(context_length=16, batch_tokens=64, micro_batch_size=2, tokens=6400)


def test_open_data_from_text_to_batches(
    texts: list[str], make_config: Callable[..., DataConfig], tokenizer: Tokenizer
) -> None:
    data = make_config(texts, reset_at_documents=True)
    bundle = open_data(data, TRAIN, 5, 400)
    again = open_data(data, TRAIN, 5, 400)
    assert bundle.validation is not None
    batch = bundle.train.batch(3)
    assert batch.tokens.shape == (4, 16)
    assert np.array_equal(batch.tokens, again.train.batch(3).tokens)
    assert not np.array_equal(batch.tokens, open_data(data, TRAIN, 6, 400).train.batch(3).tokens)
    assert batch.starts is not None
    row = bundle.tokenizer.decode(batch.tokens[0]).replace("\ufffd", "")
    assert any(part and part in text for text in texts for part in [row[:8]])
    assert bundle.description == again.description
    assert bundle.description["train"]["windows"] == bundle.train.windows
    assert bundle.description["epochs"] == pytest.approx(400 / bundle.train.windows)
    assert bundle.description["tokenizer"]["fingerprint"] == tokenizer.fingerprint


def test_open_data_without_validation(texts: list[str], make_config: Callable[..., DataConfig]) -> None:
    assert open_data(make_config(texts, validation_fraction=0.0), TRAIN, 0, 400).validation is None
    short = open_data(
        make_config(texts[:20], validation_fraction=0.01),
        TrainConfig(context_length=512, batch_tokens=512, micro_batch_size=1),
        0,
        400,
    )
    assert short.validation is None
    assert short.description["validation"]["windows"] == 0


def test_open_data_refuses_what_does_not_fit(
    texts: list[str], make_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    data = make_config(texts)
    with pytest.raises(UserError, match=r"has 400 pieces, model\.vocab_size is 32000: set model\.vocab_size=400"):
        open_data(data, TRAIN, 0, 32000)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"data\.tokenizer is not set"):
        open_data(make_config(texts, tokenizer=None), TRAIN, 0, 400)
    with pytest.raises(UserError, match="no tokenizer file"):
        open_data(make_config(texts, tokenizer="nowhere.model"), TRAIN, 0, 400)
    with pytest.raises(UserError, match=r"the train part of the corpus has .* fewer than one window"):
        open_data(make_config(["tiny"]), TRAIN, 0, 400)
