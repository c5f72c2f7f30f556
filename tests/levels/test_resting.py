"""Moments that rest in host memory between updates: the same bits, the same checkpoints, other places."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hope_train.levels import resting
from hope_train.levels.optimizer import LevelOptimizer
from tests.levels.toy import Toy, config, flatten

PERIODS = [1, 2, 4, 8]
STEPS = 19


def pair(rest: int, **options: Any) -> tuple[Toy, Toy]:
    plain = config(PERIODS, **options)
    moved = config(PERIODS, **options, rest_from_period=rest)
    return Toy(moved, torch.float32), Toy(plain, torch.float32)


def assert_equal(mine: Toy, theirs: Toy) -> None:
    found, expected = flatten(mine.optimizer.named_state()), flatten(theirs.optimizer.named_state())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, parameter in theirs.parameters.items():
        assert torch.equal(mine.parameters[name], parameter), name


@pytest.mark.parametrize("at_a_time", [1, 60, 2**28])
@pytest.mark.parametrize("rest", [2, 4, 100])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_every_bit_is_the_same(
    variant: str, fused: bool, rest: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resting, "REST_AT_A_TIME", at_a_time)
    mine, theirs = pair(rest, variant=variant, fused=fused)
    for step in range(1, STEPS):
        spoil = {"spoil": lambda number: number == 6}
        reports = [repr(toy.step(step, measure=step % 2 == 0, **spoil)) for toy in (mine, theirs)]
        assert reports[0] == reports[1], "norms of a refused step are not equal to themselves as numbers"
        assert_equal(mine, theirs)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    # A slow level's mean is there for each of its parameters; a fast one may have none.
    mine, theirs = pair(2)
    for step in range(1, 9):
        for toy in (mine, theirs):
            toy.backward(step)
            toy.parameters["norm.weight"].grad = None
            toy.optimizer.step(tokens=5)
            toy.optimizer.zero_grad()
        assert_equal(mine, theirs)


def test_rest_and_accumulator_are_where_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "REST_AT_A_TIME", 100)
    toy, _ = pair(4)
    optimizer = toy.optimizer
    optimizer.materialize_state()

    def moments(name: str) -> list[int]:
        return [optimizer.state[toy.parameters[name]][key].data_ptr() for key in ("exp_avg", "exp_avg_sq")]

    names = [f"blocks.0.cms.levels.{level}.up.weight" for level in range(4)]
    before = {name: moments(name) for name in names}
    seen: dict[str, list[list[int]]] = {name: [] for name in names}
    most, plain = [0], optimizer.optimizer.step

    def step() -> None:
        stepped = {p for p in toy.parameters.values() if p.grad is not None}
        for name in names:
            if toy.parameters[name] in stepped:
                seen[name].append(moments(name))
        away = [p for n, p in toy.parameters.items() if p in stepped and (".levels.2." in n or ".levels.3." in n)]
        most[0] = max(most[0], sum(2 * p.nbytes for p in away))
        plain()

    monkeypatch.setattr(optimizer.optimizer, "step", step)
    for number in range(1, 9):
        toy.step(number)
    assert [len(seen[name]) for name in names] == [8, 4, 2, 1]
    for level, name in enumerate(names):
        assert moments(name) == before[name], "between updates they are the same tensors all the time"
        own = [place for place in seen[name] if place == before[name]]
        assert len(own) == (len(seen[name]) if level < 2 else 0), "and at an update others, of periods from 4 on"
    assert 0 < most[0] <= 2 * 4 * 3 * 4, "a few at a time"


@pytest.mark.parametrize(("before", "after"), itertools.permutations([None, 2, 8], 2))
def test_checkpoints_know_nothing_of_it(before: int | None, after: int | None) -> None:
    def toy(rest: int | None) -> Toy:
        return Toy(config(PERIODS, rest_from_period=rest), torch.float32)

    whole, first = toy(None), toy(before)
    for step in range(1, STEPS):
        whole.step(step)
        if step <= 7:
            first.step(step)
    for how in ("named", "torch"):
        second = toy(after)
        for name, parameter in first.parameters.items():
            second.parameters[name].data.copy_(parameter.data)
        hand_over(first.optimizer, second.optimizer, how)
        for step in range(8, STEPS):
            second.step(step)
        assert_equal(second, whole)


def hand_over(one: LevelOptimizer, other: LevelOptimizer, how: str) -> None:
    if how == "named":
        other.load_named_state(
            {part: {name: tensor.clone() for name, tensor in each.items()} for part, each in one.named_state().items()}
        )
    else:
        other.load_state_dict(one.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_device_holds_less() -> None:
    def held(rest: int | None) -> tuple[int, Toy]:
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        toy = Toy(config(PERIODS, rest_from_period=rest), torch.float32, device="cuda")
        for step in range(1, STEPS):
            toy.step(step)
        return torch.cuda.memory_allocated() - start, toy

    less, mine = held(4)
    more, theirs = held(None)
    assert_equal(mine, theirs)
    assert less < more
    for name, parameter in mine.parameters.items():
        state = mine.optimizer.state[parameter]
        away = ".levels.2." in name or ".levels.3." in name
        assert state["exp_avg"].is_cuda != away
        assert state["exp_avg"].is_pinned() == away
        assert "accumulator" not in state or state["accumulator"].is_cuda
