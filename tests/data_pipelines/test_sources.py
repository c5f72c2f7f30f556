"""Sources as one stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from data_pipelines.sources import Document, describe_source, fingerprint_sources, parse_source, read_sources
from hope_train.config.data import DataConfig, SourceConfig
from hope_train.errors import UserError


def source(**values: object) -> SourceConfig:
    return SourceConfig.model_validate(values)


def test_sources_follow_each_other_with_stable_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b10.txt").write_text("ten")
    (tmp_path / "books" / "b9.txt").write_text("nine")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.chdir(tmp_path)
    documents = list(read_sources([source(path="lines.jsonl"), source(path="books/")]))
    assert documents == [
        Document("lines.jsonl:1", "one"),
        Document("lines.jsonl:2", "two"),
        Document("books/b9.txt", "nine"),
        Document("books/b10.txt", "ten"),
    ]


def test_a_byte_limit_takes_whole_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "é{n}"}}\n' for n in range(9)))  # 3 bytes each.
    for limit, count in ((1, 1), (3, 1), (4, 2), (6, 2), (1000, 9)):
        assert len(list(read_sources([source(path=str(path), max_bytes=limit)]))) == count


def test_builtin_text_under_a_limit() -> None:
    documents = list(read_sources([source(builtin="python-docs", max_bytes=50_000)]))
    assert 50_000 <= sum(len(document.text.encode()) for document in documents) < 500_000


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "b.txt").touch()
    for name in ("a.jsonl", "b.txt", ""):
        with pytest.raises(UserError, match="there is no text in it"):
            list(read_sources([source(path=str(tmp_path / name))]))


@pytest.mark.parametrize("text", ["a/b.txt", "hub:owner/name", "hub:owner/name:config-1", "builtin:python-docs"])
def test_command_line_spelling_goes_both_ways(text: str) -> None:
    assert describe_source(parse_source(text)) == text


@pytest.mark.parametrize("text", ["", "hub:", "hub:a/b/c", "hub:a b", "builtin:nothing"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is none of: a path, hub:owner/name"):
        parse_source(text)


def test_the_fingerprint_changes_with_every_setting_and_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    one = [source(path=str(tmp_path))]
    seen = [
        fingerprint_sources(one),
        fingerprint_sources([source(path=str(tmp_path), max_bytes=5)]),
        fingerprint_sources([source(path=str(tmp_path), text_field="body")]),
        fingerprint_sources([source(hub="owner/name")]),
        fingerprint_sources([source(hub="owner/name", revision="abc")]),
        fingerprint_sources([source(builtin="python-docs")]),
    ]
    (tmp_path / "b.txt").write_text("abc")
    seen.append(fingerprint_sources(one))
    assert len({str(entry) for entry in seen}) == len(seen)
    with pytest.raises(UserError, match="no file or folder"):
        fingerprint_sources([source(path=str(tmp_path / "gone"))])


def test_the_configuration_refuses_what_makes_no_sense() -> None:
    for values in ({}, {"path": "a", "hub": "b"}, {"path": " "}, {"hub": "a/b/c"}, {"path": "a", "max_bytes": 0}):
        with pytest.raises(ValidationError):
            source(**values)
    with pytest.raises(ValidationError, match="a is listed twice"):
        DataConfig.model_validate({"sources": [{"path": "a"}, {"path": "a"}]})
