"""One process that takes the place of any rank of a large mesh (torch's fake process group), and counts exchanges."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from hope_train.parallel.dry_run import fake_group
from hope_train.parallel.mesh import DIMENSIONS

OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


@contextmanager
def fake_mesh(shape: tuple[int, int, int, int], rank: int = 0) -> Iterator[DeviceMesh]:
    """The mesh as rank `rank` sees it; collectives return at once and leave their results undefined."""
    with fake_group(rank, math.prod(shape)):
        yield init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)


class CountCollectives(TorchDispatchMode):
    """Bytes and calls by operation: the whole tensor that a collective makes or takes. Norms are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            assert name in OPERATIONS, f"{name} is not counted"
            tensors = [tensor for part in args[:2] for tensor in (part if isinstance(part, list) else [part])]
            sizes = [tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)]
            if tensors[0].dtype == torch.float64:  # norms of fp32 gradients
                return func(*args, **(kwargs or {}))
            self.bytes[OPERATIONS[name]] += max(sizes)
            self.calls[OPERATIONS[name]] += 1
        return func(*args, **(kwargs or {}))
