"""Training: the same model each time, nothing lost on the way in, clear limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import tokenizer_training as module
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import model_path, train_tokenizer, training_lines
from hope_train.errors import UserError


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_gives_the_size_asked_for(texts: list[str], tmp_path: Path, kind: str) -> None:
    first, second = (train_tokenizer(iter(texts), tmp_path / name, 333, kind) for name in ("a", "b.model"))
    assert first.proto == second.proto == (tmp_path / "b.model").read_bytes() == (tmp_path / "a.model").read_bytes()
    assert first.vocab_size == 333
    assert first.path == str(tmp_path / "a.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_digits_stand_alone_unless_told_otherwise(tmp_path: Path) -> None:
    texts = [f"in the year 1984 and {n}\n" for n in range(300)]
    split = train_tokenizer(texts, tmp_path / "a", 290)
    joined = train_tokenizer(texts, tmp_path / "b", 290, split_digits=False)
    assert [split.decode([token]) for token in split.encode("1984")] == ["1", "9", "8", "4"]
    assert len(joined.encode("1984")) < 4


def test_line_ends_and_indents_become_pieces(tmp_path: Path) -> None:
    code = ["".join(f"def f{n}(x):\n    if x:\n        return {n}\n\n" for n in range(200))]
    tokenizer = train_tokenizer(code, tmp_path / "a", 310)
    pieces = {tokenizer.decode([token]) for token in tokenizer.encode(code[0])}
    assert {"    ", ":\n"} <= pieces


def test_the_text_end_of_text_in_a_corpus_does_no_harm(texts: list[str], tmp_path: Path) -> None:
    trouble = "<|endoftext|> <unk> <0x41> a\u2581b\0c\u2585d "
    tokenizer = train_tokenizer([text + trouble * 9 for text in texts], tmp_path / "a", 320)
    text = "<|endoftext|> <unk> <0x41>\u2581\0\u2585"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eot_id not in tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["数字", "a", "b\nc", "ab" * 50])
def test_a_corpus_without_a_space_still_gives_a_lossless_model(tmp_path: Path, text: str, kind: str) -> None:
    characters = len(set(text))
    size = 258 + characters + 1
    tokenizer = train_tokenizer([text, "x" + text], tmp_path / "a", size + 1, kind)
    assert tokenizer.decode(tokenizer.encode(" two  words ")) == " two  words "


@given(
    documents=st.lists(
        st.lists(st.sampled_from(["abc ", "\n", "x" * 1100, "数" * 600, "\u2581", "\0", "   "])).map("".join),
        max_size=4,
    )
)
def test_lines_are_short_enough_and_hold_all_of_the_text(documents: list[str]) -> None:
    lines = list(training_lines(documents))
    assert all(0 < len(line.encode()) <= 4192 for line in lines)
    assert "".join(lines) == "".join(documents).replace("\u2581", "").replace("\0", "")


def test_a_limit_samples_the_whole_stream_by_seed(texts: list[str]) -> None:
    lines = list(training_lines(texts))
    size = sum(len(line.encode()) for line in lines)
    one, again, other = (module._sample(iter(lines), size // 5, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert size // 8 < sum(len(line.encode()) for line in one) <= size // 5
    places = [lines.index(line) for line in one]
    assert places == sorted(places)
    assert places[0] < len(lines) // 4
    assert places[-1] > 3 * len(lines) // 4
    assert module._sample(iter(lines), 10 * size, 0) == lines


def test_a_limited_model_depends_on_the_seed_alone(texts: list[str], tmp_path: Path) -> None:
    def train(seed: int) -> bytes:
        return train_tokenizer(texts, tmp_path / "a", 320, max_bytes=20_000, seed=seed).proto

    assert train(1) == train(1) != train(2)


def test_sizes_that_do_not_fit_are_named_with_the_limit(tmp_path: Path) -> None:
    for kind in ("bpe", "unigram"):
        with pytest.raises(UserError, match=r"vocab_size=1000 is too large .* at most \d+") as error:
            train_tokenizer(["hello world, hello words"], tmp_path / "a", 1000, kind)
        limit = int(str(error.value).split("at most ")[1].split(",")[0])
        assert train_tokenizer(["hello world, hello words"], tmp_path / "a", limit, kind).vocab_size == limit
        with pytest.raises(UserError, match=r"vocab_size=260 is too small .* at least \d+") as error:
            train_tokenizer(["hello world"], tmp_path / "a", 260, kind)
        least = int(str(error.value).split("at least ")[1])
        assert train_tokenizer(["hello world"] * 9, tmp_path / "a", least, kind).vocab_size == least
    with pytest.raises(UserError, match="vocab_size=258 is too small: 256 bytes"):
        train_tokenizer(["hello"], tmp_path / "a", 258)


@pytest.mark.parametrize("texts", [[], [""], ["\0\u2581"]])
@pytest.mark.parametrize("max_bytes", [None, 100])
def test_no_text_is_named(tmp_path: Path, texts: list[str], max_bytes: int | None) -> None:
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(texts, tmp_path / "a", 300, max_bytes=max_bytes)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind 'word' is neither bpe nor unigram"):
        train_tokenizer(["a"], tmp_path / "a", 300, "word")
    with pytest.raises(UserError, match="max_bytes=0"):
        train_tokenizer(["a"], tmp_path / "a", 300, max_bytes=0)


@pytest.mark.parametrize("error", [UserError("line 7 is broken"), KeyboardInterrupt()], ids=["broken", "stopped"])
def test_an_error_of_the_source_comes_through_and_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.model").write_bytes(b"old")

    def source() -> Iterator[str]:
        yield "some text that is fine " * 200
        raise error

    with pytest.raises(type(error)) as caught:
        train_tokenizer(source(), tmp_path / "a", 280)
    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == ["a.model"]
    assert (tmp_path / "a.model").read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        train_tokenizer(texts, tmp_path / "file" / "a", 320)


def test_the_models_path() -> None:
    assert model_path("a/b") == Path("a/b.model")
    assert model_path("a/b.model") == Path("a/b.model")
    assert model_path("a/v1.2") == Path("a/v1.2.model")


def test_the_trained_file_loads(tokenizer: Tokenizer) -> None:
    assert Tokenizer(tokenizer.path).fingerprint == tokenizer.fingerprint


def test_user_symbols_are_one_piece(texts: list[str], tmp_path: Path) -> None:
    tokenizer = train_tokenizer(texts, tmp_path / "t", 400, user_symbols=["<think>", "::"])
    plain = train_tokenizer(texts, tmp_path / "plain", 400)
    for text in ("a <think> b", "x::y", "<think>::<think>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) < len(plain.encode(text))
    assert len(tokenizer.encode("<think>")) == 1
    for symbol in ("", "two words", "<|endoftext|>", "a\u2581b"):
        with pytest.raises(UserError, match="a symbol has no white space"):
            train_tokenizer(texts, tmp_path / "bad", 400, user_symbols=[symbol])
