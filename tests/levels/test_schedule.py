"""Who is due, and the learning rate of every update."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_train.config.train import ScheduleConfig
from hope_train.levels.schedule import LevelPlan, canonical_name, due, level_of, lr_at, set_name
from tests.levels.toy import BATCH_TOKENS, config

schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "constant", "wsd"]),
    warmup_tokens=st.just(0),
    min_ratio=st.floats(0.0, 1.0),
    decay_fraction=st.floats(0.0, 1.0),
)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("blocks.3.cms.levels.1.up.weight", 1),
        ("blocks.11.cms.levels.12.norm.weight", 12),
        ("cms.levels.0.up.weight", 0),
        ("embed.weight", None),
        ("blocks.3.cms.mix", None),
        ("blocks.3.cms.levels.weight", None),
        ("blocks.3.mixer.memory.levels.2.w1", None),
        ("blocks.3.notcms.levels.2.w1", None),
    ],
)
def test_level_of(name: str, level: int | None) -> None:
    assert level_of(name) == level


def test_names_of_sets() -> None:
    assert [set_name(None), set_name(0), set_name(12)] == ["core", "level_0", "level_12"]


def test_wrappers_leave_no_trace_in_names() -> None:
    assert canonical_name("_orig_mod.blocks.0._orig_mod.cms.levels.1.up.weight") == "blocks.0.cms.levels.1.up.weight"
    assert canonical_name("blocks.0._checkpoint_wrapped_module.mixer.w") == "blocks.0.mixer.w"
    assert canonical_name("blocks.0.my_orig_mod.w") == "blocks.0.my_orig_mod.w"


@given(period=st.integers(1, 64), steps=st.integers(0, 300))
def test_due_as_often_as_the_period_fits(period: int, steps: int) -> None:
    when = [step for step in range(1, steps + 1) if due(step, period)]
    assert len(when) == steps // period
    assert when == list(range(period, steps + 1, period))


@pytest.mark.parametrize(("step", "period"), [(0, 1), (-1, 1), (1, 0)])
def test_due_refuses_counts_below_one(step: int, period: int) -> None:
    with pytest.raises(ValueError, match="count from 1"):
        due(step, period)


@given(schedule=schedules, total=st.integers(0, 60), warmup=st.integers(0, 80))
def test_rate_rises_through_the_warmup_and_never_after(schedule: ScheduleConfig, total: int, warmup: int) -> None:
    factors = [lr_at(update, total, warmup, schedule) for update in range(1, total + warmup + 20)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    peak = max(1, warmup)
    assert factors[peak - 1] == 1.0, "the update that ends the warm-up has the full rate"
    assert factors[:warmup] == [update / warmup for update in range(1, warmup + 1)]
    after = factors[peak - 1 :]
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(after))
    assert factors[0] > 0.0, "the first update moves"


@given(schedule=schedules, total=st.integers(2, 1000), data=st.data())
def test_rate_ends_at_its_floor_and_stays(schedule: ScheduleConfig, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    decays = schedule.kind == "cosine" or (schedule.kind == "wsd" and total * (1.0 - schedule.decay_fraction) < total)
    floor = schedule.min_ratio if decays else 1.0
    if total > max(1, warmup):
        assert lr_at(total, total, warmup, schedule) == floor
        assert lr_at(total + 17, total, warmup, schedule) == floor


def test_cosine_by_hand() -> None:
    schedule = ScheduleConfig(kind="cosine", min_ratio=0.2)
    assert lr_at(5, 9, 1, schedule) == pytest.approx(0.6)
    assert lr_at(3, 9, 1, schedule) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)


def test_wsd_by_hand() -> None:
    schedule = ScheduleConfig(kind="wsd", min_ratio=0.0, decay_fraction=0.4)
    factors = [lr_at(update, 10, 2, schedule) for update in range(1, 11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_a_single_update_has_the_full_rate() -> None:
    assert lr_at(1, 1, 0, ScheduleConfig(kind="cosine", min_ratio=0.0)) == 1.0


def test_updates_count_from_one() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        lr_at(0, 10, 2, ScheduleConfig())


def test_plan_of_a_run() -> None:
    schedule = {"kind": "cosine", "warmup_tokens": 10 * BATCH_TOKENS - 1}
    levels: list[dict[str, Any]] = [{}, {"lr_scale": 3.0}, {"warmup_updates": 0}, {}]
    plan = LevelPlan.from_config(config([1, 4, 8, 64], steps=100, levels=levels, lr=0.5, schedule=schedule))
    assert [part.name for part in plan.sets] == ["core", "level_0", "level_1", "level_2", "level_3"]
    assert [part.level for part in plan.sets] == [None, 0, 1, 2, 3]
    assert [part.period for part in plan.sets] == [1, 1, 4, 8, 64]
    assert [part.lr for part in plan.sets] == [0.5, 0.5, 1.5, 0.5, 0.5]
    assert [part.warmup_updates for part in plan.sets] == [10, 10, 2, 0, 1]
    assert [part.total_updates for part in plan.sets] == [100, 100, 25, 12, 1]
    assert plan.due_sets(8) == ("core", "level_0", "level_1", "level_2")
    assert plan.due_sets(9) == ("core", "level_0")


def test_a_run_without_warmup_gives_its_levels_none() -> None:
    plan = LevelPlan.from_config(config([1, 4], schedule={"kind": "constant", "warmup_tokens": 0}))
    assert [part.warmup_updates for part in plan.sets] == [0, 0, 0]


def test_a_model_without_levels_is_all_core() -> None:
    plan = LevelPlan.from_config(config([]))
    assert [part.name for part in plan.sets] == ["core"]
    assert plan.due_sets(7) == ("core",)


def test_nested_resets_every_level_faster_than_the_slowest_due() -> None:
    plan = LevelPlan.from_config(config([1, 2, 4, 8], variant="nested"))
    resets = {step: plan.reset_sets(step) for step in range(1, 9)}
    assert resets[1] == ()
    assert resets[2] == resets[6] == ("level_0",)
    assert resets[4] == ("level_0", "level_1")
    assert resets[8] == ("level_0", "level_1", "level_2")
    assert plan.anchored_sets() == ("level_0", "level_1", "level_2")


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_other_variants_never_reset(variant: str) -> None:
    plan = LevelPlan.from_config(config([1, 2], variant=variant))
    assert plan.reset_sets(2) == plan.anchored_sets() == ()


def test_warnings_name_the_levels_that_cannot_learn() -> None:
    plan = LevelPlan.from_config(config([1, 8, 64], steps=40, levels=[{}, {"warmup_updates": 6}, {}]))
    lines = plan.warnings()
    assert len(lines) == 2
    assert "level_1 (period 8) makes 5 updates" in lines[0]
    assert "level_2 (period 64) makes no update" in lines[1]
    assert LevelPlan.from_config(config([1, 8], steps=40)).warnings() == []
