"""What the memories of a whole model do with a text, and the same model with its writes switched off.

Shapes: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_train.memory.activity import Activity, observe
from hope_train.model.hope import HopeModel
from hope_train.model.self_modifying import SelfModifyingTitans


@torch.no_grad()
def observe_model(model: HopeModel, tokens_BT: Tensor, starts_BT: Tensor | None = None) -> dict[str, Activity]:
    """The activity of each block's memories over tokens [B, T], by the block's number. Leaves the model as it is.

    Raises ValueError for a model without memories (attention in their place).
    """
    mixers = {name: block.mixer for name, block in model.blocks.items() if isinstance(block.mixer, SelfModifyingTitans)}
    if not mixers:
        raise ValueError(f"arch={model.config.arch} has no fast weights to observe")
    found: dict[str, Activity] = {}

    def watch(name: str, mixer: SelfModifyingTitans) -> Any:
        def before(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            z_BTHN, q_BTHN = mixer.before(arguments[0], starts_BT)
            with torch.autocast(z_BTHN.device.type, enabled=False):
                found[name] = observe(mixer.rules, z_BTHN, q_BTHN, mixer.memory.tensors(), starts_BT)

        return mixer.register_forward_pre_hook(before)

    handles = [watch(name, mixer) for name, mixer in mixers.items()]
    try:
        model.hidden(tokens_BT, starts_BT)
    finally:
        for handle in handles:
            handle.remove()
    return found


def without_writes(model: HopeModel) -> HopeModel:
    """The same weights in a model that never writes: every memory stays at its learned initial state.

    eta_max is 0. Decay then leads to the initial state whatever the model was trained with, so that it moves nothing
    either."""
    memory = model.config.memory.model_copy(update={"eta_max": 0.0, "decay_to": "init"})
    frozen = HopeModel(model.config.model_copy(update={"memory": memory}))
    frozen.load_state_dict(model.state_dict())
    weight = model.embed.weight
    return frozen.to(device=weight.device, dtype=weight.dtype).train(model.training)
