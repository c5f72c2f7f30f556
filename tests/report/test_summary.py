"""The summary table."""

from __future__ import annotations

import json

import pytest

from hope_train.report.runs import read_run
from hope_train.report.summary import best_word_ppl, summarise


def test_summary_of_a_finished_run(make_run):
    run = read_run(make_run(steps=40))
    summary = summarise(run)
    last = [row["loss"] for row in run.metrics[-20:]]
    assert summary.final_loss == pytest.approx(sum(last) / 20)
    assert (summary.steps, summary.tokens) == (40, 40 * 4096)
    assert (summary.arch, summary.stopped, summary.parameters) == ("hope", "completed", None)
    assert summary.peak_memory_bytes == 700 << 20
    assert summary.test_word_ppl == summary.best_word_ppl
    json.dumps(summary.to_dict())


def test_a_complete_figure_goes_before_a_lower_partial_one(make_run, synthetic):
    folder = make_run(steps=10)
    rows = [
        synthetic.eval_line(5, 10, word_ppl=20.0, partial=True, pages=2),
        synthetic.eval_line(6, 10, word_ppl=30.0, stateful=True),
        synthetic.eval_line(7, 10, word_ppl=90.0),
        synthetic.eval_line(8, 10, word_ppl=80.0),
        synthetic.eval_line(9, 10, word_ppl=10.0, source="built-in text"),
    ]
    synthetic.write_lines(folder / "eval.jsonl", rows)
    best = best_word_ppl(read_run(folder))
    assert best is not None
    assert best["word_ppl"] == 80.0
    synthetic.write_lines(folder / "eval.jsonl", rows[:1])
    summary = summarise(read_run(folder))
    assert summary.best_word_ppl == 20.0
    assert "partial, 2 pages" in (summary.word_ppl_what or "")
    assert summary.test_word_ppl is None


def test_nothing_measured_is_none_not_zero(make_run, synthetic):
    folder = make_run(steps=3, evals=False, reason=None)
    synthetic.write_lines(folder / "metrics.jsonl", [{"step": 1, "tokens": 10}])
    summary = summarise(read_run(folder))
    assert (summary.final_loss, summary.best_word_ppl, summary.median_tokens_per_s) == (None, None, None)
    assert "killed" in summary.stopped


def test_parameters_where_the_trainer_logged_them(make_run, synthetic):
    folder = make_run(steps=3)
    (folder / "STOPPED.json").write_text(json.dumps({"reason": "signal", "detail": "SIGTERM", "parameters": 1775744}))
    summary = summarise(read_run(folder))
    assert (summary.parameters, summary.stopped) == (1775744, "signal (SIGTERM)")
