"""`hope data …`, as its functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_pipelines.commands import train_tokenizer_command
from data_pipelines.looking import inspect_command, stats_command
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError


@pytest.fixture
def config_file(texts: list[str], make_config: Callable[..., DataConfig], tmp_path: Path) -> str:
    tree = {
        "model": {"vocab_size": 400, "cms": {"levels": [{"width": 8}]}},
        "data": make_config(texts).model_dump(mode="json"),
        "train": {"context_length": 32, "batch_tokens": 128, "micro_batch_size": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_tokenizer_is_trained_from_files(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "books").mkdir()
    for number in range(4):
        (tmp_path / "books" / f"{number}.txt").write_text("\n".join(texts[number::4]), encoding="utf-8")
    train_tokenizer_command([str(tmp_path / "books")], str(tmp_path / "t"), vocab_size=320, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert figures["path"] == str(tmp_path / "t.model")
    assert (figures["pieces"], figures["documents"]) == (320, 4)
    assert figures["fingerprint"] == tokenizer.fingerprint
    assert figures["bytes"] == sum(path.stat().st_size for path in (tmp_path / "books").iterdir())
    assert 1.0 < figures["bytes_per_token"] < 20.0


def test_a_tokenizer_is_trained_from_builtin_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer_command(["builtin:python-docs"], str(tmp_path / "t[bold].model"), 500, "bpe", max_bytes=200_000)
    lines = capsys.readouterr().out.splitlines()
    assert any("500" in line for line in lines)
    cells = "".join(line.split("│")[2].strip() for line in lines if line.count("│") == 3)
    tokenizer = Tokenizer(tmp_path / "t[bold].model")
    assert tokenizer.vocab_size == 500
    assert tokenizer.fingerprint in cells
    assert tokenizer.path in cells


def test_an_existing_tokenizer_stays(texts: list[str], tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    corpus = str(write_jsonl(tmp_path / "a.jsonl", texts))
    (tmp_path / "t.model").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"t\.model exists already: say --overwrite"):
        train_tokenizer_command([corpus], str(tmp_path / "t"), 320)
    assert (tmp_path / "t.model").read_bytes() == b"precious"
    train_tokenizer_command([corpus], str(tmp_path / "t"), 320, overwrite=True, as_json=True)
    assert Tokenizer(tmp_path / "t.model").vocab_size == 320


def test_bad_inputs_of_training_are_named_before_any_work(tmp_path: Path) -> None:
    out = str(tmp_path / "t.model")
    with pytest.raises(UserError, match="no text to train on"):
        train_tokenizer_command([], out)
    with pytest.raises(UserError, match="no file or folder"):
        train_tokenizer_command(["builtin:python-docs", str(tmp_path / "gone")], out)
    with pytest.raises(UserError, match="is none of"):
        train_tokenizer_command(["builtin:nothing"], out)
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_text_of_a_batch(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command(config_file, ["data.reset_at_documents=true"], batch=2, rows=3, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    assert (figures["batch"], figures["batch_rows"], len(figures["rows"])) == (2, 4, 3)
    for row in figures["rows"]:
        assert row["tokens"] == len(row["token_ids"]) == 32
        assert row["text"].count("<|endoftext|>") == row["token_ids"].count(1)
        assert row["starts"] == sorted({0, *(place for place, token in enumerate(row["token_ids"]) if token == 1)})
    inspect_command(config_file, ["data.reset_at_documents=true"], batch=2, rows=3)
    shown = capsys.readouterr().out
    assert f"window {figures['rows'][1]['window']}" in shown
    assert "row 2 of 4" in shown
    with pytest.raises(UserError, match="batch=-1"):
        inspect_command(config_file, batch=-1)
    with pytest.raises(UserError, match="is too far"):
        inspect_command(config_file, batch=10**23)


def test_stats_count_the_corpus(config_file: str, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stats_command(config_file, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    sides = figures["splits"].values()
    assert sum(side["documents"] for side in sides) == len(texts)
    assert sum(side["bytes"] for side in sides) == sum(len(text.encode()) for text in texts)
    for side in sides:
        assert sum(side["length_histogram"].values()) == side["documents"]
        own = side["tokens"] - side["documents"] - 1
        assert side["bytes_per_token"] == pytest.approx(side["bytes"] / own, abs=1e-3)
        assert side["shortest"] <= side["median"] <= side["longest"]
        assert all(int(least) <= side["longest"] for least in side["length_histogram"])
    stats_command(config_file)
    shown = capsys.readouterr().out
    assert f"{figures['splits']['train']['tokens']:,}" in shown
    assert "windows of an epoch" in shown


def test_stats_without_a_validation_part(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        stats_command(config_file, ["data.validation_fraction=0"], as_json)
    first = capsys.readouterr().out.splitlines()[0]
    assert json.loads(first)["splits"]["validation"]["documents"] == 0


@pytest.mark.parametrize("mode", ["cached", "streaming"])
def test_stats_and_inspect_name_each_source(
    texts: list[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write_jsonl: Callable[[Path, list[str]], Path],
    mode: str,
) -> None:
    one, two = write_jsonl(tmp_path / "one.jsonl", texts[:200]), write_jsonl(tmp_path / "two.jsonl", [*texts[200:], ""])
    tree = {
        "model": {"vocab_size": 400, "cms": {"levels": [{"width": 8}]}},
        "data": {
            "mode": mode,
            "sources": [{"path": str(one)}, {"path": str(two)}],
            "tokenizer": tokenizer.path,
            "validation_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
            "stream": {"lanes": 4, "workers": 0, "packing": "best_fit", "pack_rows": 8},
        },
        "train": {"context_length": 64, "batch_tokens": 512, "micro_batch_size": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    stats_command(str(path), as_json=True)
    figures = json.loads(capsys.readouterr().out)
    by_source = {(entry["source"], entry["split"]): entry for entry in figures["by_source"]}
    for name, own in ((str(one), texts[:200]), (str(two), texts[200:])):
        sides = [by_source[name, split] for split in ("train", "validation")]
        assert sum(side["documents"] for side in sides) == len(own)
        assert sum(side["bytes"] for side in sides) == sum(len(text.encode()) for text in own)
        assert all(side["unknowns"] == 0 for side in sides)
        assert sum(sum(side["length_histogram"].values()) for side in sides) == len(own)
    whole = figures["splits"]["train"]
    assert whole["documents"] == sum(by_source[str(name), "train"]["documents"] for name in (one, two))
    if mode == "streaming":
        assert by_source[str(two), "train"]["records"]["empty"] == 1
    stats_command(str(path))
    assert "by source" in capsys.readouterr().out
    inspect_command(str(path), batch=1, rows=2, as_json=True)
    seen = json.loads(capsys.readouterr().out)
    assert sum(seen["sources"].values()) == pytest.approx(1.0)
    assert set(seen["sources"]) <= {str(one), str(two)}
    for row in seen["rows"]:
        parts = row["text"].split("<|endoftext|>")
        assert len(row["documents"]) == len(parts) - (parts[0] == "")
    assert (seen["padding_share"] > 0) == (mode == "streaming")
    inspect_command(str(path), batch=1, rows=2)
    assert "padding of the batch" in capsys.readouterr().out
