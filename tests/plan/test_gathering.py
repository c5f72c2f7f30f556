"""Which levels stay gathered."""

from __future__ import annotations

import pytest

from hope_train.config.parallel import ParallelConfig
from hope_train.plan.gathering import kept_gathered

NUMBERS = {0: 100, 1: 200, 2: 300, 3: 400}
PERIODS = {0: 1, 1: 4, 2: 16, 3: 64}


def kept(numbers=None, periods=None, **parallel):
    return kept_gathered(numbers or NUMBERS, periods or PERIODS, ParallelConfig(dp_shard=2, **parallel))


def test_levels_of_period_one_are_never_kept():
    assert kept(keep_gathered="always") == (1, 2, 3)
    assert kept(keep_gathered="never") == ()


def test_without_shards_there_is_nothing_to_keep():
    assert kept_gathered(NUMBERS, PERIODS, ParallelConfig(keep_gathered="always")) == ()


@pytest.mark.parametrize(
    ("room", "expected"),
    [(8 * 900, (1, 2, 3)), (8 * 900 - 1, (2, 3)), (8 * 700, (2, 3)), (8 * 400, (3,)), (8 * 400 - 1, ()), (0, ())],
)
def test_auto_takes_the_slowest_first_while_room_lasts(room, expected):
    assert kept(keep_gathered_gib=room / 2**30) == expected


def test_a_level_that_does_not_fit_ends_it():
    """Not the largest set that fits: slower levels come first, whatever their size."""
    assert kept(numbers={1: 10, 2: 1000, 3: 10}, keep_gathered_gib=8 * 500 / 2**30) == (3,)


def test_of_equal_periods_the_later_level_comes_first():
    assert kept(periods={0: 1, 1: 4, 2: 4, 3: 4}, keep_gathered_gib=8 * 400 / 2**30) == (3,)


def test_levels_that_this_stage_does_not_hold_are_left_out():
    assert kept(numbers={1: 0, 2: 5, 3: 0}, keep_gathered="always") == (2,)
