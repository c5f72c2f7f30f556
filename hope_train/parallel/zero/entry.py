"""The module that DeepSpeed wraps: every way into the model leads through its forward.

With stage 3 parameters are gathered by hooks on the forward of the module that has them. What is used outside of the
module that it belongs to (the output matrix, the initial states of memories) has to be announced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hope_train.model.hope import HopeModel
from hope_train.model.self_modifying import SelfModifyingTitans

WAYS_IN = ("forward", "loss", "hidden", "row_nll", "hidden_nll", "step", "step_nll")
"""Methods of the model by which the trainer and the evaluations enter."""


class Entry(nn.Module):
    """Calls a method of the model by its name. Its children are the model's: DeepSpeed saves the model's names."""

    model: HopeModel

    def __init__(self, model: HopeModel) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "model", model)  # not a child
        self.inside = False
        self.register_state_dict_post_hook(_drop_empty)

    def forward(self, way: str, *arguments: Any, autocast: bool = False, **options: Any) -> Any:
        """autocast: products in bf16."""
        device = arguments[0].device.type
        was, self.inside = self.inside, True
        try:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast or torch.is_autocast_enabled(device)):
                return getattr(HopeModel, way)(self.model, *arguments, **options)
        finally:
            self.inside = was

    def lead_in(self) -> None:
        """From now on the model's own methods enter by this module too."""
        for way in WAYS_IN:
            setattr(self.model, way, self._way(way))

    def _way(self, way: str) -> Callable[..., Any]:
        def enter(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                return getattr(HopeModel, way)(self.model, *arguments, **options)
            return self(way, *arguments, **options)

        return enter


def _drop_empty(entry: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Megatron-core's layers have entries without a tensor, at which DeepSpeed's converter would stumble."""
    for name in [name for name, tensor in state.items() if tensor is None]:
        del state[name]


def announce(entry: Entry) -> None:
    """Stage 3: tell DeepSpeed of the parameters that a module uses of another one, before it wraps the model."""
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(entry, entry.model.head_weight_VD)
    for mixer in _memories(entry.model):
        for parameter in mixer.memory.parameters():
            register_external_parameter(mixer, parameter)


def gather_in_steps(entry: Entry) -> None:
    """Stage 3: decoding calls a mixer by another method than its forward; gather there what its hooks would gather."""
    from deepspeed.runtime.zero import GatheredParameters

    def gathered(plain: Callable[..., Any], parameters: Sequence[Tensor]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            with GatheredParameters(parameters):
                return plain(*arguments, **options)

        return step

    for mixer in _memories(entry.model):
        own = [mixer.out_norm, *mixer.memory.parameters()]
        for name in ("step", "initial_state"):
            setattr(mixer, name, gathered(getattr(mixer, name), own))


def _memories(model: HopeModel) -> list[SelfModifyingTitans]:
    return [block.mixer for _, block in model.named_blocks() if isinstance(block.mixer, SelfModifyingTitans)]
