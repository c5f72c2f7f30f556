"""`hope report` on made-up runs: which files appear, that the page needs nothing else, and what the plots show."""

from __future__ import annotations

import json
import re
import struct

import pytest

from hope_train.errors import UserError
from hope_train.report import figures
from hope_train.report.draw import make_report, report_command
from hope_train.report.runs import read_run


def test_one_run(make_run):
    folder = make_run(steps=60)
    report = make_report([str(folder)])
    assert report.page == folder / "report" / "report.html"
    assert set(report.images) == {"loss", "word_ppl", "throughput", "learning_rate", "levels"}
    for path in report.images.values():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 900
        assert height > 400
    assert {path.name for path in report.page.parent.iterdir()} == {f"{s}.png" for s in report.images} | {"report.html"}


def test_page_is_self_contained(make_run):
    page = make_report([str(make_run(steps=30))]).page.read_text()
    assert page.count("data:image/png;base64,") == 5
    assert re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:)[^\"'>\s]+", page) == []
    assert not re.search(r"https?://|//cdn|@import|<script|<link", page)


def test_two_runs_side_by_side(make_run, tmp_path, capsys):
    twin = make_run("twin", steps=40, name="transformer_pp_tiny", arch="transformer_pp", periods=(), offset=0.3)
    hope = make_run(steps=60)
    assert report_command([str(hope), str(twin)], str(tmp_path / "out"), as_json=True) == 0
    output = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in output["runs"]] == ["hope_tiny", "transformer_pp_tiny"]
    assert {"levels_1", "levels_2"} <= set(output["images"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "transformer_pp_tiny" in page
    assert "17.92" in page


def test_a_comparison_does_not_replace_the_report_of_its_first_run(make_run, tmp_path):
    report = make_report([str(make_run("a", steps=5)), str(make_run("b", steps=5))])
    assert report.page == tmp_path / "a" / "report" / "with_b" / "report.html"


def test_run_without_evaluations_has_no_perplexity_plot(make_run):
    report = make_report([str(make_run(steps=10, evals=False))])
    assert "word_ppl" not in report.images
    assert "17.92" not in report.page.read_text()


def test_a_single_logged_step_is_enough(make_run):
    assert "loss" in make_report([str(make_run(steps=1))]).images


def test_published_lines_stand_beside_wikitext_only(make_run, synthetic):
    folder = make_run(steps=10)
    synthetic.write_lines(folder / "eval.jsonl", [synthetic.eval_line(step, 10) for step in (1, 10)])
    assert {"14.39", "17.92"} <= _published(folder)
    synthetic.write_lines(folder / "eval.jsonl", [synthetic.eval_line(s, 10, source="built-in text") for s in (1, 10)])
    assert _published(folder) == set()


def _published(folder):
    figure = figures.word_ppl_figure([read_run(folder)])
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    texts = " ".join(text.get_text() for text in axes.texts)
    return {number for number in ("14.39", "17.92") if number in texts}


@pytest.mark.parametrize("first", [40.0, 25_313_425.3])
def test_labels_of_a_wide_range_stand_inside_the_axes(make_run, synthetic, first):
    """A model that has hardly learned is six orders of magnitude away from the published lines."""
    folder = make_run(steps=10)
    lines = [synthetic.eval_line(step, 10) | {"word_ppl": value} for step, value in ((1, first), (10, first / 60 + 20))]
    synthetic.write_lines(folder / "eval.jsonl", lines)
    figure = figures.word_ppl_figure([read_run(folder)])
    assert figure is not None
    figure.canvas.draw()
    (axes,) = figure.axes
    box = axes.get_window_extent()
    assert any("Hope" in text.get_text() for text in axes.texts)
    for text in axes.texts:
        inside = text.get_window_extent()
        assert box.y0 <= inside.y0 < inside.y1 <= box.y1, text.get_text()
        assert "e+" not in text.get_text()
    assert not any("e+" in label.get_text() for label in axes.get_yticklabels())


def test_no_published_line_on_other_plots(make_run):
    drawn = figures.draw_all([read_run(make_run(steps=10))])
    for stem, figure in drawn.items():
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert any("published" in text for text in texts) == (stem == "word_ppl")


def test_levels_plot_counts_own_updates(make_run):
    figure = figures.levels_figure(read_run(make_run(steps=64)))
    assert figure is not None
    made = {line.get_label(): max(line.get_ydata()) for line in figure.axes[1].lines}
    assert made == {
        "core": 64,
        "level 0 (period 1)": 64,
        "level 1 (period 2)": 32,
        "level 2 (period 4)": 16,
        "level 3 (period 8)": 8,
    }


def test_names_are_text_not_markup(make_run):
    folder = make_run("a$b", steps=5)
    (folder / "config.yaml").write_text("name: '<b>x</b> $\\frac{'\n")
    page = make_report([str(folder)]).page.read_text()
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;" in page


def test_table_output(make_run, capsys):
    assert report_command([str(make_run(steps=10))]) == 0
    output = capsys.readouterr().out
    assert "final loss" in output
    assert "report.html" in output


def test_output_folder_that_cannot_be_written(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        make_report([str(make_run(steps=3))], str(tmp_path / "file"))


def test_smoothing_keeps_a_constant_and_a_line():
    assert figures.smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    line = [float(value) for value in range(300)]
    assert figures.smoothed(line) == pytest.approx(line)  # centred: no lag
    assert figures.smoothed([]) == []
