"""`make demo`: which text it takes, that its command is valid, and the whole of it in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hope_train.config.load import load_config
from scripts import demo


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the demo's own, and none of the variables that choose its text."""
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    monkeypatch.setattr(demo, "RUN", tmp_path / "hope")
    monkeypatch.delenv("HOPE_CORPUS", raising=False)
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    monkeypatch.setattr(demo, "hub_reachable", lambda timeout: False)
    monkeypatch.chdir(demo.ROOT)
    return tmp_path


def test_the_built_in_text_is_the_last_resort_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = demo.choose_text()
    assert text.argument == "builtin:python-docs"
    assert "no hub can be reached" in text.label
    assert text.wikitext is None
    monkeypatch.setattr(demo, "hub_reachable", lambda timeout: True)
    text = demo.choose_text()
    assert text.argument == f"hub:{demo.HUB_CORPUS}"
    assert text.wikitext == "hub"


def test_a_local_corpus_and_a_wikitext_folder_go_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(timeout: float) -> bool:
        raise AssertionError("the hub is of no use here and was asked")

    monkeypatch.setattr(demo, "hub_reachable", asked)
    monkeypatch.setenv("HOPE_CORPUS", str(tmp_path))
    monkeypatch.setenv("HOPE_WIKITEXT", "somewhere")
    text = demo.choose_text()
    assert text.source == {"path": str(tmp_path)}
    assert text.wikitext == "somewhere"
    monkeypatch.setenv("HOPE_CORPUS", str(tmp_path / "missing"))
    with pytest.raises(demo.StepError, match="HOPE_CORPUS"):
        demo.choose_text()


@pytest.mark.parametrize("name", ["plain", "it's a name", "a: b, [c]"])
def test_the_command_is_a_valid_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    corpus = tmp_path / name
    corpus.mkdir()
    monkeypatch.setenv("HOPE_CORPUS", str(corpus))
    monkeypatch.setenv("HOPE_WIKITEXT", "elsewhere")
    text = demo.choose_text()
    command, config_file, *overrides = demo.train_arguments(text, tmp_path / "t.model", steps=100)
    assert command == "train"
    config = load_config(config_file, overrides)
    assert config.data.sources[0].path == str(corpus)
    assert config.eval.wikitext == "elsewhere"
    assert config.run_dir == str(demo.RUN)
    assert config.model.vocab_size == demo.VOCABULARY
    assert config.train.total_steps == demo.total_steps()


def test_a_perplexity_that_does_not_fall_or_a_missing_step_is_no_success(folder: Path) -> None:
    text = demo.Text("some text", "x", {"path": "x"}, "somewhere", "The ")
    run = folder / "hope"
    run.mkdir()

    def write(steps: list[int], values: list[float]) -> None:
        lines = [{"step": s, "tokens": s * 10, "loss": 5.0 - s, "tokens_per_s": 9.0} for s in steps]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        rows = [{"step": i, "split": "validation", "word_ppl": value} for i, value in enumerate(values)]
        (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for steps, values, good in [
        ([1, 2, 3], [900.0, 500.0], True),
        ([1, 2, 3], [500.0, 900.0], False),
        ([1, 2, 3], [500.0], False),
        ([1, 3], [900.0, 500.0], False),
        ([1, 2, 2, 3], [900.0, 500.0], False),
    ]:
        write(steps, values)
        assert demo.show_result(text, Path("t.model"), begun=0.0) is good, (steps, values)


def test_a_line_still_being_written_is_left_out(folder: Path) -> None:
    (folder / "hope").mkdir()
    assert demo.last_step() == 0
    (folder / "hope" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert demo.last_step() == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo_in_small(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAIN_TOKENS", 49_152)
    monkeypatch.setattr(demo, "CORPUS_BYTES", 1_000_000)
    monkeypatch.setattr(demo, "TOKENIZER_BYTES", 1_000_000)
    monkeypatch.setattr(demo, "EVALUATIONS", 2)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 20)
    assert demo.demo() == 0
    out = capfd.readouterr().out
    assert "every step is there once" in out
    assert "not WikiText" in out
    assert list((folder / "hope" / "report").glob("*.html"))
    assert json.loads((folder / "hope" / "STOPPED.json").read_text(encoding="utf-8"))["reason"] == "completed"
