"""The level optimizer's questions, answered for a model that is spread over a mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hope_train.levels.ranks import Ranks
from hope_train.parallel.data import DataParallel
from hope_train.parallel.sharded import ShardedData
from hope_train.parallel.team import Team


class MeshRanks(Ranks):
    """Ranks hold parts of the model (tensor parallelism, shards) and parts of the gradients (data parallelism)."""

    def __init__(
        self,
        team: Team,
        parts: Sequence[ProcessGroup],
        replicas: Mapping[Tensor, int],
        data: DataParallel | ShardedData | None,
        data_rank: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            parts: groups, one per dimension of the mesh, whose ranks hold parts of one model between them.
            replicas: ranks, of those that hold one model between them, that hold the same part of a parameter; one
                where nothing is said.
            data: sums over the ranks that see different samples; None: there is one such rank.
            data_rank: this rank's number among them.
            device: where the parameters are.
        """
        self.device = device
        self.team, self.parts, self.replicas, self.data, self.data_rank = team, list(parts), replicas, data, data_rank
        self.slow_gradients_are_whole = data is None

    def norms(self, groups: Sequence[Sequence[Tensor]], owners: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """In float64. Ranks that hold the same tensors need not ask each other."""
        if not groups:
            return []
        squares = torch.zeros(len(groups), dtype=torch.float64, device=self.device)
        for number, (group, parameters) in enumerate(zip(groups, owners, strict=True)):
            if group:
                norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in group])
                shares = [self.replicas.get(parameter, 1) for parameter in parameters]
                squares[number] = (norms.square() / norms.new_tensor(shares)).sum()
        for part in self.parts:
            dist.all_reduce(squares, group=part)
        return list(squares.sqrt().unbind())

    def all_agree(self, finite: bool) -> bool:
        """Over all ranks of the run."""
        return not self.team.largest([int(not finite)])[0]

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Of a slow set: of this rank's own samples."""
        return parameter.grad if self.data is None else self.data.gradient(parameter)

    def collects(self, parameter: Tensor) -> Tensor:
        """Like `gradient`: whole where the parameter is a shard."""
        return parameter if self.data is None else self.data.collects(parameter)

    def close_period(self, name: str, accumulators: Sequence[Tensor]) -> Sequence[Tensor]:
        """The one reduction of a period."""
        return accumulators if self.data is None else self.data.close_period(name, accumulators)

    def changed(self, names: Sequence[str]) -> None:
        """Levels that are kept whole beside their shards are gathered."""
        if self.data is not None:
            self.data.changed(names)

    def reduce_accumulators(self, name: str, accumulators: Sequence[Tensor]) -> None:
        """For a checkpoint in mid-period."""
        if self.data is not None:
            self.data.reduce(name, accumulators)

    def keep_one_sum(self, accumulators: Sequence[Tensor]) -> None:
        """The first rank keeps it: which one changes only the rounding, so it is always the same."""
        if self.data is not None and self.data_rank > 0:
            for accumulator in accumulators:
                accumulator.zero_()
