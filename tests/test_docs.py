"""The documentation is held to the tree: links lead somewhere, commands parse, files and keys that are named exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hope_train.cli import app
from hope_train.config.load import load_config
from tests.test_imports import FLOORS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A path in backticks, as prose names files: from the root, or from inside the main package.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|sh|svg|toml|txt))`")
COMMAND = re.compile(r"^ {4}(?:\$ )?(hope .*)$", re.MULTILINE)
MAKE = re.compile(r"(?:^ {4}|`)make ([a-z][a-z-]*)", re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def parse(words: list[str]) -> list[str]:
    """Parse a command line as `hope` does, without running it; returns the configuration and overrides it names.

    Raises click's UsageError for what it does not know.
    """
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):
        assert rest, f"{' '.join(words)}: a subcommand is missing"
        assert rest[0] in command.commands, f"{' '.join(words)}: there is no `{rest[0]}`"
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(words[0], rest)
    config, overrides = context.params.get("config"), context.params.get("overrides")
    return [config, *(overrides or [])] if config and not context.params.get("docs") else []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong, f"{name(page)} links to what is not there: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    places = (ROOT, ROOT / "hope_train", ROOT / "docs")
    named = PATH.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    wrong = [path for path in named if not any((place / path).exists() for place in places)]
    assert not wrong, f"{name(page)} names files that are not there: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(MAKE.findall(page.read_text(encoding="utf-8"))) <= targets


def test_commands_of_the_readme_parse() -> None:
    commands = COMMAND.findall(README.read_text(encoding="utf-8"))
    assert {shlex.split(line)[1] for line in commands} >= {
        "train",
        "eval",
        "generate",
        "plan",
        "report",
        "config",
        "data",
    }
    for line in commands:
        given = parse(shlex.split(line, comments=True))
        # The one mistake that is shown is the one the next lines of the README explain.
        if given and (ROOT / given[0]).is_file() and "train.tokenz" not in line:
            load_config(ROOT / given[0], given[1:])


def test_the_example_configuration_loads(tmp_path: Path) -> None:
    """And the table below it says what comes of it."""
    text = README.read_text(encoding="utf-8")
    blocks = [body for language, body in FENCE.findall(text) if language == "yaml"]
    assert len(blocks) == 1
    tree = yaml.safe_load(blocks[0])
    tree["base"] = str(ROOT / tree["base"])
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    (line,) = [command for command in COMMAND.findall(text) if " mine.yaml " in command]
    config = load_config(file, parse(shlex.split(line))[1:])
    table = re.findall(r"^\| `([\w.]+)` \|.*\| `?([^|`]+)`? \|$", text[text.index("## Configuration") :], re.MULTILINE)
    assert len(table) == 4
    for key, shown in table:
        value: Any = config
        for part in key.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        assert value == yaml.safe_load(shown.strip().replace(",", "")) or float(value) == float(shown.replace(",", ""))


def test_the_reading_order_names_files_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    files = re.findall(r"`([\w/]+\.py)`", text[text.index("## Reading order") : text.index("## What works today")])
    assert len(files) >= 8
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_documentation_speaks_of_the_project_alone() -> None:
    """No path of one machine: what is written is true in every clone."""
    machine = re.compile(r"(?<![\w.~])/(?:root|home|work|opt|mnt|tmp)/")
    wrong = [name(page) for page in PAGES if machine.search(page.read_text(encoding="utf-8"))]
    assert not wrong


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:|#", target)
    }
    # A folder that is linked shows its README.
    linked |= {file / "README.md" for file in linked if file.is_dir()}
    assert [name(page) for page in PAGES[1:] if page not in linked] == []


def test_the_floors_are_those_that_the_imports_are_held_to() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    shown: dict[str, float] = {}
    floor = -1.0
    for number, room in re.findall(r"^\| *([\d.]*) *\| `([\w/.]+)` \|", text, re.MULTILINE):
        floor = float(number or floor)
        shown[room.removesuffix("/").removesuffix(".py").replace("/", ".")] = floor
    assert shown == {room: floor for room, floor in FLOORS.items() if room != "hope_train"}


def test_every_module_is_in_the_list_of_rooms() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\b(\w+\.py)\b", text))
    files = [file for package in ("hope_train", "data_pipelines", "launch") for file in (ROOT / package).rglob("*.py")]
    assert [name(file) for file in files if file.name != "__init__.py" and file.name not in listed] == []
