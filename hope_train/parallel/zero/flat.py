"""Where the parameters of a model lie in ZeRO's flat partitions: this rank's run of each of them, as live tensors.

All parameters are in one group of ZeRO's, so that there is one flat partition on each rank, and one step of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Of one parameter in the flat partition of a rank."""

    first: int
    """Number of the parameter, laid out row after row, that this rank's run begins with."""

    size: int
    """Numbers of the run; 0 where all of the parameter is on other ranks."""

    start: int
    """Where the run begins in the flat partition."""


class Flat:
    """The flat partition of one rank: fp32 weights that ZeRO steps and copies into the model."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        """
        Args:
            zero: DeepSpeed's optimizer of stage 1, 2 or 3.
            names: of the model's parameters.
        """
        self.zero = zero
        self.sharded = not hasattr(zero, "single_partition_of_fp32_groups")
        """Whether the model's own parameters are sharded too (stage 3)."""
        groups = zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups
        assert len(groups) == 1, "one group of parameters, and one piece of it"
        self.weights: Tensor = groups[0]
        self.places = {names[parameter]: place for parameter, place in self._places()}
        assert self.places.keys() == set(names.values())

    def _places(self) -> Iterator[tuple[Tensor, Place]]:
        zero = self.zero
        if self.sharded:
            start = 0
            for parameter in zero.fp16_groups[0]:
                share, whole = parameter.partition_numel(), parameter.ds_numel
                first = min(whole, torch.distributed.get_rank(parameter.ds_process_group) * share)
                yield parameter, Place(first, min(whole - first, share), start)
                start += share
            return
        share = zero.partition_size[0]
        begin = torch.distributed.get_rank(zero.real_dp_process_group[0]) * share
        for parameter, offset in zip(zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0], strict=True):
            first = max(0, begin - offset)
            last = min(parameter.numel(), begin + share - offset)
            size = max(0, last - first)
            yield parameter, Place(min(first, parameter.numel()), size, offset + first - begin if size else 0)

    def run(self, flat: Tensor, name: str) -> Tensor:
        """This rank's run of a parameter in a flat tensor, as a view [n]."""
        place = self.places[name]
        return flat.narrow(0, place.start, place.size)

    def parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The runs of these parameters, for an optimizer to hold and to step in place."""
        flat = self.weights.detach()
        return {name: nn.Parameter(self.run(flat, name)) for name in names}

    @torch.no_grad()
    def changed(self) -> None:
        """The flat weights have new values (a checkpoint's): bring them into the model."""
        if not self.sharded:
            self.zero.update_lp_params()
            return
        # What ZeRO does at the end of its own step.
        self.zero._reassign_or_swap_out_partitioned_parameters(0)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
