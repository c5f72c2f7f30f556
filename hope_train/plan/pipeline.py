"""Bubbles and micro-batches in flight of the pipeline schedules (no torch).

p stages, m micro-batches, v parts per rank; F, B, W are the times of forward, of the gradient of the inputs
(recomputation included) and of the gradient of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from hope_train.config.mesh import MeshSizes, micro_batches
from hope_train.config.tree import RunConfig
from hope_train.plan.sharding import RankShare
from hope_train.plan.stages import splits_backward

FORMULAS = {
    "gpipe": "(p-1)/m of the ideal time (Huang et al., arXiv 1811.06965)",
    "1f1b": "(p-1)/m of the ideal time (Narayanan et al., arXiv 2104.04473, section 2.2.1)",
    "interleaved_1f1b": "(p-1)/(v m) of the ideal time (Narayanan et al., arXiv 2104.04473, section 2.2.2)",
    "zbv": "(p-1) max(0, F+B-2W) / (m (F+B+W)) of the ideal time: none when F=B=W (Qi et al., arXiv 2401.10241)",
}

WHOLE_BACKWARD = "(p-1)/m of the ideal time, as 1f1b: zbv does not defer the gradients of the weights here"


@dataclass(frozen=True)
class Bubble:
    """Idle time of a pipeline."""

    overhead: float
    """Idle time over the time that a rank works."""

    formula: str

    @property
    def share(self) -> float:
        """Idle time over all time."""
        return self.overhead / (1 + self.overhead)


def pipeline_bubble(config: RunConfig, mesh: MeshSizes) -> Bubble:
    """The bubble of the configured schedule."""
    parallel, count = config.parallel, micro_batches(config, mesh)
    if mesh.pp == 1:
        return Bubble(0.0, "no pipeline")
    overhead = (mesh.pp - 1) / count
    if parallel.schedule == "interleaved_1f1b":
        overhead /= parallel.stages_per_rank
    if parallel.schedule == "zbv":
        return Bubble(0.0, FORMULAS["zbv"]) if splits_backward(config) else Bubble(overhead, WHOLE_BACKWARD)
    return Bubble(overhead, FORMULAS[parallel.schedule])


def in_flight(config: RunConfig, mesh: MeshSizes, rank: int) -> int:
    """Most micro-batches of one part each whose activations pipeline rank `rank` holds at a time.

    Warm-up lengths are those of torch.distributed.pipelining. Several parts per rank: passes through any of them.
    """
    parallel, count = config.parallel, micro_batches(config, mesh)
    if mesh.pp == 1:
        return 1
    if parallel.schedule == "gpipe":
        return count
    if parallel.schedule == "1f1b":
        return min(count, mesh.pp - rank)
    if parallel.schedule == "zbv":
        return min(2 * count, 2 * mesh.pp)
    per_round = count // max(1, count // mesh.pp)
    warm_up = (parallel.stages_per_rank - 1) * per_round + 2 * (mesh.pp - 1 - rank)
    return min(count * parallel.stages_per_rank, warm_up + 1)


def layers_in_flight(config: RunConfig, mesh: MeshSizes, share: RankShare) -> int:
    """Layers times micro-batches whose activations a rank holds at a time, at most."""
    passes, widest = in_flight(config, mesh, share.rank), max(layers for _, layers in share.parts)
    return min(passes * widest, (1 if mesh.pp == 1 else micro_batches(config, mesh)) * share.layers)


def heads_in_flight(config: RunConfig, mesh: MeshSizes) -> int:
    """Micro-batches whose loss exists while its backward has not begun, on the last part."""
    return micro_batches(config, mesh) if mesh.pp > 1 and config.parallel.schedule == "gpipe" else 1
