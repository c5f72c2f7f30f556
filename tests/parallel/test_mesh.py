"""This process's place in the mesh, from the environment that a launcher makes."""

from __future__ import annotations

import pytest
import torch

from hope_train.config.mesh import MeshSizes
from hope_train.errors import UserError
from hope_train.parallel.mesh import Mesh, open_mesh, own_gpu, process_rank, world_size
from tests.parallel import jobs
from tests.parallel.cases import make_config
from tests.parallel.harness import Gang

CPU = torch.device("cpu")


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert (process_rank(), world_size()) == (0, 1)
    mesh = open_mesh(make_config("hope"), CPU)
    assert mesh.sizes == MeshSizes()
    assert mesh.device_mesh is None
    assert mesh.group("tp") is None
    assert mesh.team.ranks == 1
    assert mesh.data_rank == 0
    assert not torch.distributed.is_initialized()


def test_half_an_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not: start with torchrun"):
        open_mesh(make_config("hope"), CPU)


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("RANK", "")])
def test_an_environment_that_is_no_launcher_s_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} in the environment is not a launcher's"):
        world_size(), process_rank()


def test_a_process_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="process 4 of this node has no GPU: there are 4"):
        own_gpu()


def test_neighbours_share_a_model(gang: Gang) -> None:
    places = gang.run(jobs.places, 4)
    assert places == [
        {"data": 0, "tp": 0, "tp group": [0, 1], "dp group": [0, 2], "shard group": None},
        {"data": 0, "tp": 1, "tp group": [0, 1], "dp group": [1, 3], "shard group": None},
        {"data": 1, "tp": 0, "tp group": [2, 3], "dp group": [0, 2], "shard group": None},
        {"data": 1, "tp": 1, "tp group": [2, 3], "dp group": [1, 3], "shard group": None},
    ]


def test_coordinates_count_shards_within_copies() -> None:
    class Placed(Mesh):
        def coordinate(self, dimension: str) -> int:
            return {"dp_replicate": 2, "dp_shard": 1}[dimension]

    assert Placed(MeshSizes(dp_replicate=3, dp_shard=4), CPU).data_rank == 9
