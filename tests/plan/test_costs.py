"""The whole plan: verdicts, suggestions, speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hope_train.config.load import load_config
from hope_train.errors import UserError
from hope_train.plan.costs import make_plan
from hope_train.plan.devices import GIB

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


@pytest.mark.parametrize(
    ("device", "devices", "overrides", "word"),
    [
        ("rtx4090", 8, [], "parallel.dp_shard="),
        ("l4", 2, ["train.micro_batch_size=1"], "parallel.tp=2"),
        ("a100-40", 16, ["parallel.pp=2", "parallel.schedule=gpipe", "train.micro_batch_size=2"], "1f1b"),
        ("rtx4090", 4, ["parallel.dp_replicate=4", "train.micro_batch_size=1"], "parallel.dp_replicate=1"),
    ],
    ids=str,
)
def test_suggestions_for_a_mesh_do_what_they_say(device, devices, overrides, word):
    path, given = FOLDER / "hope_1b3.yaml", [*overrides, "train.recompute=true"]
    if word == "1f1b":
        given[-1] = "train.recompute=false"
    plan = make_plan(load_config(path, given), device, devices)
    assert not plan.fits
    (line,) = plan.suggestions
    words, needs = re.fullmatch(r"try (.+), which needs ([\d.]+) GiB", line).groups()
    if word != "1f1b":
        assert word in words
    better = make_plan(load_config(path, [*given, *words.split()]), device, devices)
    assert better.fits
    assert better.footprint.peak / 2**30 == pytest.approx(float(needs), abs=0.06)


def test_the_verdict_names_the_fullest_stage():
    config = load_config(FOLDER / "hope_1b3.yaml", ["parallel.pp=4", "train.micro_batch_size=4"])
    plan = make_plan(config, "h200", 4)
    assert plan.verdict.startswith(f"fits: pipeline rank {plan.fullest.share.rank} needs ")
    assert plan.footprint.peak == max(rank.footprint.peak for rank in plan.ranks)


def test_a_slower_network_is_never_faster():
    config = load_config(FOLDER / "transformer_pp_1b3.yaml", ["parallel.dp_shard=16", "train.micro_batch_size=8"])
    rates = [
        make_plan(config, "h100", 16, interconnect=name).speed.tokens_per_s
        for name in ("ethernet-25", "ethernet-100", "ib-hdr", "ib-ndr", "ib-xdr", "nvl72")
    ]
    assert rates == sorted(rates)
    assert rates[0] < 0.8 * rates[-1]
    assert make_plan(config, "h100", 16, interconnect="ethernet-25").speed.bound == "communication"


def test_unbalanced_stages_are_slower():
    path = FOLDER / "hope_760m.yaml"
    base = ["parallel.pp=2", "train.micro_batch_size=4"]
    even, uneven = (
        make_plan(load_config(path, [*base, *more]), "h200", 2) for more in ([], ["parallel.layers_per_stage=[18,6]"])
    )
    assert even.speed.tokens_per_s > uneven.speed.tokens_per_s
    assert max(rank.cost for rank in even.ranks) < 1.05 < max(rank.cost for rank in uneven.ranks)
    assert sum(rank.cost for rank in uneven.ranks) == pytest.approx(2)


def test_too_few_micro_batches_are_warned_of():
    config = load_config(FOLDER / "hope_1b3.yaml", ["parallel.pp=4", "parallel.schedule=gpipe"])
    assert any("cannot fill 4 pipeline parts" in line for line in make_plan(config, "h200", 32).warnings)


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


def test_a_cpu_launches_nothing_and_has_the_memory_of_this_machine(monkeypatch):
    monkeypatch.setattr("hope_train.plan.devices.memory_bytes", lambda: 48 * GIB)
    small = ["model.d_model=32", "model.n_heads=2", "train.micro_batch_size=1"]
    cpu = make_plan(load_config(FOLDER / "hope_tiny.yaml", small), "cpu")
    assert cpu.speed.bound == "operator calls"
    assert not [line for line in (*cpu.warnings, *cpu.speed.assumptions) if "launch" in line]
    assert "memory is this machine's (48.0 GiB for each of 1)" in cpu.speed.assumptions
    assert "a cpu has 48" in cpu.verdict


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
