"""The table of a report: one row per run, from what the run directory says."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from hope_train.report.runs import Row, Run, eval_label, figure_name, is_partial, is_wikitext

FINAL_STEPS = 20
"""The final loss is the mean over this many logged steps at the end: a single step's loss is mostly noise."""

PUBLISHED_SIZE = "1.3B parameters, 100B tokens"
PUBLISHED_TITLE = f"{PUBLISHED_SIZE} (arXiv 2512.24695)"

PUBLISHED: tuple[tuple[str, float, float, float], ...] = (
    ("RetNet", 18.91, 17.04, 52.60),
    ("DeltaNet", 18.62, 17.10, 51.39),
    ("RWKV-7", 18.44, 15.96, 55.30),
    ("TTT", 18.42, 14.51, 55.58),
    ("Transformer++", 17.92, 17.73, 53.38),
    ("Samba", 16.15, 13.21, 54.46),
    ("Titans", 15.60, 11.41, 56.82),
    ("Hope", 14.39, 10.08, 58.04),
)
"""(model, WikiText word perplexity, LAMBADA perplexity, average accuracy of 8 tasks in percent), as published."""


@dataclass(frozen=True)
class Summary:
    """One run in figures; None where it was not measured."""

    run: str
    arch: str | None
    parameters: int | None
    steps: int
    tokens: int
    final_loss: float | None
    best_validation_loss: float | None
    best_word_ppl: float | None
    word_ppl_name: str | None
    """The name it was logged under: `word_ppl`, or `heldout_word_ppl` where no WikiText was at hand."""

    word_ppl_what: str | None
    """Source, split, protocol of `best_word_ppl`, and whether it is partial or stateful."""

    word_ppl_tokens: int | None
    """Tokens seen when it was measured."""

    test_word_ppl: float | None
    """The last complete, stateless figure on the test split."""

    median_tokens_per_s: float | None
    peak_memory_bytes: int | None
    resumes: int
    stopped: str

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def summarise(run: Run) -> Summary:
    """The row of one run."""
    last = run.metrics[-1]
    _, losses = run.series("loss")
    _, speeds = run.series("tokens_per_s")
    _, memory = run.series("peak_memory_bytes")
    validation = [row["validation_loss"] for rows in run.eval_series("validation_loss").values() for row in rows]
    best = best_word_ppl(run)
    model = run.config.get("model")
    return Summary(
        run=run.name,
        arch=str(model["arch"]) if isinstance(model, dict) and model.get("arch") else None,
        parameters=_parameters(run),
        steps=last["step"],
        tokens=int(last["tokens"]),
        final_loss=statistics.fmean(losses[-FINAL_STEPS:]) if losses else None,
        best_validation_loss=min(validation) if validation else None,
        best_word_ppl=best["word_ppl"] if best else None,
        word_ppl_name=figure_name(best) if best else None,
        word_ppl_what=eval_label(best) if best else None,
        word_ppl_tokens=int(best["tokens"]) if best else None,
        test_word_ppl=_test_word_ppl(run),
        median_tokens_per_s=statistics.median(speeds) if speeds else None,
        peak_memory_bytes=int(max(memory)) if memory else None,
        resumes=run.resumes,
        stopped=stop_reason(run),
    )


def best_word_ppl(run: Run) -> Row | None:
    """The evaluation with the lowest word_ppl among those that rank highest in trust.

    Complete figures go before partial ones, WikiText before other text, stateless before stateful: a low perplexity
    over eight pages is not better than a higher one over all of them.
    """
    rows = [row for rows in run.eval_series("word_ppl").values() for row in rows]
    if not rows:
        return None
    return min(
        rows, key=lambda row: (is_partial(row), not is_wikitext(row), bool(row.get("stateful")), row["word_ppl"])
    )


def plain_number(value: float) -> str:
    """With commas and without powers of ten: `14.39`, `422,630`."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"


def stop_reason(run: Run) -> str:
    """Why the run stopped, from its marker file."""
    if run.stopped is None:
        return "no marker: still running, or killed"
    reason = str(run.stopped.get("reason", "unknown"))
    detail = run.stopped.get("detail") or run.stopped.get("signal") or run.stopped.get("message")
    return f"{reason} ({detail})" if detail else reason


def _test_word_ppl(run: Run) -> float | None:
    rows = [
        row
        for rows in run.eval_series("word_ppl").values()
        for row in rows
        if row.get("split") == "test" and not is_partial(row) and not row.get("prefix") and not row.get("stateful")
    ]
    return float(rows[-1]["word_ppl"]) if rows else None


def _parameters(run: Run) -> int | None:
    """The trainer may log the number of parameters in any of these places."""
    for place in (run.stopped or {}, *run.metrics[:1], *run.metrics[-1:], *run.evals[-1:]):
        value = place.get("parameters")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
