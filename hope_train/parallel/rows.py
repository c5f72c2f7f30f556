"""What data-parallel ranks have collected in mid-period, each for itself, as rows of one tensor in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hope_train.parallel.mesh import Mesh
from hope_train.parallel.plan import part_of
from hope_train.parallel.tensor import Layout, TensorParallel

_OF_ROWS = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Rows:
    """A row per data-parallel rank: [R, *shape of the whole], as one tensor over all ranks that hold parts of it.

    Their sum over R is what all have collected together. A plain tensor per rank would not do: the checkpoint library
    takes tensors of one name for copies of each other, and writes one of them.
    """

    mesh: Mesh
    tensor: TensorParallel | None = None

    def mine(self, rows: int) -> range:
        """Which of `rows` rows this rank reads: each row is some rank's, ranks beyond the rows have none."""
        first, count = 0, rows
        for dimension in _OF_ROWS:  # as DTensor divides one dimension over two of the mesh, one after the other
            part = part_of(count, self.mesh.coordinate(dimension), getattr(self.mesh.sizes, dimension))
            first, count = first + part.start, len(part)
        return range(first, first + count)

    def wrap(self, parameter: str, mine: Tensor, rows: int) -> Tensor:
        """This rank's rows [r, *shape of its part of `parameter`] as a part of all `rows` rows of the whole."""
        if self.mesh.device_mesh is None:
            return mine
        whole = Layout(tuple(mine.shape[1:]), None) if self.tensor is None else self.tensor.layouts[parameter]
        shape = torch.Size((rows, *whole.shape))
        placements: list[Placement] = [Shard(0), Shard(0), Replicate() if whole.dim is None else Shard(1 + whole.dim)]
        return DTensor.from_local(
            mine,
            self.mesh.device_mesh[(*_OF_ROWS, "tp")],
            placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
