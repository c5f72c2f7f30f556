"""`hope eval` on a real checkpoint, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.tokenizer import Tokenizer
from hope_train.cli import run as hope
from hope_train.evaluate.commands import strict_json
from hope_train.evaluate.loop import Evaluator
from tests.evaluate.tiny import make_run, run_config


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)


@pytest.fixture
def run_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose loop uses one page."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, run_config("hope", tokenizer.vocab_size, eval={"pages": 1}), tokenizer)
    return folder


def test_json_has_the_rows_of_the_loop(
    run_dir: Path, tokenizer: Tokenizer, wikitext_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hope(["eval", str(run_dir), "--wikitext", str(wikitext_folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    from hope_train.checkpoint.store import load_model

    model, _, _ = load_model(run_dir)
    config = run_config("hope", tokenizer.vocab_size, eval={"wikitext": str(wikitext_folder)})
    (expected,) = Evaluator(config, tokenizer, "cpu").evaluate(model, "validation", 5, 320)
    # All pages, although the loop uses one.
    assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    assert row["pages"] == 5


def test_options_reach_the_evaluation(run_dir: Path, wikitext_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((run_dir / "checkpoints").iterdir())
    options = ["--split", "test", "--protocol", "token", "--protocol", "word", "--context-length", "48", "--stateful"]
    command = ["eval", str(checkpoint), *options, "--pages", "2", "--wikitext", str(wikitext_folder), "--json"]
    assert hope([*command, "eval.batch_size=2", "train.device=cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["protocol"], row.get("stateful", False)) for row in rows] == [
        ("token", False),
        ("word", False),
        ("word", True),
    ]
    assert all(
        (row["split"], row["context_length"], row["pages"], row["partial"]) == ("test", 48, 2, True) for row in rows
    )
    assert all((row["step"], row["tokens"]) == (5, 320) for row in rows)


def test_the_table_names_figure_text_and_denominator_in_80_columns(
    run_dir: Path, wikitext_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--protocol", "word", "--protocol", "token", "--stateful", "--pages", "2"]
    assert hope(["eval", str(run_dir), "--wikitext", str(wikitext_folder), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    for figure in ("word_ppl", "byte_ppl", "bits_per_byte"):
        for name, protocol in ((figure, "word "), (f"stateful_{figure}", "word, stateful")):
            (line,) = [line for line in lines if f" {name} " in line]
            assert f" {protocol} " in line
            assert ("bytes" if "byte" in figure else "words") in line
    (line,) = [line for line in lines if " token_ppl " in line]
    assert "tokens" in line
    text = "wikitext-2-raw (unverified), 2 pages (partial), windows of 32 tokens"
    assert [line.strip() for line in lines[-2:]] == [f"word: {text}", f"token: {text}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "{run}"], "no WikiText to measure the validation split on: name a folder with --wikitext"),
        (["eval", "{run}", "--wikitext", "/nowhere"], "WikiText folder /nowhere does not exist"),
        (["eval", "{run}", "--wikitext", "{run}"], "has no wiki.valid.raw or wiki.valid.raw.gz"),
        (["eval", "{run}", "--wikitext", "{wiki}", "--protocol", "classic"], "protocol classic needs"),
        (["eval", "{run}", "model.d_model=32"], "the checkpoint fixes that"),
        (["eval", "{run}", "--wikitext", "{wiki}", "eval.batchsize=2"], "did you mean `eval.batch_size`?"),
        (["eval", "{run}", "--wikitext", "{wiki}", "eval.pages=0"], "`eval.pages`"),
        (["eval", "/nowhere"], "neither a run directory nor a checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, run_dir: Path, wikitext_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.replace("{run}", str(run_dir)).replace("{wiki}", str(wikitext_folder)) for text in arguments]
    assert hope(filled) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_checkpoint_with_another_tokenizer_is_refused(
    run_dir: Path, wikitext_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bytearray((run_dir / "tokenizer.model").read_bytes())
    (run_dir / "tokenizer.model").write_bytes(bytes(model) + b"\x1a\x00")  # another file, equally valid
    assert hope(["eval", str(run_dir), "--wikitext", str(wikitext_folder)]) == 2
    assert "was trained with tokenizer" in capsys.readouterr().err


def test_figures_that_are_not_finite_are_still_json() -> None:
    text = strict_json([{"word_ppl": float("inf"), "byte_ppl": float("nan"), "pages": 3}])
    assert json.loads(text) == [{"word_ppl": None, "byte_ppl": None, "pages": 3}]
