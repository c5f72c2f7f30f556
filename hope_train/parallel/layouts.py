"""What a rank's tensors are parts of: DTensors over the mesh, made where the whole matters (checkpoints).

Training works on plain tensors. A parameter may be cut twice: by tensor parallelism along the dimension that the plan
says, and what is left of it into rows over the sharding group. So the dimensions of a DTensor's mesh are tp before
dp_shard: where both cut the rows, the first dimension of the mesh cuts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from hope_train.levels.optimizer import ACCUMULATOR
from hope_train.optim.matrices import WHOLE
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.sharded import ShardedData
from hope_train.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Layouts:
    """By parameter its whole shape, and the meshes over which it is cut."""

    shapes: Mapping[str, tuple[int, ...]]
    """In the unsharded model."""

    tensor_dims: Mapping[str, int | None]
    """The dimension divided over the tensor-parallel ranks; None: every rank has all of it."""

    tensor: DeviceMesh | None
    shard: DeviceMesh | None
    both: DeviceMesh | None
    """tp before dp_shard."""

    def wrap(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries of a checkpoint's set as parts of the whole: a parameter, or `optimizer.<key>.<parameter>`.

        They share the storage of what is given.
        """
        found = {}
        for name, tensor in tensors.items():
            key, parameter = parameter_of(name)
            # Besides what has a parameter's shape there are numbers and wholes: counters, and states of update rules.
            whole = tensor.ndim == 0 or (key is not None and key.startswith(WHOLE))
            if parameter not in self.shapes or whole:
                found[name] = tensor
            else:
                # What a rank collects for a slow level is of all rows.
                found[name] = self._wrap(parameter, tensor, in_rows=key != ACCUMULATOR)
        return found

    def _wrap(self, name: str, local: Tensor, in_rows: bool) -> Tensor:
        dim = self.tensor_dims.get(name)
        placements: list[Placement] = [] if dim is None else [Shard(dim)]
        rows = self.shard is not None and in_rows
        if rows:
            placements.append(Shard(0))
        mesh = self.shard if dim is None else self.both if rows else self.tensor
        if not placements or mesh is None:
            return local
        shape = self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        mesh = where_it_is(local, mesh)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def where_it_is(local: Tensor, mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks as a mesh of the device that a tensor is on. Moments may rest in host memory: over a mesh of GPUs
    DTensor would make a copy of them there, and what is read into a copy is lost.
    """
    if local.is_meta or local.device.type == mesh.device_type:
        return mesh
    groups = mesh.get_all_groups()
    if len(groups) == 1:
        return DeviceMesh.from_group(groups[0], local.device.type)
    return DeviceMesh.from_group(groups, local.device.type, mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def parameter_of(entry: str) -> tuple[str | None, str]:
    """`optimizer.exp_avg.blocks.0.…` -> ("exp_avg", "blocks.0.…"); a parameter's own name -> (None, itself)."""
    if entry.startswith("optimizer.") and entry.count(".") > 1:
        _, key, parameter = entry.split(".", 2)
        return key, parameter
    return None, entry


def layouts_of(mesh: Mesh, tensor: TensorParallel | None, sharded: ShardedData | None) -> Layouts | None:
    """The layouts of a model's parameters on a mesh; None where every rank has them whole."""
    if tensor is None and sharded is None:
        return None
    shapes: Mapping[str, tuple[int, ...]]
    if tensor is not None:
        shapes = {name: layout.shape for name, layout in tensor.layouts.items()}
    else:
        assert sharded is not None
        shapes = {name: held.shape for name, held in sharded.held.items()}
    return Layouts(
        shapes=shapes,
        tensor_dims={} if tensor is None else {name: layout.dim for name, layout in tensor.layouts.items()},
        tensor=None if tensor is None else mesh.parts("tp"),
        shard=None if sharded is None else mesh.parts("dp_shard"),
        both=None if tensor is None or sharded is None else mesh.parts("tp", "dp_shard"),
    )
