"""The whole plan: verdicts, suggestions, speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hope_train.config.load import load_config
from hope_train.errors import UserError
from hope_train.plan.costs import make_plan

FOLDER = Path(__file__).resolve().parents[2] / "configs"


def test_hope_1b3_fits_an_h200():
    plan = make_plan(load_config(FOLDER / "hope_1b3.yaml"), "h200", 8)
    assert plan.fits
    assert plan.verdict.startswith("fits: needs ")
    assert plan.suggestions == ()
    json.dumps(plan.to_dict())


@pytest.mark.parametrize(
    ("name", "device", "overrides"),
    [
        ("hope_1b3", "h100", ["train.recompute=false", "model.memory.save_every=1"]),
        ("hope_340m", "rtx4090", ["train.recompute=false"]),
        ("transformer_pp_1b3", "a100-40", ["train.recompute=false"]),
        ("hope_small", "l4", ["train.context_length=8192", "train.batch_tokens=65536"]),
    ],
)
def test_suggestions_do_what_they_say(name, device, overrides):
    path = FOLDER / f"{name}.yaml"
    plan = make_plan(load_config(path, overrides), device)
    assert not plan.fits
    assert re.fullmatch(r"does not fit: needs [\d.]+ GiB, an? \S+ has \d+ \([\d.]+ usable\)", plan.verdict)
    (line,) = plan.suggestions
    words, needs = re.fullmatch(r"try (.+), which needs ([\d.]+) GiB", line).groups()
    better = make_plan(load_config(path, [*overrides, *words.split()]), device)
    assert better.fits
    assert better.footprint.peak / 2**30 == pytest.approx(float(needs), abs=0.06)


def test_a_model_too_large_is_said_to_be():
    plan = make_plan(load_config(FOLDER / "hope_1b3.yaml"), "rtx4090")
    assert not plan.fits
    assert any("more memory" in line for line in plan.suggestions)


def test_more_devices_are_faster_by_less_than_their_number_and_hold_the_same():
    config = load_config(FOLDER / "hope_760m.yaml")
    one, four = make_plan(config, "h200", 1), make_plan(config, "h200", 4)
    assert 3 * one.speed.tokens_per_s < four.speed.tokens_per_s < 4 * one.speed.tokens_per_s
    assert one.speed.exposed_seconds == 0 < four.speed.exposed_seconds
    assert four.speed.days == pytest.approx(one.speed.days * one.speed.tokens_per_s / four.speed.tokens_per_s)
    lasting = [[item for item in plan.footprint.items if not item.transient] for plan in (one, four)]
    assert lasting[0] == lasting[1]


def test_given_mfu_is_the_plain_formula():
    config = load_config(FOLDER / "transformer_pp_1b3.yaml")
    plan = make_plan(config, "h100", mfu=0.5)
    assert plan.speed.tokens_per_s == pytest.approx(0.5 * 989.5e12 / plan.flops.training)
    assert plan.speed.mfu == pytest.approx(0.5)
    assert plan.speed.days == pytest.approx(100e9 / plan.speed.tokens_per_s / 86400, rel=1e-4)
    two = make_plan(config, "h100", 2, mfu=0.5)
    assert 1.5 * plan.speed.tokens_per_s < two.speed.tokens_per_s < 2 * plan.speed.tokens_per_s


def test_compiling_the_memories_helps_where_launches_bound_the_speed():
    plain, compiled = (
        make_plan(load_config(FOLDER / "hope_1b3.yaml", [f"train.compile={mode}", "train.micro_batch_size=4"]), "h200")
        for mode in ("none", "memory")
    )
    assert plain.speed.bound == "kernel launches"
    assert any("kernel launches" in line for line in plain.warnings)
    assert compiled.speed.tokens_per_s > plain.speed.tokens_per_s


@pytest.mark.parametrize("device", ["b200", "h100", "a100-80", "l40s"])
def test_a_faster_device_is_never_slower(device):
    config = load_config(FOLDER / "transformer_pp_340m.yaml")
    assert make_plan(config, "l4").speed.tokens_per_s < make_plan(config, device).speed.tokens_per_s


def test_levels_that_never_step_are_warned_of():
    config = load_config(FOLDER / "hope_tiny.yaml", ["train.tokens=20000"])
    assert any("level_3" in line for line in make_plan(config, "cpu").warnings)


def test_levels_count_their_updates():
    config = load_config(FOLDER / "hope_340m.yaml")
    levels = make_plan(config).levels
    assert [level.updates for level in levels] == [config.train.total_steps // period for period in (1, 4, 16, 64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"devices": 7}, "7 data-parallel ranks"), ({"devices": 0}, "at least 1"), ({"mfu": 1.5}, "mfu")],
)
def test_bad_questions(options, message):
    with pytest.raises(UserError, match=message):
        make_plan(load_config(FOLDER / "hope_1b3.yaml"), "h200", **options)
