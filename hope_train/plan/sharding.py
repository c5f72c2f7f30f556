"""Which part of every parameter a rank holds, from names and shapes alone (no torch).

Tensor parallelism splits by the declarative plan (`hope_train.parallel.plan`); FSDP2 then splits what is left along the
first dimension and pads it to equal rows. Sizes are those of the first rank, which holds most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.parallel.plan import local_shape
from hope_train.plan.parameters import Shape, parameter_shapes
from hope_train.plan.stages import part_count, parts_of_rank, stage_layers


def padded_shard(shape: Shape, ranks: int) -> int:
    """Numbers in one rank's FSDP2 shard of a parameter: its first dimension cut into `ranks`, rounded up."""
    return math.prod(shape) if ranks == 1 else -(-shape[0] // ranks) * math.prod(shape[1:])


@dataclass(frozen=True)
class RankShare:
    """What the ranks at one place of the pipeline hold."""

    rank: int
    """Place in the pipeline (coordinate along pp)."""

    parts: tuple[tuple[int, int], ...]
    """(number of the part, its layers), in the order of the layers."""

    shapes: dict[str, Shape]
    """Names and local shapes after tensor parallelism, before sharding. A tied matrix is on the first and last part."""

    has_embedding: bool
    has_head: bool

    @property
    def layers(self) -> int:
        """Layers of all its parts."""
        return sum(layers for _, layers in self.parts)


def rank_shares(config: RunConfig, mesh: MeshSizes) -> tuple[RankShare, ...]:
    """The share of every pipeline rank. Raises UserError for stages that do not fit the layers."""
    model, parallel = config.model, config.parallel
    layers, parts = stage_layers(config), part_count(parallel)
    every = {name: local_shape(name, shape, 0, mesh.tp) for name, shape in parameter_shapes(model).items()}
    shares = []
    for rank in range(mesh.pp):
        held = parts_of_rank(rank, parallel)
        numbers = {str(block) for part in held for block in range(sum(layers[:part]), sum(layers[: part + 1]))}
        first, last = 0 in held, parts - 1 in held
        roots = {"embed": first or (last and model.tie_embeddings), "norm": last, "head": last}
        shapes = {}
        for name, shape in every.items():
            root, number = name.split(".")[:2]
            if number in numbers if root == "blocks" else roots[root]:
                shapes[name] = shape
        shares.append(RankShare(rank, tuple((part, layers[part]) for part in held), shapes, first, last))
    return tuple(shares)
