"""In what two checkpoints differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint import compare as module
from hope_train.checkpoint.compare import Comparison, compare, difference
from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.tensors import State
from tests.checkpoint.toy import facts, make_state, make_writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], (0, 0.0, 0.0)),
        ([1.0, 2.0, 0.0], [1.0, 4.0, 1.0], (2, 2.0, 1.0)),
        ([NAN, INF, -INF, 0.0], [NAN, INF, -INF, -0.0], (0, 0.0, 0.0)),
        ([NAN, 1.0], [2.0, 1.0], (1, INF, INF)),
        ([INF], [1.0], (1, INF, INF)),
        ([INF], [-INF], (1, INF, INF)),
        ([-1.0], [1.0], (1, 2.0, 2.0)),
        ([], [], (0, 0.0, 0.0)),
    ],
)
def test_difference(one: list[float], other: list[float], expected: tuple[int, float, float]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert difference(torch.tensor(one, dtype=dtype), torch.tensor(other, dtype=dtype)) == expected


def compared(tmp_path: Path, change: Any, **options: Any) -> Comparison:
    """The state of seed 1 and a changed one."""
    folders = []
    for name in ("a", "b"):
        writer, _ = make_writer(tmp_path / name)
        state = make_state(1)
        if name == "b":
            change(state)
        writer.save(state, facts(1))
        assert writer.last is not None
        folders.append((writer.last, verify(writer.last)))
    return compare(folders[0], folders[1], **options)


@pytest.mark.parametrize("at_a_time", [1, 2**28])
def test_one_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)

    def change(state: State) -> None:
        state["level_0"]["blocks.0.cms.levels.0.up.weight"][7, 3] = 100.0

    found = compared(tmp_path, change)
    (only,) = found.tensors
    was = float(make_state(1)["level_0"]["blocks.0.cms.levels.0.up.weight"][7, 3])
    assert (only.name, only.kind, only.different) == ("blocks.0.cms.levels.0.up.weight", "values", 1)
    assert only.max_abs == 100.0 - was
    assert only.max_rel == (100.0 - was) / 100.0
    assert found.equal == 3
    assert not found.same


def test_shapes_types_names_and_counters(tmp_path: Path) -> None:
    def change(state: State) -> None:
        core = state["core"]
        core["embed.weight"] = torch.zeros(7, 6)
        core["norm.weight"] = core["norm.weight"].float()
        core["new"] = torch.zeros(1)
        core["optimizer.updates"] += 1
        core["optimizer.more"] = torch.tensor(4)
        del core["optimizer.step.embed.weight"]

    found = compared(tmp_path, change)
    assert {each.name: (each.kind, each.one, each.other) for each in found.tensors} == {
        "embed.weight": ("shape", "[7, 5] float32", "[7, 6] float32"),
        "norm.weight": ("type", "[5] float64", "[5] float32"),
    }
    assert (found.only_in_one, found.only_in_other) == (["optimizer.step.embed.weight"], ["new"])
    assert found.counters == {"core.updates": (1, 2), "core.more": (None, 4)}
    assert compared(tmp_path / "w", change, weights_only=True).counters == {}


def test_nothing(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda state: None)
    assert found == Comparison(equal=4)
    assert found.same
