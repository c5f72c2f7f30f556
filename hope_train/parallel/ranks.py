"""The level optimizer's questions, answered for a model that is spread over a mesh."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hope_train.levels.ranks import Ranks
from hope_train.parallel.data import DataParallel
from hope_train.parallel.team import Team


class MeshRanks(Ranks):
    """Tensor-parallel ranks hold parts of the model, data-parallel ranks parts of the gradients."""

    def __init__(
        self,
        team: Team,
        tensor_group: ProcessGroup | None,
        replicated: Collection[Tensor],
        data: DataParallel | None,
        data_rank: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            tensor_group: ranks that hold parts of one model; None: each rank has it whole.
            replicated: the parameters that all of them hold whole.
            data: sums over the ranks that see different samples; None: there is one such rank.
            data_rank: this rank's number among them.
            device: where the parameters are.
        """
        self.device = device
        self.team, self.tensor_group, self.data, self.data_rank = team, tensor_group, data, data_rank
        self.replicated = set(replicated)
        self.slow_gradients_are_whole = data is None

    def norms(self, groups: Sequence[Sequence[Tensor]], owners: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """In float64. Ranks of a data-parallel group have the same tensors and need not ask each other."""
        if not groups:
            return []
        ranks = 1 if self.tensor_group is None else dist.get_world_size(self.tensor_group)
        squares = torch.zeros(len(groups), dtype=torch.float64, device=self.device)
        for number, (group, parameters) in enumerate(zip(groups, owners, strict=True)):
            if group:
                norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in group])
                replicas = [ranks if parameter in self.replicated else 1 for parameter in parameters]
                squares[number] = (norms.square() / norms.new_tensor(replicas)).sum()
        if self.tensor_group is not None:
            dist.all_reduce(squares, group=self.tensor_group)
        return list(squares.sqrt().unbind())

    def all_agree(self, finite: bool) -> bool:
        """Over all ranks of the run."""
        return not self.team.largest([int(not finite)])[0]

    def reduce_accumulators(self, name: str, accumulators: Sequence[Tensor]) -> None:
        """Once per period, or for a checkpoint in mid-period."""
        if self.data is not None:
            self.data.reduce(name, accumulators)

    def keep_one_sum(self, accumulators: Sequence[Tensor]) -> None:
        """The first rank keeps it: which one changes only the rounding, so it is always the same."""
        if self.data is not None and self.data_rank > 0:
            for accumulator in accumulators:
                accumulator.zero_()
