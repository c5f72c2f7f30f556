"""What stands in which window, what is divided by what, and pages dealt out to ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.tokenizer import Tokenizer
from hope_train.errors import UserError
from hope_train.evaluate.protocols import (
    PageScore,
    deal,
    exp,
    rolling_windows,
    score_pages,
    score_tokens,
    token_windows,
    word_figures,
)
from hope_train.evaluate.wikitext import wikitext_text
from tests.evaluate.tiny import scorer, tiny_model, wikitext_like


def test_rolling_windows_of_a_small_page() -> None:
    windows = rolling_windows([11, 12, 13, 14, 15, 16, 17], prefix=1, length=3, owner=4)
    assert [(window.tokens.tolist(), window.scored) for window in windows] == [
        ([1, 11, 12, 13], 3),
        ([13, 14, 15, 16], 3),
        ([14, 15, 16, 17], 1),  # the last one is filled up with context
    ]
    assert {window.owner for window in windows} == {4}
    assert rolling_windows([], prefix=1, length=3) == []
    assert [window.tokens.tolist() for window in rolling_windows([11, 12], 1, 100)] == [[1, 11, 12]]


@given(st.integers(0, 60), st.integers(1, 20))
def test_rolling_windows_score_every_token_once_within_the_length(count: int, length: int) -> None:
    tokens = list(range(count))
    windows = rolling_windows(tokens, -1, length)
    assert [int(t) for window in windows for t in window.tokens[len(window.tokens) - window.scored :]] == tokens
    assert all(len(window.tokens) - 1 <= length and 1 <= window.scored < len(window.tokens) for window in windows)


def test_token_windows_read_their_first_token_only() -> None:
    windows = token_windows([1, 2, 3, 4, 5, 6, 7, 8], 3)
    assert [(window.tokens.tolist(), window.scored) for window in windows] == [
        ([1, 2, 3], 2),
        ([4, 5, 6], 2),
        ([7, 8], 1),
    ]
    # A last window of one token has nothing to predict.
    assert [window.tokens.tolist() for window in token_windows([1, 2, 3, 4], 3)] == [[1, 2, 3]]
    assert token_windows([1], 3) == []


@torch.no_grad()
def test_token_perplexity_is_that_of_transformers_fixed_length_windows() -> None:
    """The loop of transformers' documentation with stride = length: labels are shifted inside, the first is dropped."""
    model = tiny_model("transformer_pp", 50)
    tokens, length = np.random.default_rng(0).integers(2, 50, 100).tolist(), 16
    nll, count = 0.0, 0
    for first in range(0, len(tokens), length):
        window = torch.tensor([tokens[first : first + length]])
        logits = model(window)[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    assert score_tokens(scorer(model, 1), tokens, length) == (pytest.approx(nll, rel=1e-11), count)


def test_token_perplexity_of_almost_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="1 tokens, too few"):
        score_tokens(scorer(tiny_model("transformer_pp", 50), 1), [3], 16)


def test_word_figures_are_micro_averages() -> None:
    scores = [PageScore(0, 30.0, 9, 10, 50), PageScore(1, 1.0, 2, 2, 12)]
    figures = word_figures(scores)
    assert figures["word_ppl"] == pytest.approx(math.exp(31 / 12), rel=1e-15)
    assert figures["byte_ppl"] == pytest.approx(math.exp(31 / 62), rel=1e-15)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(figures["byte_ppl"]), rel=1e-14)
    with pytest.raises(UserError, match="no text"):
        word_figures([])


def test_a_model_that_diverged_has_an_infinite_perplexity() -> None:
    assert word_figures([PageScore(0, 1e6, 9, 10, 50)])["word_ppl"] == math.inf
    assert math.isnan(word_figures([PageScore(0, math.nan, 9, 10, 50)])["word_ppl"])
    assert exp(1.0) == math.e


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_pages_divided_among_ranks_give_the_same_figures(ranks: int, stateful: bool, tokenizer: Tokenizer) -> None:
    model = tiny_model("hope", tokenizer.vocab_size)
    pages = wikitext_text(wikitext_like(), "test", "x").pages
    numbered = [(number, page, tokenizer.encode(page.scored)) for number, page in enumerate(pages)]
    alone = score_pages(scorer(model, tokenizer.eot_id), numbered, 64, stateful)
    shares = deal([len(tokens) for _, _, tokens in numbered], ranks)
    parts = [
        score_pages(scorer(model, tokenizer.eot_id), [numbered[n] for n in share], 64, stateful) for share in shares
    ]
    merged = sorted((score for part in parts for score in part), key=lambda score: score.page)
    assert [score.page for score in merged] == [score.page for score in alone]
    assert word_figures(merged) == pytest.approx(word_figures(alone), rel=1e-12)


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 8))
def test_dealing_gives_each_page_to_one_rank_evenly(lengths: list[int], ranks: int) -> None:
    shares = deal(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(page for share in shares for page in share) == list(range(len(lengths)))
    loads = [sum(lengths[page] for page in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
