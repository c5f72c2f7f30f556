"""Places in a job step that srun started directly."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from hope_train.errors import UserError
from hope_train.parallel import slurm
from hope_train.parallel.slurm import adopt_step, first_node, rendezvous_port, tasks_of_node

# A task's environment, as Slurm 22.05.8 made it: two nodes, three tasks.
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[2-3]",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "address_of", lambda node: f"address of {node}")


def test_a_task_gets_the_variables_of_a_launcher() -> None:
    environ = dict(STEP)
    adopt_step(environ)
    assert {key: environ[key] for key in environ if key not in STEP} == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "address of n2",
        "MASTER_PORT": str(rendezvous_port(STEP)),
    }


@pytest.mark.parametrize(
    "more",
    [
        {"RANK": "0", "WORLD_SIZE": "8"},  # torchrun inside the step
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_what_a_launcher_says_stays(more: dict[str, str]) -> None:
    environ = STEP | more
    adopt_step(environ)
    assert environ == STEP | more


def test_a_batch_script_is_one_process_however_many_tasks_its_job_has() -> None:
    environ = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    before = dict(environ)
    adopt_step(environ)
    assert environ == before


def test_an_address_that_is_given_is_used() -> None:
    environ = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    adopt_step(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "7")


def test_all_tasks_agree_on_a_port_and_restarts_do_not_share_it() -> None:
    ports = {
        rendezvous_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)}, attempt)
        for job in (1, 2, 3)
        for restart in (0, 1, 2)
        for attempt in (0, 1)
    }
    assert len(ports) == 18
    assert all(slurm.PORTS[0] <= port < slurm.PORTS[1] for port in ports)


def test_equal_jobs_of_two_clusters_on_one_machine_do_not_meet() -> None:
    one, other = ({"SLURM_JOB_ID": "2", "SLURM_CLUSTER_NAME": name} for name in ("east", "west"))
    assert rendezvous_port(one) != rendezvous_port(other)
    assert slurm.PORTS[0] <= rendezvous_port(one) < slurm.PORTS[1]


@pytest.mark.parametrize(
    ("text", "counts"), [("1(x2)", [1, 1]), ("2(x2),1", [2, 2, 1]), ("8", [8]), ("4,2(x3)", [4, 2, 2, 2])]
)
def test_tasks_of_each_node(text: str, counts: list[int]) -> None:
    assert [tasks_of_node(text, node) for node in range(len(counts))] == counts


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[3-5,7],m1", "n3"), ("gpu-[08-10]-a", "gpu-08-a"), ("a1,b2", "a1")]
)
def test_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_without_an_address_there_is_no_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def say(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "NodeName=n2 State=IDLE\n", "")

    monkeypatch.setattr(subprocess, "run", say)
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        adopt_step(dict(STEP))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="the address of node n2 is not known"):
        adopt_step(dict(STEP))
