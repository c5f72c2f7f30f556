"""The plan against the ranks of its mesh, built one after the other without storage (`hope plan --dry-run`).

Importing this module needs no torch; running the check does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from hope_train.errors import UserError
from hope_train.parallel.plan import local_shape
from hope_train.plan.costs import Plan
from hope_train.plan.footprint import state_item
from hope_train.plan.parameters import parameter_shapes
from hope_train.plan.sharding import padded_shard

if TYPE_CHECKING:
    from hope_train.parallel.dry_run import Held

SHOWN = 5
"""Differences that are printed."""


@dataclass(frozen=True)
class DryRun:
    """What came of it."""

    ranks: int
    """Built; the others of the mesh hold what one of these holds."""

    tensors: int
    """Compared, over all ranks that were built."""

    seconds: float
    differences: tuple[str, ...]
    """One line each; empty when plan and model agree."""

    @property
    def verdict(self) -> str:
        """One line."""
        built = (
            f"dry run: {self.ranks} ranks built on the meta device in {self.seconds:.1f} s, {self.tensors:,} tensors"
        )
        if not self.differences:
            return f"{built}: shapes, shards and bytes are those of the plan"
        return f"{built}: {len(self.differences)} differences from the plan"


def dry_run(plan: Plan) -> DryRun:
    """Build the first and the last rank of every dimension at every place of the pipeline, and compare.

    Ranks in between hold what the first one holds, or less where a dimension does not divide evenly. Raises UserError
    without torch.
    """
    try:
        from hope_train.parallel.dry_run import build_ranks
    except ModuleNotFoundError as error:
        raise UserError(f"--dry-run builds the model and needs {error.name}: pip install -e '.[train]'") from error
    start, mesh = time.perf_counter(), plan.mesh
    replicas, shards, parts = ({0, size - 1} for size in (mesh.dp_replicate, mesh.dp_shard, mesh.tp))
    places = sorted(product(range(mesh.pp), replicas, shards, parts))
    tensors, differences = 0, []
    for held in build_ranks(plan.config, mesh, places):
        tensors += len(held.shapes)
        differences += list(_compare(plan, held))
    return DryRun(len(places), tensors, time.perf_counter() - start, tuple(differences))


def _compare(plan: Plan, held: Held) -> Iterator[str]:
    pp, _, _, tp = held.place
    rank, mesh = plan.ranks[pp], plan.mesh
    whole = parameter_shapes(plan.config.model)
    where = f"rank {held.place} of (pp, dp_replicate, dp_shard, tp)"
    if held.shapes.keys() != rank.share.shapes.keys():
        odd = sorted(held.shapes.keys() ^ rank.share.shapes.keys())
        yield f"{where}: {odd[0]} and {len(odd) - 1} others are only in one of plan and model"
        return
    for name, shape in held.shapes.items():
        expected = local_shape(name, whole[name], tp, mesh.tp)
        if shape != expected:
            yield f"{where}: {name} is {list(shape)}, planned {list(expected)}"
        found, shard = held.numbers[name], padded_shard(expected, mesh.dp_shard)
        if found != shard:
            yield f"{where}: {name} has {found:,} numbers, planned {shard:,}"
    items = {item.name: item.bytes for item in rank.footprint.items}
    away = rank.footprint.on_host  # the ranks that are built keep everything with them
    sizes = {"parameters (fp32)": 4 * sum(held.numbers.values()), state_item(plan.config): held.state - away}
    for name, size in sizes.items():
        # The plan is that of the rank that holds most, which is the first.
        if size > items[name] or (tp == 0 and size != items[name]):
            yield f"{where}: {name} take {size:,} bytes, planned {items[name]:,}"
