"""Initial weights of a model that is spread over ranks: bit for bit those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hope_train.config.model import ModelConfig
from hope_train.model.hope import HopeModel


@torch.no_grad()
def fill(config: ModelConfig, seed: int, held: Mapping[str, Tensor], part: Callable[[str, Tensor], Tensor]) -> None:
    """Give the tensors that this rank holds their part of the initial values.

    Every value of the whole model is drawn, in its order; one whole tensor exists at a time.

    Args:
        held: by name in the unsharded model; names that are not there are other ranks'.
        part: this rank's part of the whole tensor of that name, in the shape of what is held.
    """
    with torch.device("meta"):
        whole = HopeModel(config)
    for name, value in whole.initial_values(seed):
        if name in held:
            held[name].copy_(part(name, value))
