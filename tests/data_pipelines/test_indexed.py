"""Training from indexed tokens: every window once an epoch, any ranks, blended by weight, Megatron's corpora as is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batches import DataBundle, open_data
from data_pipelines.indexed import TokenParts
from data_pipelines.looking import look_at
from data_pipelines.megatron import IndexedWriter
from data_pipelines.pack import CorpusSplit
from data_pipelines.tokenising import tokenise
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.windows import BlendSource, WindowSource, blend_table
from hope_train.config.batches import BatchSizes
from hope_train.config.data import DataConfig
from hope_train.config.train import TrainConfig
from hope_train.errors import UserError

EOT = 1
TRAIN = TrainConfig(context_length=16, batch_tokens=16 * 24, micro_batch_size=1, tokens=16 * 24 * 100)


def write_foreign(prefix: Path, tokenizer: Tokenizer, texts: list[str], eod: bool = True) -> str:
    """As Megatron's tools/preprocess_data.py does, with and without --append-eod."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = IndexedWriter(prefix, np.dtype("uint16"))
    for text in texts:
        writer.add(tokenizer.encode(text) + [tokenizer.eot_id] * eod)
    writer.close()
    return str(prefix)


def open_indexed(
    tokenizer: Tokenizer, *sources: dict[str, object], train: TrainConfig = TRAIN, **data: object
) -> DataBundle:
    tree = {
        "mode": "indexed",
        "tokenizer": tokenizer.path,
        "sources": list(sources),
        "validation_fraction": 0.0,
        **data,
    }
    return open_data(DataConfig.model_validate(tree), train, 3, tokenizer.vocab_size)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_parts_are_one_sequence(sizes: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    parts = TokenParts(np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(parts) == len(whole)
    if len(whole):
        first = data.draw(st.integers(0, len(whole) - 1))
        last = data.draw(st.integers(first + 1, len(whole) + 3))
        assert np.array_equal(parts[first:last], whole[first:last])


@given(weights=st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=6))
def test_a_blend_keeps_its_weights_everywhere(weights: list[float]) -> None:
    table, rank = blend_table(weights)
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        chosen = table == number
        assert abs(chosen.sum() - share * len(table)) <= 1
        assert np.array_equal(np.sort(rank[chosen]), np.arange(chosen.sum()))
        # Nowhere is a source far ahead of or behind its share.
        drift = np.cumsum(chosen) - share * np.arange(1, len(table) + 1)
        assert np.abs(drift).max() <= len(weights) + 1


def counting_split(first: int, tokens: int) -> CorpusSplit:
    values = np.arange(first, first + tokens, dtype=np.uint32)
    return CorpusSplit("train", values, np.array([0, tokens]), 1, tokens, Path("none"))


def blend(rows: int = 24, weights: tuple[float, ...] = (0.2, 0.5, 0.3)) -> BlendSource:
    splits = [counting_split(10_000 * (n + 1), 7 * 50 * (n + 1) + 1) for n in range(len(weights))]
    parts = [
        WindowSource(split, 7, BatchSizes.constant(rows), 5, True, EOT, f"source-{n}") for n, split in enumerate(splits)
    ]
    return BlendSource(parts, weights, BatchSizes.constant(rows))


BLEND = blend()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_any_number_of_ranks_shares_the_same_batches(ranks: int) -> None:
    source = blend()
    for index in (0, 1, 7, 100, 5000):
        whole = source.batch(index)
        parts = [source.batch(index, rank, ranks) for rank in range(ranks)]
        for name in ("tokens", "targets", "starts"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_batches_of_growing_size_cut_the_same_sequence(cuts: list[int]) -> None:
    source = BLEND
    whole = source.samples(0, sum(cuts)).tokens
    places = np.cumsum([0, *cuts])[:-1].tolist()
    parts = [source.samples(first, count).tokens for first, count in zip(places, cuts, strict=True)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_each_source_of_a_blend_has_epochs_of_its_own() -> None:
    source = blend()
    numbers = source.window_numbers(0, 1000)
    assert Counter(np.digitize(numbers, [50, 150]).tolist()) == {0: 200, 1: 500, 2: 300}
    first = numbers[numbers < 50]
    for epoch in range(4):
        assert sorted(first[50 * epoch : 50 * (epoch + 1)].tolist()) == list(range(50))
    assert not np.array_equal(first[:50], first[50:100])
    tokens = source.samples(0, 1000).tokens
    window = np.where(
        numbers < 50,
        numbers * 7 + 10_000,
        np.where(numbers < 150, (numbers - 50) * 7 + 20_000, (numbers - 150) * 7 + 30_000),
    )
    assert np.array_equal(tokens[:, 0], window)


def test_the_order_is_the_same_everywhere() -> None:
    """A change of these numbers would give every run under way other samples."""
    assert blend().window_numbers(0, 12).tolist() == EXPECTED


EXPECTED = [146, 233, 9, 63, 193, 123, 148, 47, 267, 52, 68, 264]


def test_a_token_set_trains(
    texts: list[str], make_config: Callable[..., DataConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenise(make_config(texts), tokenizer, tmp_path / "set", 1)
    bundle = open_indexed(tokenizer, {"indexed": str(tmp_path / "set")}, reset_at_documents=True)
    assert isinstance(bundle.train, WindowSource)
    assert bundle.validation is not None
    whole = np.asarray(bundle.train.split.tokens[0 : len(bundle.train.split.tokens)])
    held = np.asarray(bundle.validation.split.tokens[0 : len(bundle.validation.split.tokens)])
    seen = sorted(part for side in (whole, held) for part in tokenizer_split(side, tokenizer))
    assert seen == sorted(texts)
    epoch = bundle.train.samples(0, bundle.train.windows)
    assert sorted(epoch.targets.ravel().tolist()) == sorted(whole[1 : bundle.train.windows * 16 + 1].tolist())
    batch = bundle.train.batch(2)
    assert batch.starts is not None
    assert np.array_equal(batch.starts[:, 1:], batch.tokens[:, 1:] == tokenizer.eot_id)
    assert bundle.description["train"]["documents"] + bundle.description["validation"]["documents"] == 500


def tokenizer_split(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    ends = np.flatnonzero(tokens == tokenizer.eot_id) + 1
    return [tokenizer.decode(part) for part in np.split(tokens, ends)[:-1]]


def test_how_a_set_was_divided_into_shards_does_not_show(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one = open_indexed(tokenizer, {"indexed": write_foreign(tmp_path / "one" / "all", tokenizer, texts)})
    for number in range(5):
        write_foreign(tmp_path / "five" / f"part-{number * 3}", tokenizer, texts[number * 100 : (number + 1) * 100])
    five = open_indexed(tokenizer, {"indexed": str(tmp_path / "five")})
    for index in (0, 3, 50):
        assert np.array_equal(one.train.batch(index).tokens, five.train.batch(index).tokens)


@pytest.mark.parametrize("eod", [True, False])
def test_a_corpus_of_megatrons_trains_unchanged(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path, eod: bool
) -> None:
    prefix = write_foreign(tmp_path / "corpus" / "wiki_text_document", tokenizer, texts, eod)
    before = {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    bundle = open_indexed(tokenizer, {"indexed": prefix}, validation_fraction=0.1, reset_at_documents=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == before
    assert isinstance(bundle.train, WindowSource)
    assert bundle.validation is not None
    sizes = [len(tokenizer.encode(text)) + eod for text in texts]
    held = bundle.description["validation"]
    train = bundle.description["train"]
    assert train["documents"] + held["documents"] == 500
    assert held["tokens"] == sum(sizes[train["documents"] :])
    assert 0.1 <= held["tokens"] / sum(sizes) < 0.11
    firsts = np.cumsum([0, *sizes])[:-1] - eod  # The end-of-text before a document opens it.
    windows = bundle.train.window_numbers(0, 24)
    starts = bundle.train.batch(0).starts
    assert starts is not None
    for window, row in zip(windows.tolist(), starts, strict=True):
        inside = firsts[(firsts >= window * 16) & (firsts < window * 16 + 16)] - window * 16
        assert np.flatnonzero(row).tolist() == sorted({0, *inside.tolist()})
    contents = bundle.train.contents(0, 24)
    for window, segments in zip(windows.tolist(), contents, strict=True):
        positions = [segment.position for segment in segments]
        numbers = [int(segment.document.rpartition(":")[2]) for segment in segments]
        low, high = np.searchsorted(firsts, [window * 16, window * 16 + 15], side="right")
        assert numbers == list(range(max(int(low), 1), int(high) + 1))
        assert positions == [max(int(firsts[n - 1]) - window * 16, 0) for n in numbers]


def test_documents_of_several_sequences_are_read_as_if_they_had_one(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As --split-sentences writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    prefix = str(tmp_path / "sentences")
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=np.uint16)
    for number, text in enumerate(texts):
        ids = [*tokenizer.encode(text), tokenizer.eot_id]
        cut = [len(ids)] if number % 3 == 0 else [len(ids) // 2, len(ids) - len(ids) // 2]
        builder.add_document(np.asarray(ids, np.uint16), cut)
    builder.finalize(get_idx_path(prefix))
    options = {"validation_fraction": 0.1, "reset_at_documents": True}
    found = open_indexed(tokenizer, {"indexed": prefix}, **options)
    plain = open_indexed(tokenizer, {"indexed": write_foreign(tmp_path / "whole", tokenizer, texts)}, **options)
    for part in ("train", "validation"):
        for key in ("documents", "tokens"):
            assert found.description[part][key] == plain.description[part][key]
    for index in range(10):
        mine, theirs = found.train.batch(index), plain.train.batch(index)
        assert np.array_equal(mine.tokens, theirs.tokens)
        assert mine.starts is not None
        assert np.array_equal(mine.starts, theirs.starts)


def test_several_sources_with_and_without_weights(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = [write_foreign(tmp_path / str(n), tokenizer, texts[n * 250 : (n + 1) * 250], n == 0) for n in range(2)]
    joined = open_indexed(tokenizer, *({"indexed": name} for name in names), reset_at_documents=True)
    assert isinstance(joined.train, WindowSource)
    assert joined.train.windows == (sum(len(tokenizer.encode(t)) for t in texts) + 250 - 1) // 16
    mixed = open_indexed(tokenizer, *({"indexed": n, "weight": w} for n, w in zip(names, (3, 1), strict=True)))
    assert isinstance(mixed.train, BlendSource)
    figures = look_at(mixed, 0, 2, with_ids=False)
    assert figures["sources"] == {names[0]: pytest.approx(0.75), names[1]: pytest.approx(0.25)}
    assert figures["padding_share"] == 0.0
    other = open_indexed(tokenizer, *({"indexed": n, "weight": w} for n, w in zip(names, (1, 1), strict=True)))
    assert mixed.identity != other.identity
    assert joined.identity != mixed.identity


def test_another_tokenizer_is_refused(
    texts: list[str],
    make_config: Callable[..., DataConfig],
    tokenizer: Tokenizer,
    unigram_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    tokenise(make_config(texts), tokenizer, tmp_path / "set", 1)
    with pytest.raises(
        UserError, match=r"was made with tokenizer [0-9a-f]{12}, .* is [0-9a-f]{12}: set data\.tokenizer"
    ):
        open_indexed(unigram_tokenizer, {"indexed": str(tmp_path / "set")})
    prefix = write_foreign(tmp_path / "large", tokenizer, texts)
    with pytest.raises(UserError, match=r"holds token 39\d, and tokenizer .* has 350 pieces"):
        open_indexed(unigram_tokenizer, {"indexed": prefix})


def test_what_is_not_whole_is_refused(
    texts: list[str], make_config: Callable[..., DataConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    tokenise(make_config(texts), tokenizer, out, 1)
    kept = (out / "train-00003.bin").read_bytes()
    (out / "train-00003.bin").write_bytes(kept[:-2])
    with pytest.raises(UserError, match=r"train-00003\.bin has \d+ bytes instead of \d+: restore it"):
        open_indexed(tokenizer, {"indexed": str(out)})
    prefix = Path(write_foreign(tmp_path / "foreign", tokenizer, texts))
    raw = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(raw[:-20])
    with pytest.raises(UserError, match="it was cut short or belongs to another index"):
        open_indexed(tokenizer, {"indexed": str(prefix)})
    Path(f"{prefix}.bin").write_bytes(raw)
    Path(f"{prefix}.idx").write_bytes(b"nonsense" * 10)
    with pytest.raises(UserError, match="not an index of Megatron's"):
        open_indexed(tokenizer, {"indexed": str(prefix)})
    with pytest.raises(UserError, match=r"nowhere\.bin: no such file"):
        open_indexed(tokenizer, {"indexed": str(tmp_path / "nowhere")})


def test_a_changed_corpus_has_another_content(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = {"indexed": write_foreign(tmp_path / "a", tokenizer, texts)}
    before = open_indexed(tokenizer, source).description["corpus"]["content"]
    assert open_indexed(tokenizer, source).description["corpus"]["content"] == before
    write_foreign(tmp_path / "a", tokenizer, [*texts[:-1], texts[-1] + "!"])
    assert open_indexed(tokenizer, source).description["corpus"]["content"] != before


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"sources": [{"indexed": "a"}]}, "data.mode=indexed"),
        ({"mode": "indexed", "sources": [{"path": "a"}]}, "has text, which does not go with data.mode=indexed"),
        ({"mode": "indexed", "sources": [{"indexed": "a", "weight": 1}, {"indexed": "b"}]}, "give all of them one"),
        ({"sources": [{"path": "a", "weight": 1}]}, "weights need data.mode"),
        ({"mode": "indexed", "sources": [{"indexed": "a", "min_characters": 3}]}, "tokenised already"),
        ({"sources": [{"path": "a", "split": "test"}]}, "split=test goes with hub: .* name the files of that split"),
        ({"sources": [{"path": "a", "min_characters": 3, "max_characters": 2}]}, "max_characters is below"),
    ],
)
def test_configurations_that_make_no_sense(tree: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig.model_validate(tree)
