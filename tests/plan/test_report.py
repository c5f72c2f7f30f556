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
