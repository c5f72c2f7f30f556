"""What the level optimizer says of a step: norms, rates and sizes of updates, and what it costs to ask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hope_train.levels.schedule import LevelPlan
from tests.levels import reference
from tests.levels.toy import Toy, config


class Copies(TorchDispatchMode):
    """Counts the weights that are cloned."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_measuring_is_optional_and_changes_nothing() -> None:
    run = config([1, 2], variant="nested")
    seen, blind = Toy(run), Toy(run)
    for step in range(1, 9):
        before = seen.weights()
        seen.backward(step)
        blind.backward(step)
        full = seen.optimizer.step(tokens=4, measure=True)
        with Copies() as copies:
            bare = blind.optimizer.step(tokens=4)
        assert step == 1 or copies.count == 0, "no copy of the weights when nobody looks"
        seen.optimizer.zero_grad()
        blind.optimizer.zero_grad()
        assert all(part.update_ratio is None and part.reset_ratio is None for part in bare.sets.values())
        assert (full.sets["level_1"].update_ratio is not None) == (step % 2 == 0)
        assert (full.sets["level_0"].reset_ratio is not None) == (step % 2 == 0)
        after = seen.weights()
        core = [name for name in before if reference.level(name) is None]
        change = math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in core))
        size = math.sqrt(sum(float((before[n] ** 2).sum()) for n in core))
        assert full.sets["core"].update_ratio == pytest.approx(change / size, rel=1e-12)
    for name, value in seen.weights().items():
        assert np.array_equal(blind.weights()[name], value), name


def test_report_of_a_step() -> None:
    run = config([1, 2], levels=[{}, {"lr_scale": 4.0}], schedule={"kind": "constant", "warmup_tokens": 0}, lr=0.25)
    toy = Toy(run)
    toy.backward(1)
    norms = {}
    for key in (None, 0, 1):
        grads = [toy.grad(name) for name in toy.parameters if reference.level(name) == key]
        norms[key] = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
    report = toy.optimizer.step(tokens=4)
    assert (report.applied, report.step, report.skipped, report.lr) == (True, 1, 0, 0.25)
    assert report.grad_norm == pytest.approx(math.hypot(norms[None], norms[0])), "the sets of period 1"
    assert {name: part.period for name, part in report.sets.items()} == {"core": 1, "level_0": 1, "level_1": 2}
    assert [part.due for part in report.sets.values()] == [True, True, False]
    assert [part.updates for part in report.sets.values()] == [1, 1, 0]
    assert [part.lr for part in report.sets.values()] == [0.25, 0.25, 1.0]
    assert [part.grad_norm for part in report.sets.values()] == pytest.approx(list(norms.values()))
    record = report.metrics()
    assert list(record["levels"]) == ["core", "0", "1"]
    assert {"period", "updates", "due", "lr", "grad_norm", "update_ratio"} <= set(record["levels"]["1"])


def test_learning_rates_reported_are_those_applied() -> None:
    run = config([1, 4])
    toy = Toy(run)
    plan = LevelPlan.from_config(run)
    for step in range(1, 13):
        applied = {group["set"]: group["lr"] for group in toy.optimizer.param_groups}  # of the next update
        report = toy.step(step)
        assert report.sets["level_1"].lr == plan.lr(plan.sets[2], (step + 3) // 4)
        assert {name: part.lr for name, part in report.sets.items()} == applied


def test_metrics_hold_no_nan() -> None:
    toy = Toy(config([1]))
    toy.backward(1, spoil=lambda step: True)
    record = toy.optimizer.step(tokens=3).metrics()
    assert record["grad_norm"] is None
    assert record["levels"]["core"]["grad_norm"] is None
    assert record["levels"]["0"]["grad_norm"] is not None
