"""The three places where the level optimizer asks other ranks. Here: one process, nobody to ask.

An engine that spreads the model over ranks subclasses this; the optimizer itself does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ranks:
    """One process that holds every parameter whole."""

    def norms(self, groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """L2 norm of each list of tensors over the whole model, as scalars (0 for an empty list).

        Over several ranks: sums of squares, each divided by its number of replicas, in one reduction for all lists.
        """
        return [torch.nn.utils.get_total_norm(list(group)) for group in groups]

    def all_agree(self, finite: bool) -> bool:
        """Whether every rank says so: no rank may apply a step that another one skips."""
        return finite

    def reduce_accumulators(self, name: str, accumulators: Sequence[Tensor]) -> None:
        """Sum, in place, the accumulators of the set `name`, whose period ends at this step, over the ranks that
        hold parts of them. Nothing to do where the gradients of every step are already whole."""
