"""Evaluation as the training loop uses it: rows for eval.jsonl, the text read and tokenised once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from data_pipelines.batches import Batch
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.classic import ClassicText, read_classic
from hope_train.evaluate.protocols import (
    exp,
    score_pages,
    score_tokens,
    word_figures,
)
from hope_train.evaluate.scoring import ALL_MINE, Progress, Scorer, Shares
from hope_train.evaluate.sources import (
    ENVIRONMENT,
    held_out_text,
    read_wikitext,
    wikitext_place,
)
from hope_train.evaluate.wikitext import HELD_OUT, SPLITS, Page, Text, join_pages
from hope_train.model.hope import HopeModel

Row = dict[str, Any]


class Evaluator:
    """WikiText perplexities of a run, by the protocols its configuration names.

    Without WikiText (neither eval.wikitext nor $HOPE_WIKITEXT) a run on the built-in text is measured on the part of
    it that is held out, under keys of its own (`heldout_word_ppl`); any other run has its validation loss alone.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        device: torch.device | str,
        context_length: int | None = None,
        splits: Sequence[str] | None = None,
        whole_test: bool = True,
        shares: Shares = ALL_MINE,
    ) -> None:
        """Read the texts.

        Args:
            context_length: tokens in a window. None: the training one.
            splits: which will be asked for. None: validation, and test where eval.test_at_end says so.
            whole_test: the test split is scored whole, whatever eval.pages says of the loop.
            shares: of several processes, each scores some of the windows; all of them get the figures.

        Raises:
            UserError: the WikiText named cannot be read, or a protocol does not apply to this tokenizer.
        """
        self.config, self.tokenizer, self.device = config, tokenizer, torch.device(device)
        self.whole_test, self.shares = whole_test, shares
        self.context_length = context_length or config.train.context_length
        if self.context_length < 2:
            raise UserError(f"context_length={self.context_length}: a window has at least 2 tokens")
        if splits is None:
            splits = ("validation", "test") if config.eval.test_at_end else ("validation",)
        if not tokenizer.lossless and (config.eval.stateful or set(config.eval.protocols) - {"token"}):
            raise UserError(
                f"tokenizer {tokenizer.path} loses text, so perplexities per word or byte would be wrong: set "
                "eval.protocols=[token] and eval.stateful=false"
            )
        self.place = wikitext_place(config.eval.wikitext)
        self._texts: dict[str, Text] = {}
        self._tokens: dict[str, list[np.ndarray]] = {}
        self._classics: dict[str, ClassicText] = {}
        if self.place is None:
            word = "word" in config.eval.protocols or config.eval.stateful
            held_out = held_out_text(config.data, tokenizer) if word and "validation" in splits else None
            if held_out is not None and held_out.pages:
                self._texts["validation"] = held_out
            return
        for split in splits:
            if config.eval.stateful or set(config.eval.protocols) - {"classic"}:
                self._text(split)
            if "classic" in config.eval.protocols:
                self._classic(split)

    def sources(self) -> str:
        """What is measured on what, or that nothing can be: one line to print once."""
        text = next(iter(self._texts.values()), None)
        if text is None and self._classics:
            return f"evaluation on {next(iter(self._classics.values())).place}, protocol: classic"
        if text is None:
            return (
                f"no WikiText (neither eval.wikitext nor ${ENVIRONMENT} is set): evaluations report the validation "
                "loss alone"
            )
        pages = len(self.used(text))
        part = f"{pages} of {len(text.pages)}" if pages < len(text.pages) else f"{pages}"
        if text.source == HELD_OUT:
            return (
                f"no WikiText (neither eval.wikitext nor ${ENVIRONMENT} is set): evaluations use {text.place}, "
                f"{part} documents, reported as heldout_word_ppl"
            )
        doubt = "" if text.verified else ", NOT the known file: figures are marked unverified"
        names = ", ".join(self.config.eval.protocols)
        return f"evaluation on {text.place} ({part} pages{doubt}), protocols: {names}"

    def evaluate(
        self, model: HopeModel, split: str, step: int, tokens: int, progress: Progress | None = None
    ) -> list[Row]:
        """Rows for eval.jsonl, one per protocol; none where there is no text of that split.

        Args:
            split: `validation` or `test` (held-out built-in text has no test split: no rows).
            step, tokens: how far the training is; copied into the rows.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if self.place is None and split not in self._texts:
            return []
        scorer = self.scorer(model)
        rows: list[Row] = []
        for protocol in dict.fromkeys(self.config.eval.protocols):
            if protocol == "word":
                rows.append(self._word_row(scorer, self._text(split), False, progress))
            elif self.place is None:
                continue  # Held-out text has no other protocol.
            elif protocol == "token":
                rows.append(self._token_row(scorer, self._text(split), progress))
            else:
                rows.append(self._classic_row(scorer, split, progress))
        if self.config.eval.stateful:
            rows.append(self._word_row(scorer, self._text(split), True, progress))
        return [{"step": step, "tokens": tokens, "split": split, **row} for row in rows]

    def validation_row(self, model: HopeModel, batches: Iterable[Batch], step: int, tokens: int) -> Row:
        """A row with `validation_loss`: nats per token over batches of held-out training text."""
        started = time.perf_counter()
        nll, count = validation_sums(self.scorer(model), batches)
        return {
            "step": step,
            "tokens": tokens,
            "split": "validation",
            "source": "held-out training text",
            "protocol": "loss",
            **({"validation_loss": nll / count} if count else {}),
            "scored_tokens": count,
            "context_length": self.config.train.context_length,
            "seconds": time.perf_counter() - started,
        }

    def scorer(self, model: HopeModel) -> Scorer:
        """The model with this run's way of running it."""
        return Scorer(
            model=model,
            device=self.device,
            eot_id=self.tokenizer.eot_id,
            precision=self.config.train.precision,
            batch_size=self.config.eval.batch_size,
            chunk=self.config.train.loss_chunk,
            shares=self.shares,
        )

    def used(self, text: Text) -> tuple[Page, ...]:
        """The pages that are scored: `eval.pages` cuts the loop's, never the test at the end of a run."""
        return tuple(text.first(None if self.whole_test and text.split == "test" else self.config.eval.pages))

    def pages(self, split: str) -> list[tuple[int, Page, np.ndarray]]:
        """(number, page, tokens of the text scored) of the pages that evaluations of this split use."""
        text = self._text(split)
        chosen = self.used(text)
        if split not in self._tokens:
            encoded = self.tokenizer.encode_batch([page.scored for page in chosen])
            self._tokens[split] = [np.array(tokens, dtype=np.int64) for tokens in encoded]
        return [(n, page, tokens) for n, (page, tokens) in enumerate(zip(chosen, self._tokens[split], strict=True))]

    def _word_row(self, scorer: Scorer, text: Text, stateful: bool, progress: Progress | None) -> Row:
        started = time.perf_counter()
        scores = score_pages(scorer, self.pages(text.split), self.context_length, stateful, progress)
        prefix = ("heldout_" if text.source == HELD_OUT else "") + ("stateful_" if stateful else "")
        row: Row = {"source": text.source, "protocol": "word", **({"stateful": True} if stateful else {})}
        row |= {f"{prefix}{name}": value for name, value in word_figures(scores).items()}
        row["denominators"] = {
            "words": sum(score.words for score in scores),
            "bytes": sum(score.bytes for score in scores),
        }
        row["scored_tokens"] = sum(score.tokens for score in scores)
        return row | self._about(text, started)

    def _token_row(self, scorer: Scorer, text: Text, progress: Progress | None) -> Row:
        started = time.perf_counter()
        joined = join_pages([page.text for page in self.used(text)])
        nll, count = score_tokens(scorer, self.tokenizer.encode(joined), self.context_length, progress)
        row: Row = {"source": text.source, "protocol": "token", "token_ppl": exp(nll / count)}
        row |= {"denominators": {"tokens": count}, "scored_tokens": count}
        return row | self._about(text, started)

    def _classic_row(self, scorer: Scorer, split: str, progress: Progress | None) -> Row:
        started = time.perf_counter()
        text = self._classic(split)
        nll = math.fsum(scorer.windows(text.windows(self.context_length), progress))
        count = len(text.tokens)
        return {
            "source": "wikitext-2 <unk>",
            "protocol": "classic",
            "classic_ppl": exp(nll / count),
            "denominators": {"words_and_lines": count},
            "scored_tokens": count,
            "context_length": self.context_length,
            "tokenizer": self.tokenizer.fingerprint,
            "seconds": time.perf_counter() - started,
        }

    def _about(self, text: Text, started: float) -> Row:
        used = len(self.used(text))
        return {
            "pages": used,
            **({"partial": True} if used < len(text.pages) else {}),
            "context_length": self.context_length,
            "tokenizer": self.tokenizer.fingerprint,
            "seconds": time.perf_counter() - started,
        }

    def _text(self, split: str) -> Text:
        if split not in self._texts:
            assert self.place is not None
            self._texts[split] = read_wikitext(self.place, split, self.config.data.hub_timeout)
        return self._texts[split]

    def _classic(self, split: str) -> ClassicText:
        if split not in self._classics:
            self._classics[split] = read_classic(self.place, split, self.tokenizer)
        return self._classics[split]


