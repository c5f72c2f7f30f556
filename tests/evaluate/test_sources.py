"""Where evaluation text comes from, and what is said when it is not there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.corpus import open_corpus
from data_pipelines.tokenizer import Tokenizer
from hope_train.config.data import DataConfig
from hope_train.errors import UserError
from hope_train.evaluate import sources
from hope_train.evaluate.sources import held_out_text, read_wikitext, wikitext_place
from hope_train.evaluate.wikitext import HELD_OUT, VERIFIED, split_pages
from tests.evaluate.tiny import wikitext_like


def page_rows(raw: str) -> list[dict[str, str]]:
    """The layout of EleutherAI/wikitext_document_level."""
    return [{"page": page} for page in split_pages(raw)]


def line_rows(raw: str) -> list[dict[str, str]]:
    """The layout of Salesforce/wikitext: a line per row, blank ones empty."""
    return [{"text": f"{line}\n" if line.strip() else ""} for line in raw.removesuffix("\n").split("\n")]


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.fixture
def raw() -> str:
    return wikitext_like(7)


@pytest.mark.parametrize("subfolder", ["", "wikitext-2-raw", "wikitext-2-raw-v1"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_with_the_raw_file(subfolder: str, packed: bool, raw: str, tmp_path: Path) -> None:
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    data = raw.encode()
    (folder / f"wiki.test.raw{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
    text = read_wikitext(str(tmp_path), "test")
    assert [page.text for page in text.pages] == split_pages(raw)
    assert text.place.startswith(str(folder))


@pytest.mark.parametrize("name", ["validation.jsonl", "valid.jsonl.gz", "validation-00000-of-00001.parquet"])
@pytest.mark.parametrize("rows", [page_rows, line_rows])
def test_a_folder_in_the_hubs_layouts_is_the_raw_file_again(name: str, rows: Any, raw: str, tmp_path: Path) -> None:
    write_rows(tmp_path / name, rows(raw))
    assert [page.text for page in read_wikitext(str(tmp_path), "validation").pages] == split_pages(raw)


@pytest.mark.parametrize("rows", [page_rows, line_rows])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_real_text_is_recognised_in_the_hubs_layouts(
    rows: Any, split: str, wikitext_dir: Path, tmp_path: Path
) -> None:
    real = read_wikitext(str(wikitext_dir), split)
    raw = sources.join_pages([page.text for page in real.pages])
    write_rows(tmp_path / f"{split}.parquet", rows(raw))
    copy = read_wikitext(str(tmp_path), split)
    assert copy.source == VERIFIED
    assert copy.pages == real.pages


def test_the_real_text_with_windows_line_ends_is_recognised(wikitext_dir: Path, tmp_path: Path) -> None:
    raw = sources.join_pages([page.text for page in read_wikitext(str(wikitext_dir), "test").pages])
    (tmp_path / "wiki.test.raw").write_bytes(raw.replace("\n", "\r\n").encode())
    assert read_wikitext(str(tmp_path), "test").source == VERIFIED


def test_the_wrong_split_under_the_right_name_is_refused(wikitext_dir: Path, tmp_path: Path) -> None:
    raw = sources.join_pages([page.text for page in read_wikitext(str(wikitext_dir), "validation").pages])
    (tmp_path / "wiki.test.raw").write_text(raw, encoding="utf-8", newline="\n")
    with pytest.raises(UserError, match="this is WikiText-2's validation split, where the test split belongs"):
        read_wikitext(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder.rmdir(), r"does not exist: name one with wiki.test.raw in it"),
        (lambda folder: None, r"has no wiki.test.raw or wiki.test.raw.gz"),
        (lambda folder: (folder / "wiki.test.raw.gz").write_bytes(b"no gzip"), r"wiki.test.raw.gz: cannot be read"),
        (lambda folder: (folder / "wiki.test.raw").write_bytes(b"\xff\xfe"), r"wiki.test.raw: not UTF-8"),
        (lambda folder: (folder / "wiki.test.raw").mkdir(), r"has no wiki.test.raw"),
        (lambda folder: (folder / "test.jsonl").write_text("{"), r"test.jsonl: not one JSON object per line"),
        (lambda folder: (folder / "test.jsonl").write_text('{"a": 1}'), r"no text in column `page` .* or `text`"),
        (lambda folder: (folder / "test.parquet").write_bytes(b"x"), r"cannot be read as parquet"),
        (lambda folder: [(folder / f"test-{n}.jsonl").write_text("") for n in "12"], r"has several test files"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(make: Any, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "wiki"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=said) as caught:
        read_wikitext(str(folder), "test")
    assert "\n" not in str(caught.value)


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="is not a folder"):
        read_wikitext(str(file), "test")


def test_the_hub_is_asked_for_pages_first_and_for_lines_next(raw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, *, split: str, revision: str | None, streaming: bool, timeout: float) -> list[dict[str, str]]:
        asked.append((name, split, timeout))
        if name == sources.HUB:
            raise UserError("not there; try something else")
        return line_rows(raw)

    monkeypatch.setattr(sources, "load_hub", load)
    text = read_wikitext("hub", "validation", hub_timeout=0.5)
    assert asked == [(sources.HUB, "validation", 0.5), (sources.HUB_LINES, "validation", 0.5)]
    assert [page.text for page in text.pages] == split_pages(raw)
    assert read_wikitext("hub:someone/copy:config", "validation").place == "someone/copy:config"


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"WikiText from the hub: .*; name a local folder with wiki.test.raw") as caught:
        read_wikitext("hub:nobody/nothing-at-all", "test", hub_timeout=0.2)
    assert "\n" not in str(caught.value)


def test_the_configuration_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    assert wikitext_place(None) is None
    monkeypatch.setenv("HOPE_WIKITEXT", "/from/environment")
    assert wikitext_place(None) == "/from/environment"
    assert wikitext_place("hub") == "hub"
    monkeypatch.setenv("HOPE_WIKITEXT", "")
    assert wikitext_place(None) is None


def test_held_out_text_is_what_the_corpus_holds_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig.model_validate(
        {
            "sources": [{"builtin": "python-docs", "max_bytes": 300_000}],
            "cache_dir": str(tmp_path),
            "validation_fraction": 0.2,
        }
    )
    text = held_out_text(data, tokenizer)
    assert text is not None
    assert text.source == HELD_OUT
    split = open_corpus(data, tokenizer).validation
    assert len(text.pages) == split.documents > 1
    assert sum(page.bytes for page in text.pages) == split.text_bytes
    assert all(page.scored == page.text for page in text.pages)


def test_no_held_out_text_of_other_corpora(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text", encoding="utf-8")
    mixed = [{"builtin": "python-docs"}, {"path": str(file)}]
    for given in ([], [{"path": str(file)}], mixed):
        assert (
            held_out_text(DataConfig.model_validate({"sources": given, "cache_dir": str(tmp_path)}), tokenizer) is None
        )
