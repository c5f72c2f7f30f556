"""Jobs of other modules, by ranks that have imported the libraries of the engine `deepspeed` before they fork."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tests.parallel.harness import Gang

if sys.argv[0].endswith("harness.py"):  # a rank: imported once, and not at every job
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    from hope_train.parallel.zero.megatron import import_quietly

    import_quietly()


def call(job: str, arguments: dict[str, Any]) -> Any:
    """`module:function` with these arguments."""
    module, _, name = job.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def run(gang: Gang, function: Callable[..., Any], ranks: int, **arguments: Any) -> list[Any]:
    """As `Gang.run`."""
    place = f"{function.__module__}:{function.__qualname__}"
    return gang.run(call, ranks, job=place, arguments=arguments)
