"""The named perplexities: which tokens stand in which window, and what the sum is divided by.

word     lm-evaluation-harness `wikitext` 2.0: word_ppl, byte_ppl, bits_per_byte. Independent of the tokenizer.
token    windows of the joined raw text, per token: token_ppl. Comparable under one tokenizer and window alone.
classic  the closed vocabulary of Merity et al. (arXiv 1609.07843), per word and line end: classic_ppl (see classic.py).

Each protocol gives sums per page (or per stream), and one aggregation turns sums into figures; so pages can be scored
anywhere, in any order, and their sums brought together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hope_train.errors import UserError
from hope_train.evaluate.scoring import Progress, Scorer, Window
from hope_train.evaluate.wikitext import Page


@dataclass(frozen=True)
class PageScore:
    """What one page (or one stream of text) adds to the totals."""

    page: int
    """Its number in the split."""

    nll: float
    """-sum of log-likelihoods, in nats."""

    tokens: int
    """Tokens scored."""

    words: int
    bytes: int


def rolling_windows(tokens: Sequence[int] | np.ndarray, prefix: int, length: int, owner: int = 0) -> list[Window]:
    """The disjoint windows in which lm-evaluation-harness scores a page, every token once.

    The first window reads [prefix] + tokens[:length-1] and predicts tokens[:length]. Each later one predicts the next
    `length` tokens from one token of context; the last one, which has fewer than `length` tokens left, is filled up
    to `length` inputs with earlier tokens as context. So a page longer than the window ends on a full window.

    Source: lm_eval.utils.get_rolling_token_windows(context_len=1) and make_disjoint_window, with the truncation in
    HFLM._loglikelihood_tokens. A page without tokens has no window.
    """
    stream = np.array([prefix, *tokens], dtype=np.int64)
    windows: list[Window] = []
    for done in range(0, len(tokens), length):
        scored = min(length, len(tokens) - done)
        end = done + scored
        windows.append(Window(owner, stream[max(0, end - length) : end + 1], scored))
    return windows


def token_windows(tokens: Sequence[int], length: int) -> list[Window]:
    """Neighbouring windows of `length` tokens; each one's first token is only read. A last window of one is dropped.

    The convention of the fixed-length example in the transformers documentation ("Perplexity of fixed-length models",
    stride = length) and of GPTQ's evaluation, which also drops the last, shorter window; here that one is scored.
    """
    stream = np.asarray(tokens, dtype=np.int64)
    pieces = [stream[first : first + length] for first in range(0, len(stream), length)]
    return [Window(0, piece, len(piece) - 1) for piece in pieces if len(piece) > 1]


def score_pages(
    scorer: Scorer,
    pages: Sequence[tuple[int, Page, Sequence[int] | np.ndarray]],
    length: int,
    stateful: bool = False,
    progress: Progress | None = None,
) -> list[PageScore]:
    """The word protocol's sums for any subset of the pages.

    Args:
        pages: (number, page, tokens of `page.scored`). Ranks may each take some: see `deal`.
        length: tokens in a window.
        stateful: carry the recurrent state through a page instead of starting each window afresh.
    """
    windows: list[Window] = []
    if stateful:
        streams = [np.array([scorer.eot_id, *tokens], dtype=np.int64) for _, _, tokens in pages]
        sums = scorer.streams(streams, length, progress)
    else:
        for place, (_, _, tokens) in enumerate(pages):
            windows += rolling_windows(tokens, scorer.eot_id, length, owner=place)
        parts: list[list[float]] = [[] for _ in pages]
        for window, nll in zip(windows, scorer.windows(windows, progress), strict=True):
            parts[window.owner].append(nll)
        sums = [math.fsum(part) for part in parts]
    return [
        PageScore(number, nll, len(tokens), page.words, page.bytes)
        for (number, page, tokens), nll in zip(pages, sums, strict=True)
    ]


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Page numbers for each rank, the longest page always to the rank with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for number in sorted(range(len(lengths)), key=lambda page: (-lengths[page], page)):
        rank = min(range(ranks), key=lambda candidate: (load[candidate], candidate))
        shares[rank].append(number)
        load[rank] += lengths[number]
    return [sorted(share) for share in shares]


def word_figures(scores: Iterable[PageScore]) -> dict[str, float]:
    """word_ppl, byte_ppl, bits_per_byte: micro averages over pages, as lm_eval.api.metrics aggregates them.

    word_ppl = exp(nll / words), byte_ppl = exp(nll / bytes), bits_per_byte = nll / (bytes ln 2). The order of the
    pages does not matter: sums are exactly rounded.
    """
    scores = list(scores)
    nll = math.fsum(score.nll for score in scores)
    words, size = sum(score.words for score in scores), sum(score.bytes for score in scores)
    if not words or not size:
        raise UserError("the pages to evaluate hold no text")
    return {
        "word_ppl": exp(nll / words),
        "byte_ppl": exp(nll / size),
        "bits_per_byte": nll / (size * math.log(2.0)),
    }


def score_tokens(
    scorer: Scorer, tokens: Sequence[int], length: int, progress: Progress | None = None
) -> tuple[float, int]:
    """The token protocol's (nll in nats, tokens scored) of one stream. Raises UserError where nothing can be scored."""
    windows = token_windows(tokens, length)
    if not windows:
        raise UserError(f"the text has {len(tokens)} tokens, too few to score one")
    return math.fsum(scorer.windows(windows, progress)), sum(window.scored for window in windows)


def exp(value: float) -> float:
    """e^value; infinite where a float cannot hold it (a model that has diverged), NaN for NaN."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
