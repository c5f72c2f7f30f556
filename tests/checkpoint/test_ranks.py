"""With a process group: two ranks write one checkpoint, one process reads it, and the other way round."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.store import load_state
from tests.checkpoint.toy import assert_equal, blank, make_state, names, save_steps
from tests.checkpoint.toy_levels import level_state, load_levels

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import errno, faulthandler, sys
faulthandler.dump_traceback_later(90, exit=True)
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from hope_train.checkpoint import writer as module
from hope_train.checkpoint.fence import Fence
from hope_train.checkpoint.manifest import verify
from hope_train.checkpoint.store import load_state
from hope_train.checkpoint.writer import CheckpointWriter, SaveError
from tests.checkpoint.toy import blank, facts, make_state
from tests.checkpoint.toy_levels import level_state

run_dir = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))

def spread(state):
    placed = {}
    for name, part in state.items():
        placed[name] = {}
        for key, tensor in part.items():
            placement = Shard(0) if tensor.ndim else Replicate()
            placed[name][key] = distribute_tensor(tensor, mesh, [placement])
    return placed

ids = [Fence.take(run_dir).id if rank == 0 else None]
dist.broadcast_object_list(ids)
writer = CheckpointWriter(Fence(run_dir, ids[0]), 99, async_save=True)

# Read what one process wrote, sharded over two.
state = spread(blank(make_state(1)))
folder = run_dir / "checkpoints" / "step_00000001"
load_state(folder, verify(folder), state)
for name, part in make_state(1).items():
    for key, tensor in part.items():
        assert torch.equal(state[name][key].full_tensor(), tensor), key

writer.save(spread(make_state(2)), facts(2))
writer.save(spread(make_state(3)), facts(3), wait=False)
writer.finish()

# Levels at their own frequencies: all ranks agree on what is written and what is referred to.
run_of_levels = run_dir / "levels"
ids_of_levels = [Fence.take(run_of_levels).id if rank == 0 else None]
dist.broadcast_object_list(ids_of_levels)
levels = CheckpointWriter(Fence(run_of_levels, ids_of_levels[0]), 1, async_save=True)
levels.reserve(spread(level_state(0)))
for step in (104, 105, 106, 107):
    live = spread(level_state(step))
    levels.save(live, facts(step), wait=step % 2 == 0)
    for part in live.values():
        for tensor in part.values():
            tensor.zero_()  # the next step, on every rank
levels.finish()
state = spread(level_state(0))
folder = run_of_levels / "checkpoints" / "step_00000107"
load_state(folder, verify(folder), state)
for name, part in level_state(107).items():
    for key, tensor in part.items():
        assert torch.equal(state[name][key].full_tensor(), tensor), key

# One rank's disk is full: every rank hears of it, and nothing is published.
write = module.save_set
if rank == 1:
    def save_set(folder, tensors, group):
        write(folder, tensors, group)
        if folder.name == "core":
            raise OSError(errno.ENOSPC, "No space left on device")
    module.save_set = save_set
try:
    writer.save(spread(make_state(4)), facts(4))
except SaveError as error:
    assert "No space left" in str(error), error
else:
    raise AssertionError("published")
module.save_set = write
writer.save(spread(make_state(5)), facts(5))
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.timeout(150)
def test_two_ranks(tmp_path: Path) -> None:
    save_steps(tmp_path, [1]).fence.release()
    (tmp_path / "levels").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **together, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003", "step_00000005"]
    for step in (2, 3, 5):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        manifest = verify(folder)
        assert "__1_0.distcp" in manifest.sets["core"].files
        state = blank(make_state(step))
        load_state(folder, manifest, state)
        assert_equal(state, make_state(step))
    folder = tmp_path / "levels" / "checkpoints" / "step_00000107"
    assert {name: part.step for name, part in verify(folder).sets.items()} == {
        "core": 107,
        "level_0": 107,
        "level_1": 106,
        "level_1_accumulator": 107,
        "level_2": 104,
        "level_2_accumulator": 107,
    }
    assert_equal(load_levels(folder, 107), level_state(107))
    assert torch.distributed.is_initialized() is False
