"""The places where the level optimizer asks other ranks. Here: one process, nobody to ask.

An engine that spreads the model over ranks subclasses this; the optimizer itself does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ranks:
    """One process that holds every parameter whole."""

    slow_gradients_are_whole = True
    """Whether a slow set's gradient of a single step is known before its period ends. Where ranks see different
    samples it is not: what they collect is summed once per period."""

    def norms(self, groups: Sequence[Sequence[Tensor]], owners: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """L2 norm of each list of tensors over the whole model, as scalars (0 for an empty list).

        `owners` has the parameter that each tensor belongs to (its gradient, its change, …). Over several ranks: sums
        of squares, each divided by the number of its parameter's replicas, in one reduction for all lists.
        """
        return [torch.nn.utils.get_total_norm(list(group)) for group in groups]

    def all_agree(self, finite: bool) -> bool:
        """Whether every rank says so: no rank may apply a step that another one skips."""
        return finite

    def dimensions(self, parameter: Tensor) -> int:
        """Of the whole parameter. What the optimizer holds of it may be a run of its numbers."""
        return parameter.ndim

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """What this step's backward has left for a parameter that the optimizer holds. Where that is a shard and its
        set is slow, this is the gradient of the whole, of this rank's samples."""
        return parameter.grad

    def collects(self, parameter: Tensor) -> Tensor:
        """A tensor of the shape and type of `gradient`, for the accumulator of a slow set."""
        return parameter

    def close_period(self, name: str, accumulators: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sums of the accumulators of the set `name`, whose period ends at this step, over the ranks that hold
        parts of them, in the shapes of its parameters. The accumulators may be used up."""
        self.reduce_accumulators(name, accumulators)
        return accumulators

    def changed(self, names: Sequence[str]) -> None:
        """The parameters of these sets that the optimizer holds have new values."""

    def reduce_accumulators(self, name: str, accumulators: Sequence[Tensor]) -> None:
        """Sum, in place, the accumulators of the set `name` over the ranks that hold parts of them. Nothing to do
        where the gradients of every step are already whole."""

    def keep_one_sum(self, accumulators: Sequence[Tensor]) -> None:
        """After accumulators were summed in mid-period: leave the sum to one rank of those that hold parts, so that
        the next sum counts it once. Nothing to do where nothing is summed."""
