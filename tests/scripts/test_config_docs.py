"""docs/configuration.md is what the fields say."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_train.config.load import field_docs
from hope_train.config.tree import RunConfig
from scripts import config_docs


def test_the_page_in_the_repository_is_current() -> None:
    assert config_docs.main(["--check"]) == 0, "run `make format`"


def test_every_key_has_its_row_and_no_cell_breaks_the_table() -> None:
    rows = [line for line in config_docs.page().splitlines() if line.startswith("| `")]
    assert sorted(line.split("`")[1] for line in rows) == sorted(key for key, *_ in field_docs(RunConfig))
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_an_old_page_is_noticed_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_docs, "PAGE", tmp_path / "configuration.md")
    assert config_docs.main(["--check"]) == 1
    assert "make format" in capsys.readouterr().err
    assert config_docs.main([]) == 0
    assert config_docs.main(["--check"]) == 0
    config_docs.PAGE.write_text("old", encoding="utf-8")
    assert config_docs.main(["--check"]) == 1
