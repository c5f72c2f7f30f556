"""`hope plan` on the shipped configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hope_train.errors import UserError
from hope_train.plan.report import plan_command

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_can_be_planned(path, capsys):
    assert plan_command(str(path), [], "h200", 1, as_json=True) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["name"] == path.stem
    assert plan["fits"] is True
    assert plan["parameters"]["total"] == sum(plan["parameters"]["components"].values())
    lasting = sum(item["bytes"] for item in plan["memory"]["items"] if not item["transient"])
    assert plan["memory"]["peak_bytes"] > lasting
    assert plan["speed"]["assumptions"]


def test_tables(capsys):
    assert plan_command(str(FOLDER / "hope_tiny.yaml"), ["train.recompute=true"], "cpu") == 0
    output = capsys.readouterr().out
    pieces = "memory initial states|cms level 3|multiply-add = 2|recomputation|tokens/s|assumed|fits:"
    for piece in pieces.split("|"):
        assert piece in output


def test_tables_say_what_does_not_fit(capsys):
    assert plan_command(str(FOLDER / "hope_1b3.yaml"), [], "rtx4090") == 0
    assert "does not fit: needs" in capsys.readouterr().out


MESH = ["parallel.pp=2", "parallel.tp=2", "parallel.dp_shard=2", "train.micro_batch_size=4"]


def test_a_mesh_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert plan_command(str(FOLDER / "hope_340m.yaml"), MESH, "h200", 16) == 0
    output = " ".join(capsys.readouterr().out.split())
    pieces = "mesh pp 2 x dp_replicate 2 x dp_shard 2 x tp 2|dp gather: level_3|2104.04473|exposed|with all periods 1"
    for piece in pieces.split("|"):
        assert piece in output, piece


def test_a_mesh_in_json(capsys):
    assert plan_command(str(FOLDER / "hope_340m.yaml"), MESH, "h200", 16, as_json=True, interconnect="ib-xdr") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["mesh"] == {
        "pp": 2,
        "dp_replicate": 2,
        "dp_shard": 2,
        "tp": 2,
        "world": 16,
        "micro_batches": 8,
        "interconnect": "nvlink4+ib-xdr",
    }
    assert [rank["layers"] for rank in plan["ranks"]] == [12, 12]
    assert [rank["in_flight"] for rank in plan["ranks"]] == [2, 1]
    assert [rank["kept_gathered"] for rank in plan["ranks"]] == [[1, 2, 3]] * 2
    assert plan["memory"]["peak_bytes"] == max(rank["peak_bytes"] for rank in plan["ranks"])
    assert {flow["kind"] for flow in plan["ranks"][0]["communication"]} == {"sequence", "pp", "dp reduce", "dp gather"}
    speed = plan["speed"]
    parts = ("busy_seconds", "bubble_seconds", "exposed_communication_seconds")
    assert speed["step_seconds"] == pytest.approx(sum(speed[part] for part in parts))
    assert speed["bubble_seconds"] == pytest.approx(speed["busy_seconds"] / 8)
    assert plan["pipeline"]["bubble_share"] == pytest.approx(1 / 9)


def test_a_growing_batch_counts_each_of_its_steps(capsys):
    ramp = ["train.batch_ramp.start_tokens=131072", "train.batch_ramp.increment_tokens=131072"]
    words = [*MESH, "train.tokens=1e9", *ramp, "train.batch_ramp.over_tokens=2e8"]
    assert plan_command(str(FOLDER / "hope_340m.yaml"), words, "h200", 16, as_json=True) == 0
    plan = json.loads(capsys.readouterr().out)
    days, tokens, steps = 0.0, 0, 0
    for entry in plan["batches"]:
        alone = [*MESH, f"train.tokens={entry['tokens'] * entry['steps']}", f"train.batch_tokens={entry['tokens']}"]
        assert plan_command(str(FOLDER / "hope_340m.yaml"), alone, "h200", 16, as_json=True) == 0
        part = json.loads(capsys.readouterr().out)
        assert part["steps"] == entry["steps"]
        days, steps = days + part["speed"]["days"], steps + entry["steps"]
        tokens += entry["tokens"] * entry["steps"]
    assert [entry["tokens"] for entry in plan["batches"]] == list(range(131072, 524289, 131072))
    assert plan["speed"]["days"] == pytest.approx(days)
    assert plan["speed"]["tokens_per_s"] == part["speed"]["tokens_per_s"], "of a full batch"
    assert plan["steps"] == steps
    assert 1e9 <= tokens < 1e9 + plan["batches"][-1]["tokens"]
    assert plan_command(str(FOLDER / "hope_340m.yaml"), words, "h200", 16) == 0
    assert "batches grow from 131,072 to 524,288 tokens" in " ".join(capsys.readouterr().out.split())


def test_one_device_shows_no_mesh(capsys):
    assert plan_command(str(FOLDER / "hope_tiny.yaml"), [], "cpu") == 0
    assert "mesh" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "devices", "message"),
    [
        (["parallel.tp=3"], 3, r"model\.n_heads=16 .*parallel\.tp=3"),
        (["parallel.pp=3"], 8, r"8 ranks cannot be divided by .*= 3"),
        (["parallel.pp=2", "parallel.layers_per_stage=[20,5]"], 2, r"holds 25 layers, model\.n_layers is 24"),
        (["parallel.dp_replicate=3"], 4, r"start 3 processes"),
        (["parallel.pp=16"], 16, r"parallel\.schedule=1f1b cannot run 8 micro-batches"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(overrides, devices, message):
    with pytest.raises(UserError, match=message) as error:
        plan_command(str(FOLDER / "hope_340m.yaml"), overrides, "h200", devices)
    assert "\n" not in str(error.value)


def test_errors_are_one_line():
    with pytest.raises(UserError, match="did you mean h200"):
        plan_command(str(FOLDER / "hope_tiny.yaml"), [], "h2000")
    with pytest.raises(UserError, match=r"hope_tiny\.yaml"):
        plan_command(str(FOLDER / "hope_tinny.yaml"), [])
    with pytest.raises(UserError, match="d_model"):
        plan_command(str(FOLDER / "hope_tiny.yaml"), ["model.d_modle=3"])


def test_neither_plan_nor_report_imports_torch():
    code = "import sys, hope_train.plan.report, hope_train.report.draw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
