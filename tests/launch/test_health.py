"""Is a node fit to train on? Each part by itself, and what several reports say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.health import disk_problems, gpu_count, local_problems, sick_nodes, together_problem
from launch.site import Health


def problems(tmp_path: Path, gpus: int = 0, **rules: Any) -> list[str]:
    rules = {"disks": [str(tmp_path)], "min_disk_gib": 0, "min_memory_gib": 0, **rules}
    return list(local_problems(Health(**rules), gpus, tmp_path))


def test_a_healthy_node_has_nothing_to_say(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"min_memory_gib": 1e6}, "of memory free"),
        ({"min_disk_gib": 1e9}, "GiB free"),
        ({"disks": ["/proc/nowhere"]}, "No such file"),
        ({"command": "echo one; echo two; exit 4"}, "exit code 4: two"),
    ],
)
def test_each_lack_is_named(tmp_path: Path, rules: dict[str, Any], said: str) -> None:
    (problem,) = problems(tmp_path, **rules)
    assert said in problem


def test_a_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import launch.health as health

    real = health.time.time()
    monkeypatch.setattr(health.time, "time", lambda: real + 3600)
    (problem,) = problems(tmp_path)
    assert "its clock is +36" in problem


def test_gpus_are_counted_by_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nvidia-smi"
    file.write_text("#!/bin/bash\necho 'GPU 0: NVIDIA H100 (UUID: x)'\necho 'GPU 1: NVIDIA H100 (UUID: y)'\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_count() == 2
    assert problems(tmp_path, gpus=2) == []
    assert problems(tmp_path, gpus=8) == ["2 GPUs answer, 8 are wanted"]
    file.write_text("#!/bin/bash\necho 'GPU 0: NVIDIA H100'\nexit 1\n")  # a driver that is lost
    assert gpu_count() == 0
    file.unlink()
    assert gpu_count() == 0


def test_a_full_disk_says_the_system_s_word(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = disk_problems(tmp_path / "file" / "below", 0)
    assert "Not a directory" in problem


def reports(folder: Path, **nodes: tuple[list[str], str | None] | None) -> list[str]:
    for node, report in nodes.items():
        if report is not None:
            problems, together = report
            (folder / f"{node}.json").write_text(json.dumps({"problems": problems, "together": together}))
    return list(nodes)


def test_nodes_to_leave_out(tmp_path: Path) -> None:
    nodes = reports(tmp_path, a=([], "ok"), b=None, c=(["no disk"], "ok"), d=([], None), e=([], "all-reduce: lost"))
    assert sick_nodes(tmp_path, nodes) == {
        "b": "did not answer",
        "c": "no disk",
        "d": "did not come back from the all-reduce",
        "e": "all-reduce: lost",
    }


def test_where_nobody_came_back_nobody_is_to_blame(tmp_path: Path) -> None:
    nodes = reports(tmp_path, a=([], "all-reduce: timed out"), b=([], "all-reduce: timed out"))
    assert sick_nodes(tmp_path, nodes) == {}
    assert together_problem(tmp_path, nodes) == '["all-reduce: timed out"]'
    nodes = reports(tmp_path, a=([], "ok"), b=([], None))
    assert together_problem(tmp_path, nodes[:1]) is None
