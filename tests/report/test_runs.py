"""Reading run directories: torn, resumed, damaged, missing."""

from __future__ import annotations

import json

import pytest

from hope_train.errors import UserError
from hope_train.report.runs import eval_label, figure_name, is_wikitext, read_run, read_runs
from hope_train.report.summary import best_word_ppl


def test_whole_run(make_run):
    run = read_run(make_run(steps=40))
    assert [row["step"] for row in run.metrics] == list(range(1, 41))
    assert (run.name, run.resumes, run.notes) == ("hope_tiny", 0, [])
    assert run.level_names() == ["core", "0", "1", "2", "3"]
    assert [row["step"] for row in run.level_rows("3")] == [8, 16, 24, 32, 40]
    assert len(run.level_rows("3", due_only=False)) == 40


def test_torn_last_line_is_dropped_without_a_word(make_run):
    folder = make_run(steps=20)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-40])
    run = read_run(folder)
    assert run.metrics[-1]["step"] == 19
    assert run.notes == []


def test_damage_in_the_middle_is_skipped_and_said(make_run):
    folder = make_run(steps=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:30]
    lines[9] = '{"step": "ten", "tokens": 1}'
    lines[11] = "\x00" * 50
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert [row["step"] for row in run.metrics] == [s for s in range(1, 21) if s not in (5, 10, 12)]
    assert run.notes == ["metrics.jsonl: 2 unreadable lines skipped"]


def test_later_lines_win_after_a_resume(make_run, synthetic):
    folder = make_run(steps=20)
    again = [{**synthetic.metrics_line(step, 20), "loss": 100.0 + step} for step in range(11, 15)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in again)
    run = read_run(folder)
    # Steps 15 to 20 of the killed process never happened in the history that the resumed one continues.
    assert [row["step"] for row in run.metrics] == list(range(1, 15))
    assert [row["loss"] for row in run.metrics[10:]] == [111.0, 112.0, 113.0, 114.0]
    assert run.resumes == 1


def test_a_repeated_evaluation_replaces_the_earlier_one(make_run, synthetic):
    folder = make_run(steps=20)
    rows = [synthetic.eval_line(20, 20, word_ppl=50.0), synthetic.eval_line(20, 20, word_ppl=40.0)]
    rows.append(synthetic.eval_line(20, 20, word_ppl=30.0, stateful=True))
    rows.append(synthetic.eval_line(10, 20, word_ppl=60.0))
    synthetic.write_lines(folder / "eval.jsonl", rows)
    series = read_run(folder).eval_series("word_ppl")
    assert {label: [row["word_ppl"] for row in group] for label, group in series.items()} == {
        "wikitext-2-raw-v1 validation, word": [60.0, 40.0],
        "wikitext-2-raw-v1 validation, word, stateful": [30.0],
    }


def test_figures_that_are_not_finite_are_gaps(make_run, synthetic):
    folder = make_run(steps=6)
    rows = [synthetic.metrics_line(step, 6) for step in range(1, 7)]
    rows[1]["loss"], rows[3]["loss"], rows[4]["loss"] = float("nan"), None, float("inf")
    synthetic.write_lines(folder / "metrics.jsonl", rows)
    tokens, losses = read_run(folder).series("loss")
    assert len(losses) == 3
    assert tokens == [4096.0, 3 * 4096.0, 6 * 4096.0]


def test_partial_and_complete_are_never_one_series():
    row = {"source": "wikitext", "split": "validation", "protocol": "word"}
    labels = {eval_label(row), eval_label({**row, "partial": True, "pages": 8}), eval_label({**row, "stateful": True})}
    assert len(labels) == 3


def test_missing_pieces_are_user_errors(make_run, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_run(tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "tok')
    with pytest.raises(UserError, match="no logged step yet"):
        read_run(tmp_path / "empty")
    with pytest.raises(UserError, match="at least one"):
        read_runs([])
    folder = str(make_run(steps=5))
    with pytest.raises(UserError, match="twice"):
        read_runs([folder, folder + "/."])


def test_eval_config_and_marker_may_be_missing_or_damaged(make_run):
    folder = make_run(steps=5, reason=None)
    (folder / "eval.jsonl").unlink()
    (folder / "config.yaml").write_text("a: [1,")
    run = read_run(folder)
    assert (run.evals, run.stopped, run.name) == ([], None, "hope_tiny")
    assert run.notes == ["config.yaml is unreadable"]


def test_runs_of_one_name_are_told_apart(make_run):
    runs = read_runs([str(make_run("a", steps=5, name="x")), str(make_run("b", steps=5, name="x"))])
    assert len({run.name for run in runs}) == 2


def test_other_text_and_carried_state_keep_their_names(make_run, synthetic):
    folder = make_run(steps=5)
    rows = [
        {"step": 5, "tokens": 9, "split": "validation", "source": "held-out python-docs", "heldout_word_ppl": 12.0},
        {"step": 5, "tokens": 9, "split": "validation", "source": "wikitext-2-raw", "stateful_word_ppl": 80.0},
        {"step": 5, "tokens": 9, "split": "validation", "source": "wikitext-2-raw", "word_ppl": 90.0},
    ]
    synthetic.write_lines(folder / "eval.jsonl", rows)
    run = read_run(folder)
    names = {figure_name(row): (row["word_ppl"], is_wikitext(row)) for row in run.evals}
    assert names == {"heldout_word_ppl": (12.0, False), "stateful_word_ppl": (80.0, True), "word_ppl": (90.0, True)}
    assert len(run.eval_series("word_ppl")) == 3
    best = best_word_ppl(run)
    assert best is not None
    assert figure_name(best) == "word_ppl"


def test_logs_cut_back_by_the_trainer_count_as_resumes(make_run):
    folder = make_run(steps=5)
    (folder / "metrics.beyond-3-abc.jsonl").write_text("")
    assert read_run(folder).resumes == 1
