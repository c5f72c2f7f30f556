"""Our word protocol against lm-evaluation-harness's own code on the same model and pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipelines.tokenizer import Tokenizer
from hope_train.evaluate.protocols import score_pages, word_figures
from hope_train.evaluate.sources import read_wikitext
from hope_train.evaluate.wikitext import Page, wikitext_text
from tests.conftest import optional_module
from tests.evaluate.tiny import ARCHS, scorer, tiny_model, wikitext_like

optional_module("lm_eval")


def compare(arch: str, tokenizer: Tokenizer, pages: list[Page], length: int, dtype: torch.dtype, within: float) -> None:
    from tests.evaluate.harness import harness_figures, harness_loglikelihoods

    model = tiny_model(arch, tokenizer.vocab_size, dtype)
    numbered = [(number, page, tokenizer.encode(page.scored)) for number, page in enumerate(pages)]
    ours = score_pages(scorer(model, tokenizer.eot_id), numbered, length)
    texts = [page.text for page in pages]
    theirs = harness_loglikelihoods(model, tokenizer, texts, length)

    assert [-score.nll for score in ours] == pytest.approx(theirs, rel=within, abs=1e-9)
    assert word_figures(ours) == pytest.approx(harness_figures(theirs, texts), rel=within)
    # The figures are those of a model that has something to say, not of one that gives each token the same chance.
    uniform = sum(score.tokens for score in ours) * torch.tensor(tokenizer.vocab_size).log().item()
    assert abs(sum(score.nll for score in ours) / uniform - 1) > 0.01


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("length", [64, 4096])
def test_synthetic_pages_agree(arch: str, length: int, tokenizer: Tokenizer) -> None:
    pages = list(wikitext_text(wikitext_like(), "validation", "synthetic").pages)
    lengths = [len(tokenizer.encode(page.scored)) for page in pages]
    assert max(lengths) > 5 * 64  # many windows at 64
    assert max(lengths) < 4096  # one window at 4096
    assert min(lengths) < 20  # a page that is only a heading
    pages += [Page("", ""), Page(" \n", "\n")]  # nothing to predict; words and bytes still count
    compare(arch, tokenizer, pages, length, torch.float64, 1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_real_pages_agree(arch: str, tokenizer: Tokenizer, wikitext_dir: Path) -> None:
    pages = sorted(read_wikitext(str(wikitext_dir), "validation").pages, key=lambda page: page.bytes)
    compare(arch, tokenizer, pages[:3], 256, torch.float32, 1e-5)


def test_the_harness_starts_at_our_prefix_token_and_reads_our_tokens(tokenizer: Tokenizer) -> None:
    from tests.evaluate.harness import harness_model

    theirs = harness_model(tiny_model("transformer_pp", tokenizer.vocab_size), tokenizer, 64)
    assert theirs.prefix_token_id == tokenizer.eot_id
    assert theirs.max_length == 64
    for page in wikitext_text(wikitext_like(3), "validation", "synthetic").pages:
        assert theirs.tok_encode(page.scored) == tokenizer.encode(page.scored)


def test_nothing_of_the_harness_is_overridden() -> None:
    """The comparison above is only worth something if the harness's own code runs."""
    from lm_eval.models.huggingface import HFLM

    from tests.evaluate import harness

    assert harness.HFLM is HFLM
    assert not [kind for kind in vars(harness).values() if isinstance(kind, type) and kind in HFLM.__subclasses__()]


@pytest.mark.parametrize("length", [2, 3, 7, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 8, 14, 15, 33])
def test_windows_are_the_harnesss(length: int, count: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from hope_train.evaluate.protocols import rolling_windows

    tokens = list(range(100, 100 + count))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 1, length, context_len=1))
    ours = rolling_windows(tokens, 1, length)
    assert [(window.tokens.tolist(), window.scored) for window in ours] == [
        ([*context, *continuation], len(continuation)) for context, continuation in theirs
    ]
