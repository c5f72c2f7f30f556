"""How many nodes and ranks a start uses: all it was given, or as many as the batch can be divided among."""

from __future__ import annotations

from dataclasses import dataclass

from hope_train.config.mesh import MeshSizes, resolve_mesh
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError


@dataclass(frozen=True)
class Layout:
    """`nodes` nodes of `ranks_per_node` ranks each."""

    nodes: int
    ranks_per_node: int
    sizes: MeshSizes

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.ranks_per_node


def fixed_layout(config: RunConfig, nodes: int, ranks_per_node: int) -> Layout:
    """All of `nodes` nodes, each with all of its ranks. Raises UserError where the mesh does not fit them."""
    return Layout(nodes, ranks_per_node, resolve_mesh(config, nodes * ranks_per_node))


def elastic_layout(config: RunConfig, nodes: int, ranks_per_node: int) -> Layout:
    """The largest layout that fits `nodes` nodes of `ranks_per_node` ranks: pp, dp_shard and tp stay, and dp_replicate
    is the largest that divides the batch. Tokens per step stay as they are, so data and schedule do too.

    Of equally large ones, that on the fewest nodes. Raises UserError where not even one copy of the model fits.
    """
    choices = sorted(
        ((used * ranks, used, ranks) for used in range(1, nodes + 1) for ranks in range(1, ranks_per_node + 1)),
        key=lambda choice: (-choice[0], choice[1]),
    )
    if isinstance(config.parallel.dp_replicate, int):
        config = config.model_copy(
            update={"parallel": config.parallel.model_copy(update={"dp_replicate": "auto"})},
        )
    first: UserError | None = None
    for _, used, ranks in choices:
        if config.parallel.tp <= ranks_per_node and ranks % config.parallel.tp and used > 1:
            continue  # tensor-parallel ranks stay on one node
        try:
            return Layout(used, ranks, resolve_mesh(config, used * ranks))
        except UserError as error:
            first = first or error
    raise first or UserError("no node is left")
