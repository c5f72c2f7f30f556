"""What a save has to write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_train.checkpoint.sets import accumulator_set, contents, contents_at, is_accumulator_set, plan_save

PERIODS = {"core": 1, "level_0": 1, "level_1": 4, "level_2": 16}


@pytest.mark.parametrize(
    ("last", "step", "written", "referred"),
    [
        # Nothing to rely on: everything is written.
        (None, 5, ["core", "level_0", "level_1", "level_1_accumulator", "level_2", "level_2_accumulator"], []),
        (None, 16, ["core", "level_0", "level_1", "level_2"], []),
        # Mid-period: the accumulators are all that is added to what has stepped.
        (4, 5, ["core", "level_0", "level_1_accumulator", "level_2_accumulator"], ["level_1", "level_2"]),
        (5, 6, ["core", "level_0", "level_1_accumulator", "level_2_accumulator"], ["level_1", "level_2"]),
        # A boundary of one level alone.
        (6, 8, ["core", "level_0", "level_1", "level_2_accumulator"], ["level_2"]),
        # A boundary in between counts too, although neither save is at one.
        (7, 9, ["core", "level_0", "level_1", "level_1_accumulator", "level_2_accumulator"], ["level_2"]),
        # A common multiple of all periods: full, and no accumulators.
        (12, 16, ["core", "level_0", "level_1", "level_2"], []),
        # An interval that no level's period is longer than: nothing is ever referred to.
        (16, 33, ["core", "level_0", "level_1", "level_1_accumulator", "level_2", "level_2_accumulator"], []),
        # No step was applied in between: only what counts as changed at any time.
        (5, 5, ["core", "level_1_accumulator", "level_2_accumulator"], ["level_0", "level_1", "level_2"]),
    ],
)
def test_by_hand(last: int | None, step: int, written: list[str], referred: list[str]) -> None:
    before = {} if last is None else contents_at(last, PERIODS)
    plan = plan_save(contents_at(step, PERIODS), before)
    assert list(plan.write) == written
    assert list(plan.refer) == referred


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 60), st.integers(0, 60))
def test_a_level_is_written_when_an_update_lies_between(periods: list[int], last: int, more: int) -> None:
    by_set = {"core": 1, **{f"level_{place}": period for place, period in enumerate(periods)}}
    step = last + more
    plan = plan_save(contents_at(step, by_set), contents_at(last, by_set))
    assert "core" in plan.write
    for name, period in by_set.items():
        if name != "core":
            due = any(number % period == 0 for number in range(last + 1, step + 1))
            assert (name in plan.write) == due
            assert (name in plan.refer) != due
        assert (accumulator_set(name) in plan.write) == (step % period != 0)
    assert not any(is_accumulator_set(name) for name in plan.refer)


def test_where_nothing_is_counted_everything_is_written() -> None:
    now = contents({"core": 3, "level_0": None}, {})
    assert plan_save(now, now).write == ("core", "level_0")
