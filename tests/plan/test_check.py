"""Dry runs: they agree with the plan, and say so when a plan is wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hope_train.config.load import load_config
from hope_train.plan.check import dry_run
from hope_train.plan.costs import make_plan
from hope_train.plan.report import plan_command

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs"
SMALL = ["model.n_layers=5", "model.vocab_size=1001", "train.micro_batch_size=1", "train.batch_tokens=65536"]


def plan_of(name, devices, *overrides):
    return make_plan(load_config(FOLDER / f"{name}.yaml", [*SMALL, *overrides]), devices=devices)


@pytest.mark.parametrize(
    ("devices", "overrides"),
    [
        (1, []),
        (2, ["parallel.tp=2"]),
        (6, ["parallel.dp_shard=3", "parallel.tp=2", "train.batch_tokens=98304"]),
        (8, ["parallel.pp=2", "parallel.dp_shard=2", "parallel.dp_replicate=2"]),
        (4, ["parallel.pp=2", "parallel.tp=2", "parallel.schedule=zbv", "parallel.layers_per_stage=[2,1,1,1]"]),
        (2, ["parallel.pp=2", "parallel.schedule=interleaved_1f1b"]),
        (2, ["parallel.pp=2", "model.tie_embeddings=false"]),
        (64, ["parallel.dp_shard=64"]),
        (2, ["parallel.tp=2", "optimizer.rest_from_period=4"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("name", ["hope_small", "transformer_pp_small"])
def test_small_meshes_hold_what_is_planned(name, devices, overrides):
    result = dry_run(plan_of(name, devices, *overrides))
    assert result.differences == ()
    assert result.tensors > 0
    assert "are those of the plan" in result.verdict


@pytest.mark.parametrize("rule", ["sgd", "muon", "m3", "delta_momentum", "deep_momentum", "dgd"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.dp_shard=3", "parallel.tp=2", "train.batch_tokens=98304"],
        ["parallel.pp=2", "parallel.dp_shard=3", "train.batch_tokens=98304"],
    ],
    ids=lambda value: "-".join(value[:2]),
)
def test_states_of_every_rule_are_what_is_planned(rule, overrides):
    result = dry_run(plan_of("hope_small", 6, f"optimizer.name={rule}", *overrides))
    assert result.differences == ()


def test_what_is_not_as_planned_is_named():
    plan = plan_of("hope_small", 4, "parallel.dp_shard=2", "parallel.tp=2")
    (rank,) = plan.ranks
    items = tuple(
        dataclasses.replace(item, bytes=item.bytes - 8) if item.name.startswith("AdamW") else item
        for item in rank.footprint.items
    )
    wrong = dataclasses.replace(rank, footprint=dataclasses.replace(rank.footprint, items=items))
    result = dry_run(dataclasses.replace(plan, ranks=(wrong,)))
    assert any("AdamW moments (fp32) take" in line for line in result.differences)
    assert "differences from the plan" in result.verdict

    shapes = dict(rank.share.shapes)
    shapes.pop("norm.weight")
    wrong = dataclasses.replace(rank, share=dataclasses.replace(rank.share, shapes=shapes))
    result = dry_run(dataclasses.replace(plan, ranks=(wrong,)))
    assert any("norm.weight" in line for line in result.differences)


def test_another_model_than_the_planned_one_is_found():
    plan = plan_of("hope_small", 4, "parallel.dp_shard=2", "parallel.tp=2")
    other = plan_of("hope_small", 4, "parallel.dp_shard=2", "parallel.tp=2", "model.cms.levels.2.width=320")
    result = dry_run(dataclasses.replace(plan, config=other.config))
    assert any("AdamW" in line or "parameters" in line for line in result.differences)


def test_hope_1b3_on_512_ranks(capsys):
    overrides = ["parallel.pp=4", "parallel.tp=8", "parallel.dp_shard=8", "train.micro_batch_size=1"]
    code = plan_command(str(FOLDER / "hope_1b3.yaml"), overrides, devices=512, as_json=True, with_dry_run=True)
    plan = json.loads(capsys.readouterr().out)
    assert code == 0
    assert plan["dry_run"]["differences"] == []
    assert plan["dry_run"]["ranks"] == 32
    assert plan["mesh"]["world"] == 512


def test_without_torch_it_is_said_what_to_install():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from hope_train import cli\n"
        f"sys.exit(cli.run(['plan', {str(FOLDER / 'hope_tiny.yaml')!r}, '--dry-run']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs torch" in done.stderr
    assert done.stderr.count("\n") == 1
