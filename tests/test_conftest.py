"""tests/conftest.py: the suite dealt out in parts, WikiText that must be there in CI, the watchdog over each test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import deal, find_wikitext, optional_module, parse_part

CONFTEST = Path(__file__).with_name("conftest.py")
SUITE = """
import pytest

@pytest.mark.parametrize("n", range(7))
def test_short(n): ...

@pytest.mark.slow
@pytest.mark.parametrize("n", range(5))
def test_long(n): ...

def test_wikitext(wikitext_dir):
    assert wikitext_dir.is_dir()
"""
SETTINGS = "[pytest]\nmarkers =\n    slow: x\n"


@given(st.lists(st.text(max_size=5), max_size=40), st.integers(1, 7))
def test_the_parts_are_the_whole_each_name_once(names: list[str], parts: int) -> None:
    dealt = [deal(names, part, parts) for part in range(1, parts + 1)]
    assert sorted(name for part in dealt for name in part) == sorted(set(names))
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert dealt == [deal(names[::-1], part, parts) for part in range(1, parts + 1)]


def test_parts_are_counted_from_one() -> None:
    assert parse_part("2/4") == (2, 4)
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(pytest.UsageError, match="--part"):
            parse_part(wrong)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A small suite of 7 short tests, 5 long ones and one that reads WikiText, with this project's conftest."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(SUITE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(SETTINGS, encoding="utf-8")
    return tmp_path


def collect(suite: Path, *arguments: str) -> list[str]:
    done = pytest_in(suite, {}, "--collect-only", "-q", *arguments)
    return [line for line in done.stdout.splitlines() if "::" in line]


def pytest_in(suite: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=suite,
        env={"PATH": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_parts_of_a_suite(suite: Path) -> None:
    whole = collect(suite)
    parts = [collect(suite, "--part", f"{part}/3") for part in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert len(whole) == 13
    long = [[name for name in part if "test_long" in name] for part in parts]
    assert sorted(len(names) for names in long) == [1, 2, 2]
    # The long tests of a part are the same when the short ones are left out.
    assert collect(suite, "--part", "2/3", "-m", "slow") == long[1]


def test_an_empty_part_is_no_failure(suite: Path) -> None:
    assert pytest_in(suite, {}, "-k", "test_wikitext", "--part", "2/2").returncode == 0
    assert pytest_in(suite, {}, "-k", "nothing").returncode == 5


def test_wikitext_is_skipped_at_home_and_demanded_in_ci(suite: Path, tmp_path: Path) -> None:
    def outcome(**variables: str) -> str:
        return pytest_in(suite, variables, "-k", "wikitext", "-q").stdout

    folder = tmp_path / "wikitext"
    folder.mkdir()
    assert "1 skipped" in outcome()
    assert "1 skipped" in outcome(CI="false", HOPE_WIKITEXT=str(folder))
    assert "1 error" in outcome(CI="true")
    assert "1 error" in outcome(HOPE_REQUIRE_WIKITEXT="1", HOPE_WIKITEXT=str(folder))
    (folder / "wiki.valid.raw").touch()
    assert "wiki.test.raw" in outcome(CI="true", HOPE_WIKITEXT=str(folder))
    (folder / "wiki.test.raw.gz").touch()
    assert "1 passed" in outcome(CI="true", HOPE_WIKITEXT=str(folder))


def test_the_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wiki.valid.raw.gz", "wiki.test.raw.gz"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOPE_WIKITEXT", tmp_path.name)
    assert find_wikitext() == tmp_path.resolve()


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["plain", "xdist"])
def test_a_test_that_hangs_shows_where_and_fails(suite: Path, workers: list[str]) -> None:
    # re: a match that takes for ever holds the interpreter, as a hang in native code does.
    hang = "import pytest, re\n@pytest.mark.timeout(2, method='thread')\ndef test_hang():\n"
    (suite / "test_it.py").write_text(hang + "    re.match('(a+)+b', 'a' * 64)\n", encoding="utf-8")
    done = pytest_in(suite, {}, *workers)
    assert done.returncode != 0
    assert "Timeout (0:00:02)!" in done.stderr
    assert "in test_hang" in done.stderr


def test_an_optional_module_is_there_or_skipped_or_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional_module("json") is json
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_module_here is not installed"):
        optional_module("no_such_module_here")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="it is required here"):
        optional_module("no_such_module_here")
