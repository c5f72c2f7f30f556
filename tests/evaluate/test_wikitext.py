"""Pages, the detokenizer and the denominators, on made-up text and on the real files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_train.errors import UserError
from hope_train.evaluate.sources import read_wikitext
from hope_train.evaluate.wikitext import (
    KNOWN,
    UNVERIFIED,
    VERIFIED,
    Known,
    Page,
    detokenize,
    join_pages,
    split_pages,
    wikitext_text,
)
from tests.conftest import optional_module
from tests.evaluate.tiny import wikitext_like

RAW = " \n = One = \n \n Text . \n = = Part = = \n \n More , text . \n = = = Below = = = \n = Two = \n \n End . \n"


def test_a_page_starts_at_a_top_level_heading_alone() -> None:
    assert split_pages(RAW) == [
        " = One = \n \n Text . \n = = Part = = \n \n More , text . \n = = = Below = = = ",
        " = Two = \n \n End . \n",
    ]


def test_text_before_the_first_heading_is_a_page_unless_it_is_blank() -> None:
    assert split_pages("a\n = T = \nb") == ["a", " = T = \nb"]
    assert split_pages("\n \n = T = \nb") == [" = T = \nb"]
    assert split_pages("no heading\n") == ["no heading\n"]


@pytest.mark.parametrize("line", ["a = b = c", " = unclosed", " closed = ", "= =", " = = Part = = ", "=Tight="])
def test_lines_that_are_no_page_headings(line: str) -> None:
    assert split_pages(f" = One = \n{line}\nrest") == [f" = One = \n{line}\nrest"]


@given(st.lists(st.sampled_from([" = A = ", " = = B = = ", "text", "", " ", " = = = C = = = ", "x = y"]), max_size=12))
def test_no_text_is_lost_but_blank_text_before_the_first_heading(lines: list[str]) -> None:
    raw = "\n".join(lines)
    joined = "\n".join(split_pages(raw))
    assert raw.endswith(joined)
    assert not raw[: len(raw) - len(joined)].strip()


def test_words_and_bytes_are_those_of_the_original_page() -> None:
    page = Page(" é @-@ b \n", "é-b\n")
    # "", "é", "@-@", "b", "": the empty strings at both ends count.
    assert page.words == 5
    assert page.bytes == len(" é @-@ b \n") + 1
    assert Page("", "").words == 1


def test_detokenizer_examples() -> None:
    text = (
        ' It cost 1 @,@ 500 @.@ 5 ( or so ) , the dog \'s " best " price ; see [ 1 ] : a @-@ b . \n = = Part = = \n N '
    )
    assert detokenize(text) == ' It cost 1,500.5 (or so), the dog\'s "best" price; see [1]: a-b.\n== Part ==\nN '


@given(
    st.lists(
        st.sampled_from(
            ["  ", "\n", "\t", "s '", "= =", "/' 3/", *" aN'()[]{}:;.!?,=°/é1\"", "'s", "@-@", "@,@", "@.@"]
        ),
        max_size=40,
    ),
    st.booleans(),
)
def test_the_detokenizer_is_the_harnesss(parts: list[str], spaced: bool) -> None:
    preprocess = optional_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    text = (" " if spaced else "").join(parts)
    assert detokenize(text) == preprocess.wikitext_detokenizer({"page": text})


@given(st.text())
def test_words_and_bytes_are_the_harnesss(text: str) -> None:
    preprocess = optional_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    page = Page(text, "")
    theirs = preprocess.process_results({"page": text}, (0.0,))
    assert (page.words, page.bytes) == (theirs["word_perplexity"][1], theirs["byte_perplexity"][1])


def test_an_unknown_text_is_taken_but_not_vouched_for() -> None:
    text = wikitext_text(wikitext_like(), "test", "somewhere")
    assert text.source == UNVERIFIED
    assert not text.verified
    assert len(text.pages) == 5
    assert text.first(2) == text.pages[:2]


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"somewhere: the file is empty"):
        wikitext_text(" \n \n", "test", "somewhere")


def test_the_denominators_are_asserted_when_the_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A splitter or counter that went wrong must not give figures under WikiText's name."""
    import hashlib

    raw = join_pages(split_pages(RAW))
    digest = hashlib.sha256(raw.encode()).hexdigest()
    monkeypatch.setitem(KNOWN, "test", Known(digest, 2, 30, len(RAW.encode()) - 3, 0))
    assert wikitext_text(raw, "test", "x").verified
    monkeypatch.setitem(KNOWN, "test", Known(digest, 2, 31, len(RAW.encode()) - 3, 0))
    with pytest.raises(AssertionError, match="not those of the real WikiText-2"):
        wikitext_text(raw, "test", "x")


@pytest.mark.parametrize(
    ("split", "pages", "words", "size", "lines", "plain_words"),
    [("validation", 60, 214_006, 1_146_785, 3_760, 213_886), ("test", 62, 241_335, 1_290_527, 4_358, 241_211)],
)
def test_denominators_of_the_real_files(
    split: str, pages: int, words: int, size: int, lines: int, plain_words: int, wikitext_dir: Path
) -> None:
    text = read_wikitext(str(wikitext_dir), split)
    assert text.source == VERIFIED
    assert len(text.pages) == pages
    assert sum(page.words for page in text.pages) == words
    assert sum(page.bytes for page in text.pages) == size
    # The <unk> files have the same words and lines: the classic denominator.
    raw = join_pages([page.text for page in text.pages])
    assert len(raw.split()) == plain_words
    assert raw.count("\n") == lines
    assert KNOWN[split].classic_words == plain_words + lines


def test_the_test_split_has_the_bytes_per_word_of_a_published_result() -> None:
    """Llama-2-7B's word and byte perplexities, as printed by the harness, imply the ratio of the denominators."""
    known = KNOWN["test"]
    ratio = math.log(8.792073612124492) / math.log(1.5015845643537054)
    assert known.bytes / known.words == pytest.approx(ratio, rel=1e-12)


def test_the_real_pages_are_detokenised_as_the_harness_does(wikitext_dir: Path) -> None:
    preprocess = optional_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    for split in KNOWN:
        for page in read_wikitext(str(wikitext_dir), split).pages:
            assert page.scored == preprocess.wikitext_detokenizer({"page": page.text})
