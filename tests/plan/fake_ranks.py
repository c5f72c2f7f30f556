"""One process that takes the place of any rank of a large mesh (torch's fake process group)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hope_train.parallel.dry_run import fake_group
from hope_train.parallel.mesh import DIMENSIONS


@contextmanager
def fake_mesh(shape: tuple[int, int, int, int], rank: int = 0) -> Iterator[DeviceMesh]:
    """The mesh as rank `rank` sees it; collectives return at once and leave their results undefined."""
    with fake_group(rank, math.prod(shape)):
        yield init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
