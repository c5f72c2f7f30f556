"""`make_run`: a run directory in a temporary folder. See synthetic_runs.py for what is in it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load() -> ModuleType:
    """tests/ is no package (importlib mode): load the neighbour by its path."""
    name = "hope_report_synthetic_runs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("synthetic_runs.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def synthetic() -> ModuleType:
    """The module itself: metrics_line, eval_line, write_lines, write_run."""
    return _load()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("name", steps=…, evals=…) writes a run directory and returns it."""

    def make(folder: str = "hope_tiny", **options: Any) -> Path:
        path: Path = _load().write_run(tmp_path / folder, **options)
        return path

    return make
