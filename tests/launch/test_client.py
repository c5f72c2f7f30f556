"""The client against a real controller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.client import Slurm, SlurmError
from scripts.slurm_bench import Cluster

SLEEP = "#!/bin/bash\nexec sleep 600\n"


@pytest.fixture
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("script") / "sleep.sh"
    file.write_text(SLEEP)
    return str(file)


@pytest.fixture(autouse=True)
def settled(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.settle()


def test_partitions_and_nodes(cluster: Cluster) -> None:
    found = {partition.name: partition for partition in cluster.slurm.partitions()}
    assert found["train"].default
    assert found["train"].nodes == ("n1", "n2", "n3", "n4")
    assert found["train"].max_time_s == 7 * 86400
    assert found["short"].nodes == ("n1",)
    nodes = cluster.slurm.nodes("n[1-2]")
    assert [(node.name, node.address, node.gpus, node.cpus) for node in nodes] == [
        ("n1", "127.0.0.1", 8, 64),
        ("n2", "127.0.0.1", 8, 64),
    ]


@pytest.mark.slow
def test_a_job_from_queue_to_cancel(cluster: Cluster, script: str) -> None:
    slurm = cluster.slurm
    assert "to start at" in slurm.test(script)
    options = ("-o", "/dev/null", "-t", "5", "-J", "a b|c", "--comment=hope:/x=y")
    job = slurm.submit(script, *options)
    running = slurm.wait_state(job, {"RUNNING"}, 30)
    assert running is not None
    assert (running.state, running.limit_s, running.name, running.comment) == ("RUNNING", 300, "a b|c", "hope:/x=y")
    (queued,) = slurm.queue([job, "99999"])
    assert (queued.id, queued.state, queued.name) == (job, "RUNNING", "a b|c")
    assert slurm.steps(job).keys() <= {"batch"}
    slurm.requeue(job)
    waiting = slurm.wait_state(job, {"PENDING"}, 30)
    assert waiting is not None
    assert waiting.restarts == 1
    slurm.update(job, ExcNodeList="n1,n2")
    again = slurm.wait_state(job, {"RUNNING"}, 60)
    assert again is not None
    assert again.node_list == "n3"
    slurm.cancel(job)
    ended = slurm.wait_state(job, {"CANCELLED"}, 30)
    assert ended is not None
    assert not ended.active
    assert slurm.queue([job]) == []
    assert slurm.accounts([job]) == []  # there is no accounting here


def test_json_and_plain_formats_say_the_same(cluster: Cluster, script: str) -> None:
    job = cluster.slurm.submit(script, "-o", "/dev/null", "-t", "5", "-N2", "-J", "twice")
    plain = cluster.slurm.wait_state(job, {"RUNNING"}, 30)
    other = Slurm(30.0, json=True).job(job)
    assert plain is not None
    assert other is not None
    for name in ("id", "state", "name", "partition", "nodes", "node_list", "restarts", "limit_s", "start", "end"):
        assert getattr(plain, name) == getattr(other, name), name
    assert Slurm(30.0, json=True).job("99999") is None


def test_what_is_not_there(cluster: Cluster, script: str) -> None:
    assert cluster.slurm.job("99999") is None
    with pytest.raises(SlurmError, match=r"Slurm refuses \(sbatch\): .*nvalid partition"):
        cluster.slurm.submit(script, "-p", "nowhere")
    with pytest.raises(SlurmError, match="refuses"):
        cluster.slurm.requeue("99999")