def validation_sums(scorer: Scorer, batches: Iterable[Batch]) -> tuple[float, int]:
    """(sum of negative log-likelihoods in nats, tokens scored) over batches. With several processes each brings its own
    part of every batch, which may be empty."""
    nlls: list[float] = []
    count = 0
    with scorer.running():
        for batch in batches:
            if not len(batch.tokens):
                if scorer.shares.lockstep:
                    token_11 = torch.full((1, 1), scorer.eot_id, dtype=torch.int64, device=scorer.device)
                    scorer.model.row_nll(token_11, token_11, chunk=scorer.chunk)
                continue
            tokens_BT, targets_BT = _tensor(batch.tokens, scorer), _tensor(batch.targets, scorer)
            starts_BT = None if batch.starts is None else _tensor(batch.starts, scorer)
            nlls += scorer.model.row_nll(tokens_BT, targets_BT, starts_BT, scorer.chunk).tolist()
            count += int((targets_BT >= 0).sum())
    nll, scored = scorer.shares.join([math.fsum(nlls), float(count)])
    return nll, int(scored)


def validation_loss(model: HopeModel, batches: Iterable[Batch], device: torch.device | str, precision: str) -> float:
    """Mean negative log-likelihood (nats) per token over batches; NaN where there are none."""
    nll, count = validation_sums(Scorer(model, torch.device(device), 0, precision), batches)
    return nll / count if count else math.nan


def _tensor(values: np.ndarray, scorer: Scorer) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(scorer.device)
