"""What all tests share: one thread each, the real WikiText, and dealing the suite out in parts."""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Before anything imports torch or a tokenizer: workers run side by side, and no test talks to a service.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
from hypothesis import settings

# Tests judge results, never seconds: no deadline, and in CI the same examples every time.
settings.register_profile("hope", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("hope"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "hope")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="I/N",
        default=None,
        help="run part I of N of the chosen tests (I counts from 1); the N parts together are all of them",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the part asked for; runs after `-m` and `-k` have chosen, in every xdist worker alike."""
    text = config.getoption("--part")
    if text is None:
        return
    part, parts = parse_part(text)
    slow = [item.nodeid for item in items if item.get_closest_marker("slow")]
    fast = [item.nodeid for item in items if not item.get_closest_marker("slow")]
    # Dealt separately, so that each part gets its share of the long tests, and the same long tests
    # whether or not the short ones were chosen too.
    kept = set(deal(slow, part, parts)) | set(deal(fast, part, parts))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # The real stderr, before a test's output is captured.
    config.stash[_STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_STDERR])


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """A test out of time: the stacks of all threads go to stderr, and its process ends.

    pytest-timeout's own way needs the interpreter, which a hang in native code may hold, and loses the
    stacks in xdist's workers. This watchdog is a thread of C.
    """
    if settings.method != "thread" or item.config.getoption("usepdb"):
        return None
    faulthandler.dump_traceback_later(settings.timeout, exit=True, file=item.config.stash[_STDERR])
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    faulthandler.cancel_dump_traceback_later()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A part may be empty, when there are fewer tests than parts: that is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--part") is not None:
        session.exitstatus = pytest.ExitCode.OK


def parse_part(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4). Raises pytest.UsageError for anything but 1 <= i <= n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise pytest.UsageError(f"--part {text!r}: write I/N with 1 <= I <= N, for example 2/4")
    return int(match[1]), int(match[2])


def deal(names: Sequence[str], part: int, parts: int) -> list[str]:
    """Part `part` (from 1) of `parts` of a set of names: equal shares to within one, each name in exactly one.

    The names are shuffled by their hash first: the variants of one test follow each other in a
    pattern, and dealing a pattern out would give all the dear ones to the same part.
    """
    shuffled = sorted(set(names), key=lambda name: (hashlib.sha256(name.encode()).digest(), name))
    return shuffled[part - 1 :: parts]


def find_wikitext() -> Path | str:
    """The folder HOPE_WIKITEXT with both splits in it, or one line that says what is missing."""
    name = os.environ.get("HOPE_WIKITEXT")
    if not name:
        return "HOPE_WIKITEXT names no folder with wiki.valid.raw and wiki.test.raw (.gz allowed)"
    folder = Path(name)
    for split in ("valid", "test"):
        if not any((folder / f"wiki.{split}.raw{suffix}").is_file() for suffix in ("", ".gz")):
            return f"HOPE_WIKITEXT={name} has no wiki.{split}.raw or wiki.{split}.raw.gz"
    return folder.resolve()


def optional_module(name: str) -> ModuleType:
    """A module that not every machine has: without it a test (or file) is skipped, and fails where CI=true."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} cannot be imported ({error}); it is required here")
        pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture(scope="session")
def wikitext_dir() -> Path:
    """The folder with the real WikiText-2 (wiki.valid.raw, wiki.test.raw, .gz allowed).

    Without it the test is skipped on a developer's machine, and fails where CI=true or HOPE_REQUIRE_WIKITEXT=1.
    """
    found = find_wikitext()
    if isinstance(found, Path):
        return found
    if os.environ.get("CI") == "true" or os.environ.get("HOPE_REQUIRE_WIKITEXT") == "1":
        pytest.fail(f"{found}; it is required here")
    pytest.skip(found)
