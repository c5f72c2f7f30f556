"""Nothing is lost: decode(encode(text)) == text."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import tokenizer as module
from data_pipelines.builtin import python_docs
from data_pipelines.tokenizer import Tokenizer
from hope_train.errors import UserError
from tests.data_pipelines.conftest import make_texts

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# What tokenizers trip over, in any order and often.
TROUBLE = st.lists(
    st.sampled_from(
        [
            *(
                " ",
                "  ",
                "\t",
                "\n",
                "\r\n",
                "\u2581",
                "\0",
                "\u2585",
                "\u2047",
                "\u00a0",
                "\u3000",
                "\ufeff",
                "\u200d",
            ),
            *("<unk>", "<0xE2>", "<|endoftext|>", "</s>", "river", "def", "0", "12", "é", "e\u0301", "ﬁ", "数", "🏳️‍🌈"),
            "\U0010ffff",
        ]
    ),
    max_size=30,
).map("".join)

SCRIPTS = [
    "The quick brown fox — “jumps” over 3.14159 lazy dogs…  Twice.\r\n\tIndented\v\f\x1c\x85\u2028\u2029",
    "Ελληνικά, русский, العربية, עברית, हिन्दी, বাংলা, தமிழ், ไทย, ລາວ, မြန်မာ, ქართული, አማርኛ, ᏣᎳᎩ, ខ្មែរ",
    "日本語のテキスト、中文文本。한국어 텍스트 \u1112\u1161\u11ab 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓁐 👩‍👩‍👧‍👦 🇫🇷",
    "İıſ ß ẞ ﬀ ½ ² Ⅷ ㎏ Å Å A\u030a ℌ ｆｕｌｌ　ｗｉｄｔｈ",
    "",
    " ",
    "\u2581\u2581 \u2581",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer, unigram_tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "bpe" else unigram_tokenizer


def same_again(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eot_id not in tokens
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    decoder = tokenizer.decode_stream()
    assert "".join(map(decoder.push, tokens)) + decoder.flush() == text


@given(text=st.one_of(ANY_TEXT, TROUBLE))
def test_any_text_with_bpe(tokenizer: Tokenizer, text: str) -> None:
    same_again(tokenizer, text)


@given(text=st.one_of(ANY_TEXT, TROUBLE))
def test_any_text_with_unigram(unigram_tokenizer: Tokenizer, text: str) -> None:
    same_again(unigram_tokenizer, text)


@pytest.mark.parametrize("text", SCRIPTS)
def test_many_scripts(either: Tokenizer, text: str) -> None:
    same_again(either, text)


def test_every_character_there_is(tokenizer: Tokenizer) -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    for first in range(0, len(characters), 100_000):
        text = "".join(characters[first : first + 100_000])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_python_source_and_documentation(either: Tokenizer) -> None:
    documents = [document for document in python_docs() if document.id.endswith(("ast.py", "textwrap.py", "topics/if"))]
    assert len(documents) >= 3
    for document in documents:
        same_again(either, document.text)


@given(cuts=st.lists(st.integers(1, 200), min_size=1, max_size=4), spaces=st.booleans())
def test_long_texts_are_cut_where_it_changes_nothing(tokenizer: Tokenizer, cuts: list[int], spaces: bool) -> None:
    rng = random.Random(str(cuts))
    words = ["river", "stone\n", "x", "  ", "\t", "数字", "\u2581"]
    text = (" " if spaces else "").join(rng.choice(words) for _ in range(sum(cuts)))
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEGMENT", 64)
        parts = tokenizer.encode(text)
    assert tokenizer.decode(parts) == text
    if spaces:  # Without spaces to cut at, tokens may differ; the text may not.
        assert parts == whole


def test_a_batch_is_what_its_texts_are_alone_on_any_number_of_threads(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = [*SCRIPTS, *texts[:30]]
    alone = [tokenizer.encode(text) for text in batch]
    assert all(tokenizer.encode_batch(batch, threads=threads) == alone for threads in (1, 2, 7))
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["", "\u2581"])[0] == []


def test_end_of_text_is_a_piece_that_no_text_gives(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.eot_id]) == ""
    assert tokenizer.decode([*tokenizer.encode("river"), tokenizer.eot_id, *tokenizer.encode(" x")]) == "river x"


def test_tokens_may_be_numpy_and_incomplete(tokenizer: Tokenizer) -> None:
    tokens = np.array(tokenizer.encode("a🙂"), dtype=np.uint16)
    assert tokenizer.decode(tokens) == "a🙂"
    assert tokenizer.decode(tokens[:-1]).startswith("a\ufffd")
    decoder = tokenizer.decode_stream()
    assert "".join(map(decoder.push, tokens[:-1])) == "a"
    assert decoder.flush() == "\ufffd"
    assert decoder.push(tokens[0]) == "a"


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lone surrogate \\udc80 at character 2"):
        tokenizer.encode("ab\udc80")


def test_the_fingerprint_is_the_files_hash_and_saving_keeps_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.fingerprint == hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest()
    tokenizer.save(tmp_path / "copy.model")
    again = Tokenizer(tmp_path / "copy.model")
    assert (again.fingerprint, again.vocab_size, again.eot_id) == (tokenizer.fingerprint, 400, tokenizer.eot_id)
    assert Tokenizer.from_proto(tokenizer.proto).encode("river stone") == tokenizer.encode("river stone")


LOSSLESS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "required_chars": "\u2581",
}


def made_elsewhere(texts: list[str], vocab_size: int = 340, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, minloglevel=3, **options
    )
    return model.getvalue()


ELSEWHERE: dict[str, dict[str, Any]] = {
    # As Llama 2's and Mistral's say of themselves.
    "llama": {**LOSSLESS, "add_dummy_prefix": True, "model_type": "bpe"},
    "defaults with bytes": {"byte_fallback": True},
    "normalising": {**LOSSLESS, "normalization_rule_name": "nmt_nfkc"},
    "folding case": {**LOSSLESS, "normalization_rule_name": "nfkc_cf"},
    "collapsing spaces": {**LOSSLESS, "remove_extra_whitespaces": True},
}


@functools.cache
def elsewhere(kind: str) -> Tokenizer:
    return Tokenizer.from_proto(made_elsewhere(make_texts(200, seed=4), **ELSEWHERE[kind]), kind)


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_model_that_changes_text_is_used_without_that(kind: str) -> None:
    tokenizer = elsewhere(kind)
    assert tokenizer.rewrites
    for text in (*SCRIPTS, "  two  spaces in front", "ﬁ ＡＢ Ⅷ\n\n\tX"):
        same_again(tokenizer, text)
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    assert own.decode(own.encode("  ﬁ")) != "  ﬁ" or own.encode("a")[0] != tokenizer.encode("a")[0]
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.proto).hexdigest()
    again = Tokenizer.from_proto(tokenizer.proto)  # as a worker or a run directory opens it
    assert again.encode("river  stone") == tokenizer.encode("river  stone")


@given(text=st.one_of(ANY_TEXT, TROUBLE), kind=st.sampled_from(list(ELSEWHERE)))
def test_any_text_with_models_made_elsewhere(text: str, kind: str) -> None:
    same_again(elsewhere(kind), text)


@given(words=st.lists(st.sampled_from(["river", "stone", "  ", " ", "\n", "é", "数", "0", "x ="]), min_size=1))
def test_its_pieces_are_those_of_the_model_behind_a_space(words: list[str]) -> None:
    """Llama's dummy prefix is a space in front of a text: with one in the text the numbers are the model's own."""
    tokenizer, text = elsewhere("llama"), "".join(words)
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    assert tokenizer.encode(" " + text) == own.encode(text)


def test_our_own_models_are_used_as_they_are(either: Tokenizer) -> None:
    assert not either.rewrites


@pytest.mark.parametrize("options", [{}, {**LOSSLESS, "byte_fallback": False}], ids=["defaults", "without bytes"])
def test_models_that_lose_something_are_refused(texts: list[str], options: dict[str, Any]) -> None:
    said = r"tokenizer other: it is not lossless .* without byte_fallback.* `hope data tokenizer train`"
    with pytest.raises(UserError, match=said):
        Tokenizer.from_proto(made_elsewhere(texts, 120, **options), "other")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_that_loses_text_is_taken_on_request_and_says_so(texts: list[str], model_type: str) -> None:
    model = made_elsewhere(texts, 120, model_type=model_type)  # SentencePiece's defaults
    tokenizer = Tokenizer.from_proto(model, "other", lossy=True)
    assert not tokenizer.lossless
    assert not tokenizer.rewrites
    assert tokenizer.fingerprint == hashlib.sha256(model).hexdigest() + "-lossy"
    assert "loses text" in str(tokenizer.note)
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in (*texts[:9], *SCRIPTS):
        assert tokenizer.encode(text) == own.encode(text), "the model as it is"
    assert tokenizer.count_unknowns(tokenizer.encode("river ᏣᎳᎩ stone")) == 1
    assert tokenizer.decode(tokenizer.encode("river stone")) == " river stone"


def test_a_model_without_end_of_text_is_refused(texts: list[str]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=400, minloglevel=3, eos_id=-1, **LOSSLESS
    )
    with pytest.raises(UserError, match="no end-of-text piece"):
        Tokenizer.from_proto(model.getvalue())


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer file .*gone\.model; `hope data tokenizer train` makes one"):
        Tokenizer(tmp_path / "gone.model")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path)
    for raw in (b"", b"this is no model", b"\0" * 100):
        (tmp_path / "bad.model").write_bytes(raw)
        with pytest.raises(UserError, match=r"bad\.model: not a SentencePiece model file"):
            Tokenizer(tmp_path / "bad.model")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A tokenizer.json of GPT-2's kind."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


def test_a_tokenizer_of_hugging_face_loses_nothing(byte_level: Path, texts: list[str]) -> None:
    import tokenizers

    tokenizer = Tokenizer(byte_level)
    assert tokenizer.vocab_size == 500
    assert tokenizer.eot_id == 0
    theirs = tokenizers.Tokenizer.from_file(str(byte_level))
    for text in texts[:50]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eot_id not in tokenizer.encode("say <|endoftext|> and <|pad|>")
    assert tokenizer.decode(tokenizer.encode("say <|endoftext|>")) == "say <|endoftext|>"
    assert int(tokenizer.piece_bytes()[tokenizer.encode("naïve 数字")].sum()) == len("naïve 数字".encode())
    again = Tokenizer.from_proto(tokenizer.proto)
    assert again.fingerprint == tokenizer.fingerprint
    stream = tokenizer.decode_stream()
    assert "".join(stream.push(token) for token in tokenizer.encode("数字 x")) + stream.flush() == "数字 x"


@given(text=st.text())
def test_a_byte_level_tokenizer_takes_any_text(byte_level: Path, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    tokenizer = _byte_level(byte_level)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@functools.cache
def _byte_level(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}, {"type": "Lowercase"}], ids=str)
@pytest.mark.parametrize("space", [False, True])
def test_what_a_tokenizer_of_hugging_face_changes_is_left_off(
    byte_level: Path, tmp_path: Path, normalizer: dict[str, str] | None, space: bool
) -> None:
    tree = json.loads(byte_level.read_text())
    tree["pre_tokenizer"]["add_prefix_space"] = space
    (tmp_path / "other.json").write_text(json.dumps({**tree, "normalizer": normalizer}))
    tokenizer = Tokenizer(tmp_path / "other.json")
    assert tokenizer.rewrites == (space or normalizer is not None)
    assert tokenizer.encode("River e\u0301  ") == Tokenizer(byte_level).encode("River e\u0301  ")
    for text in SCRIPTS:
        same_again(tokenizer, text)


def test_lossy_and_unknown_tokenizers_of_hugging_face_are_refused(byte_level: Path, tmp_path: Path) -> None:
    tree = json.loads(byte_level.read_text())
    words = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, tree["pre_tokenizer"]]}
    for name, change, said in (
        ("decoder", {"decoder": None}, "this one is not byte-level"),
        ("words", {"pre_tokenizer": words}, "it is not lossless"),
        ("end", {"added_tokens": []}, "it has no end-of-text piece"),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**tree, **change}))
        with pytest.raises(UserError, match=said):
            Tokenizer(path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer(tmp_path / "bad.json")
