"""Local files in every format, their order, and what is said about broken ones."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data_pipelines.documents import Document
from data_pipelines.files import find_files, fingerprint, natural_key, read_file
from data_pipelines.records import read_records
from hope_train.errors import UserError

TEXTS = ["First line\r\nsecond\tline  \n", "数字 été 🙂\n", " ends with spaces  "]


def jsonl(texts: Sequence[str | None], field: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, field: text}) + "\n" for text in texts).encode()


def read(file: Path, field: str = "text") -> list[Document]:
    return list(read_file(file, "name", field))


def pack(suffix: str, raw: bytes) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(raw)
    return zstandard.compress(raw) if suffix.endswith(".zst") else raw


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_txt_is_one_document_kept_exactly(tmp_path: Path, packing: str) -> None:
    file = tmp_path / f"a.txt{packing}"
    file.write_bytes(pack(packing, "".join(TEXTS).encode()))
    assert read(file) == [Document("name", "".join(TEXTS))]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_jsonl_is_a_document_in_each_line(tmp_path: Path, packing: str) -> None:
    file = tmp_path / f"A.JSONL{packing.upper()}"
    raw = jsonl([TEXTS[0]]) + b"\n  \n" + jsonl([TEXTS[1], "", None, TEXTS[2]])
    file.write_bytes(pack(packing, raw.rstrip(b"\n")))
    assert read(file) == [Document("name:1", TEXTS[0]), Document("name:4", TEXTS[1]), Document("name:7", TEXTS[2])]


def test_parquet_is_a_document_in_each_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = [TEXTS[0], None, "", *TEXTS[1:]]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        table = pyarrow.table({"body": pyarrow.array(texts, pyarrow.string()).cast(kind), "n": list(range(5))})
        pyarrow.parquet.write_table(table, file, row_group_size=2)
        assert read(file, "body") == [Document("name:1", TEXTS[0]), *map(Document, ("name:4", "name:5"), TEXTS[1:])]


def test_zst_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(b"".join(zstandard.compress(jsonl([text])) for text in TEXTS))
    assert [document.text for document in read(file)] == TEXTS


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["abc"]))
    assert [document.text for name in ("a.txt", "a.jsonl") for document in read(tmp_path / name)] == ["abc", "abc"]


def test_a_folder_is_searched_in_natural_order(tmp_path: Path) -> None:
    names = ["part-2.txt", "part-10.txt", "part-10b/1.jsonl", "part-10b/x.txt.gz", "sub/deep/1.parquet"]
    for name in [*names, "README.md", ".hidden.txt", ".git/a.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.relative_to(tmp_path).as_posix() for file in find_files(tmp_path)] == names


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.txt").touch()
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "b.txt").touch()
    for name in ("one", "two"):
        (tmp_path / "mix" / name).symlink_to(tmp_path / "elsewhere")
    names = [file.relative_to(tmp_path / "mix").as_posix() for file in find_files(tmp_path / "mix")]
    assert names == ["b.txt", "one/deep/a.txt", "two/deep/a.txt"]
    (tmp_path / "elsewhere" / "deep" / "round").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="deep/round: the link leads back"):
        find_files(tmp_path / "mix")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("bad", ["text", "language"])
def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path, suffix: str, kind: Any, bad: str) -> None:
    raw = pyarrow.array([b"one", None, b"caf\xe9", *[b"more"] * 297])
    text = pyarrow.StringArray.from_buffers(300, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    if kind == "dictionary":
        places = pyarrow.array([0, None, 1, *[2] * 297], pyarrow.int32())
        text = pyarrow.DictionaryArray.from_arrays(places, text.take(pyarrow.array([0, 2, 3])))
    elif kind == pyarrow.large_string():
        large = raw.cast(pyarrow.large_binary())
        text = pyarrow.LargeStringArray.from_buffers(300, large.buffers()[1], large.buffers()[2], large.buffers()[0])
    good = pyarrow.array(["fine"] * 300)
    table = pyarrow.table({"text": text if bad == "text" else good, "language": good if bad == "text" else text})
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    found = list(read_records(file, "text", columns=("language",)))
    assert [record.number for record in found] == [*range(1, 301)]
    faults = [(record.number, record.fault.kind) for record in found if record.fault is not None]
    assert faults == [(3, "not_utf8")]
    assert [found[0].text, found[3].text] == (["one", "more"] if bad == "text" else ["fine", "fine"])
    assert f"a.{suffix}:3: not UTF-8 (byte 0xe9)" in str(found[2].fault)
    assert list(read_records(file, "text", found[1].after, columns=("language",))) == found[2:]


def test_natural_order_is_total() -> None:
    names = ["a", "a1", "a01", "a²", "1", "10", "2", "", "b"]
    assert len({json.dumps(natural_key(name)) for name in names}) == len(names)
    turned = names[::-1]
    assert sorted(names, key=natural_key) == sorted(turned, key=natural_key)
    assert sorted(["f10", "f9", "f1"], key=natural_key) == ["f1", "f9", "f10"]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9\n", r"a\.txt:3: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", jsonl(["x"]) + b'{"text": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", jsonl(["x"]) + b'\n{"text": "x"\n', r"a\.jsonl:3: not valid JSON"),
        ("a.jsonl", b'[\n{"text": "x"}]', r"a\.jsonl:1: not valid JSON .* one object per line"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON object per line is expected, this is a list"),
        ("a.jsonl", jsonl(["x"], "body"), r"a\.jsonl:1: no field 'text'; set text_field to one of: n, body"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"a\.jsonl:1: field 'text' is not text but a list"),
        ("a.jsonl", b'{"text": "x\\ud800y"}\n', r"a\.jsonl:1: .* lone surrogate \\ud800 at character 1"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: "),
        # mtime: a test's name holds these bytes, and every worker must find the same names
        ("a.jsonl.gz", b"this is no gzip", r"a\.jsonl\.gz: cannot be read as gzip"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS * 50), mtime=0)[:-20], r"a\.jsonl\.gz: cannot be read as gzip"),
        ("a.txt.gz", gzip.compress(b"abc", mtime=0)[:-8] + b"\0" * 8, r"a\.txt\.gz: cannot be read as gzip"),
        ("a.txt.zst", b"this is no zstandard", r"a\.txt\.zst: cannot be read as zstandard"),
        ("a.jsonl.zst", zstandard.compress(jsonl(TEXTS * 50))[:-9], r"a\.jsonl\.zst: cannot be read as zstandard"),
        ("a.parquet", b"this is no parquet", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_parquet_with_another_column_or_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "text": [1]}), file)
    with pytest.raises(UserError, match=r"no column 'txt'; set text_field to one of: body, text"):
        read(file, "txt")
    with pytest.raises(UserError, match=r"column 'text' is not text but int64"):
        read(file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(file, "body")


def test_missing_and_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"no file or folder .*nowhere"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.csv: unknown kind of file; known are \.txt"):
        find_files(tmp_path / "a.csv")
    with pytest.raises(UserError, match="holds no text files"):
        find_files(tmp_path)


def test_the_fingerprint_follows_size_time_and_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc")
    first, status = fingerprint(file), file.stat()
    assert fingerprint(file) == first
    file.write_text("abd")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(file) != first
    file.write_text("abc")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fingerprint(file) != first
