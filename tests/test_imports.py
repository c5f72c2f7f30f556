"""The floor plan of docs/architecture.md, held to: who may import whom, what stays free of torch, what is declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hope_train.cli import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hope_train", "launch", "data_pipelines")

# Each room and its floor; the longest prefix of a module's name says where it is. An import leads to a lower
# floor or stays in the room. Errors and the configuration lie under the other rooms of the first floor, and the
# rules under the levels, as each of those is made from them. A room's commands are a floor of their own kind:
# they fetch a checkpoint for the room to work on.
FLOORS: dict[str, float] = {
    "hope_train.cli": 6,
    "launch": 5,
    "hope_train.train": 4,
    "hope_train.plan": 4,
    "hope_train.generate": 4,
    "hope_train.evaluate.commands": 4,
    "hope_train.checkpoint.commands": 4,
    "hope_train.checkpoint": 3,
    "hope_train.parallel": 2.7,
    "hope_train.evaluate": 2.5,
    "hope_train.model": 2,
    "hope_train.levels": 2,
    "hope_train.memory": 1,
    "hope_train.optim": 1,
    "hope_train.report": 1,
    "data_pipelines": 1,
    "hope_train.plan.stages": 0.8,
    "hope_train.plan.gathering": 0.8,
    "hope_train.plan.flops": 0.7,
    "hope_train.plan.parameters": 0.6,
    "hope_train.config": 0.5,
    "hope_train.errors": 0,
    "hope_train.machine": 0,
    "hope_train": 0,
}
NO_TORCH = ("hope_train.config", "hope_train.plan", "hope_train.report", "hope_train.cli", "data_pipelines", "launch")
# Imported inside the functions that need them, so that nothing else waits for them or needs them installed.
LAZY = (
    "wandb",
    "datasets",
    "tensorboard",
    "tokenizers",
    "torch.utils.tensorboard",
    "lm_eval",
    "matplotlib",
    "transformers",
    "megatron",
    "deepspeed",
)
# Where the name of a package is not the name one imports.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "lm_eval": "lm-eval",
    "megatron": "megatron-core",
    "huggingface_hub": "huggingface-hub",
    "pydantic_core": "pydantic",
}


def module_files() -> dict[str, Path]:
    """Every module of the project's packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = module_files()


def imports_of(module: str) -> Iterator[tuple[str, int, bool]]:
    """What a module imports, also inside functions: (dotted name, line, whether importing the module imports it)."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    # A module inside `if TYPE_CHECKING` or a function is not imported with the file.
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in late
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; rooms are named in full here"
            for alias in node.names:
                # `from room import module` names a module, `from room.module import thing` does not.
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else str(node.module)), node.lineno, id(node) not in late


def room_of(module: str) -> str:
    """The longest prefix of a module's name that FLOORS knows."""
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        room = ".".join(parts[:depth])
        if room in FLOORS and (room != "hope_train" or module == "hope_train"):
            return room
    raise AssertionError(
        f"{module} stands on no floor: give it a room in tests/test_imports.py and docs/architecture.md"
    )


def own(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_floors_below(module: str) -> None:
    room = room_of(module)
    wrong = [
        f"line {line}: {name} (floor {FLOORS[room_of(name)]:g})"
        for name, line, _ in imports_of(module)
        if own(name) and room_of(name) != room and FLOORS[room_of(name)] >= FLOORS[room]
    ]
    assert not wrong, f"{module} is on floor {FLOORS[room]:g} and imports {wrong}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_imported_exists(module: str) -> None:
    wrong = [f"line {line}: {name}" for name, line, _ in imports_of(module) if own(name) and name not in MODULES]
    assert not wrong, f"{module} imports what is not there: {wrong}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: {name for name, *_ in imports_of(module) if own(name) and name != module} for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_only_where_they_are_used(module: str) -> None:
    wrong = [f"line {line}: {name}" for name, line, early in imports_of(module) if early and name.startswith(LAZY)]
    assert not wrong, f"{module} imports at its top: {wrong}; do it inside the functions that need it"


def test_rooms_of_a_login_node_import_without_torch() -> None:
    modules = [name for name in MODULES if any(name == room or name.startswith(f"{room}.") for room in NO_TORCH)]
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"  # import torch now raises ModuleNotFoundError
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_package_that_is_imported_is_declared_and_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    base = {canonical(text) for text in project["dependencies"]}
    by_extra = {canonical(text): extra for extra in extras for text in extras[extra] if extra not in ("dev", "test")}
    locked = {canonical(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}

    imported = {name.partition(".")[0] for module in MODULES for name, *_ in imports_of(module) if not own(name)}
    third_party = {name for name in imported if name not in sys.stdlib_module_names}
    declared = base | set(by_extra)
    missing = {name for name in third_party if distribution(name) not in declared}
    assert not missing, f"imported and not in pyproject.toml: {missing}"
    # The CLI names the extra to install for each package that is not in the base.
    assert {distribution(name): extra for name, extra in EXTRAS.items()} == by_extra
    everything = {canonical(text) for extra in extras.values() for text in extra} | base
    assert everything - {"hope-train"} <= locked


def test_the_lock_holds_versions_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    # No path, no URL, no local part (+cpu): the file must serve every machine.
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []


def canonical(requirement: str) -> str:
    """The package's name in a requirement, as package indexes compare names."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0] if match else "").lower()


def distribution(name: str) -> str:
    """The package that brings the import name."""
    return canonical(DISTRIBUTIONS.get(name, name))
