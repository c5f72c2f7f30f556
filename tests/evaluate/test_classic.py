"""The closed-vocabulary protocol: refused for subword models, defined for a tokenizer of whole words."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import pytest
import sentencepiece
import torch

from data_pipelines.tokenizer import Tokenizer
from hope_train.errors import UserError
from hope_train.evaluate import classic
from hope_train.evaluate.classic import closed_vocabulary_tokens, read_classic
from hope_train.evaluate.loop import Evaluator
from hope_train.evaluate.wikitext import KNOWN
from tests.evaluate.tiny import run_config, scorer, tiny_model

TEXT = " \n = Valkyria <unk> = \n \n The game the game . \n <unk> The end \n"


@pytest.fixture(scope="module")
def word_tokenizer() -> Tokenizer:
    """Lossless; each word of TEXT with the space before it is one piece, and so is the line end."""
    words = sorted({f"\u2581{word}" for word in TEXT.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc def ghi"] * 10),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        required_chars="\u2581",
        user_defined_symbols=words,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        eos_piece="<|endoftext|>",
        minloglevel=3,
    )
    return Tokenizer.from_proto(model.getvalue())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The protocol is defined on two files alone; here TEXT takes the place of one of them."""
    (tmp_path / "valid.txt").write_text(TEXT, encoding="utf-8")
    count = len(TEXT.split()) + TEXT.count("\n")
    monkeypatch.setitem(KNOWN, "validation", dataclasses.replace(KNOWN["validation"], classic_words=count))
    return tmp_path


def test_each_word_and_line_end_is_one_token(folder: Path, word_tokenizer: Tokenizer) -> None:
    text = read_classic(str(folder), "validation", word_tokenizer)
    assert len(text.tokens) == len(TEXT.split()) + TEXT.count("\n")
    assert text.tokens.count(text.eos) == 5
    assert word_tokenizer.decode(text.tokens) == "".join(
        "".join(f" {word}" for word in line.split()) + "\n" for line in TEXT.splitlines()
    )


@torch.no_grad()
def test_the_figure_is_per_word_and_line_end(folder: Path, word_tokenizer: Tokenizer) -> None:
    config = run_config(
        "transformer_pp",
        word_tokenizer.vocab_size,
        eval={"wikitext": str(folder), "protocols": ["classic"], "test_at_end": False},
    )
    evaluator = Evaluator(config, word_tokenizer, "cpu")
    assert evaluator.sources() == f"evaluation on {folder / 'valid.txt'}, protocol: classic"
    model = tiny_model("transformer_pp", word_tokenizer.vocab_size)
    (row,) = evaluator.evaluate(model, "validation", 3, 192)
    text = read_classic(str(folder), "validation", word_tokenizer)
    stream = torch.tensor([[text.eos, *text.tokens]])
    log_p = model(stream[:, :-1])[0].log_softmax(-1)
    nll = -log_p.gather(1, stream[0, 1:, None]).sum().item()
    assert row["classic_ppl"] == pytest.approx(math.exp(nll / len(text.tokens)), rel=1e-11)
    assert row["denominators"] == {"words_and_lines": len(text.tokens)}
    assert row["protocol"] == "classic"
    assert not {"word_ppl", "token_ppl"} & row.keys()
    assert sum(scorer(model, 1).windows(text.windows(4))) > 0


def test_a_subword_tokenizer_is_told_why(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"does not apply to a subword model: .* use protocol word"):
        read_classic(str(folder), "validation", tokenizer)


def test_words_that_share_a_token_are_no_closed_vocabulary(word_tokenizer: Tokenizer) -> None:
    class Unknowing:
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[0] for _ in texts]

    with pytest.raises(UserError, match="gives different words the same token"):
        closed_vocabulary_tokens(["a b"], Unknowing())  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path, word_tokenizer: Tokenizer) -> None:
    for place in (None, "hub", str(tmp_path)):
        with pytest.raises(UserError, match=r"needs WikiText-2's <unk> text, wiki.test.tokens or test.txt"):
            read_classic(place, "test", word_tokenizer)


def test_another_number_of_words_is_refused(folder: Path, word_tokenizer: Tokenizer) -> None:
    (folder / "valid.txt").write_text(TEXT + " more \n", encoding="utf-8")
    with pytest.raises(UserError, match=r"19 words and line ends; protocol classic is defined on .* which has 17"):
        read_classic(str(folder), "validation", word_tokenizer)


def test_the_raw_text_has_the_right_count_and_is_still_refused(folder: Path, word_tokenizer: Tokenizer) -> None:
    (folder / "valid.txt").write_text(TEXT.replace("<unk>", "Chronicles"), encoding="utf-8")
    with pytest.raises(UserError, match="with <unk>"):
        read_classic(str(folder), "validation", word_tokenizer)


def test_the_denominators_are_the_published_ones() -> None:
    assert (KNOWN["validation"].classic_words, KNOWN["test"].classic_words) == (217_646, 245_569)
    assert classic.KNOWN is KNOWN
