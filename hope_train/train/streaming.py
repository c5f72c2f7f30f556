"""What a run has to do for data that is read while it trains: fetch it together, keep its place, tell its counters."""

from __future__ import annotations

from typing import Any

from data_pipelines.samples import BatchSource
from data_pipelines.streams import merge_metrics, merge_states
from hope_train.errors import UserError
from hope_train.parallel.mesh import Mesh


def data_failure(source: BatchSource, mesh: Mesh, index: int) -> str | None:
    """Fetch this rank's rows of global batch `index`. Why that cannot be done, if on any rank; the same on all of them.

    A rank that stopped alone would leave the others waiting in their exchanges.
    """
    if not source.reads_on:
        return None
    mine: str | None = None
    try:
        source.prepare(index, mesh.data_rank, mesh.sizes.dp)
    except UserError as error:
        mine = str(error)
    if not mesh.team.largest([int(mine is not None)])[0]:
        return None
    return next(message for message in mesh.team.gather(mine) if message is not None)


def data_state(source: BatchSource, mesh: Mesh, step: int) -> dict[str, Any]:
    """The place of the data of all ranks, to go on with global batch `step`. Every rank calls it."""
    return merge_states(mesh.team.gather(source.state(source.sizes.first_sample(step)))) if source.reads_on else {}


def data_metrics(source: BatchSource, mesh: Mesh) -> dict[str, Any]:
    """{"data": counters of all ranks} for a line of metrics; nothing where nothing is read. Every rank calls it."""
    return {"data": merge_metrics(mesh.team.gather(source.metrics()))} if source.reads_on else {}
