"""The text every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from data_pipelines.builtin import python_docs, python_docs_fingerprint
from hope_train.errors import UserError


def test_it_holds_library_and_documentation_and_no_tests() -> None:
    documents = list(python_docs())
    ids = [document.id for document in documents]
    assert len(set(ids)) == len(ids)
    assert {"python-docs/lib/argparse.py", "python-docs/lib/json/decoder.py", "python-docs/topics/lambda"} <= set(ids)
    assert not [name for name in ids if "/test/" in name or "site-packages" in name or "/tests/" in name]
    assert sum(len(document.text) for document in documents) > 3_000_000
    original = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes().decode()
    assert dict(documents)["python-docs/lib/argparse.py"] == original


def test_the_order_and_the_fingerprint_are_the_same_each_time() -> None:
    first, second = python_docs(), python_docs()
    assert all(next(first) == next(second) for _ in range(120))
    assert python_docs_fingerprint() == python_docs_fingerprint()


def test_files_in_other_encodings_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("assert True\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    ids = [document.id for document in python_docs() if "/lib/" in document.id]
    assert ids == ["python-docs/lib/good.py"]


def test_an_installation_without_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"library folder .*gone does not exist"):
        list(python_docs())
