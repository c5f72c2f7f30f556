"""What an update rule remembers of rarely due parameters, kept in host memory between their updates.

Only what the rule itself keeps (AdamW: the two moments): it is needed at an update and at no other step. A level's
accumulator is needed at every step and stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hope_train.levels.schedule import REST_AT_A_TIME

State = MutableMapping[Tensor, dict[str, Tensor]]


class Resting:
    """Moves entries of `state[parameter]` between the device and host memory; values never change on the way.

    Between updates the state holds the tensors in host memory, the same ones all the time, so that a checkpoint is
    written from and read into them as from any others. On a CPU it is a copy within the same memory.
    """

    def __init__(self, state: State, ours: Iterable[str]) -> None:
        """ours: keys in `state[parameter]` that are not the rule's and stay where they are."""
        self.state, self.ours = state, frozenset(ours)

    def settle(self, parameter: Tensor) -> None:
        """Bring what the rule keeps of a parameter into host memory for the first time."""
        entries = self.state[parameter]
        for key in self._keys(parameter):
            entries[key] = _in_host_memory(entries[key])
        _wait(parameter)

    def step(self, optimizer: torch.optim.Optimizer, awake: Sequence[Tensor], resting: Sequence[Tensor]) -> None:
        """Let the rule step the parameters with a gradient: first the awake ones, then the resting ones, a few at a
        time. Each one's step is what it would be among all: a rule keeps what it remembers by parameter.
        """
        with _parked(resting):
            optimizer.step()
        with _parked([*awake, *resting]) as grads:
            for some in self._portions([parameter for parameter in resting if grads[parameter] is not None]):
                self._step_some(optimizer, {parameter: grads[parameter] for parameter in some})

    def _step_some(self, optimizer: torch.optim.Optimizer, grads: Mapping[Tensor, Tensor | None]) -> None:
        resting = {parameter: {key: self.state[parameter][key] for key in self._keys(parameter)} for parameter in grads}
        for parameter, entries in resting.items():
            parameter.grad = grads[parameter]
            self.state[parameter].update(
                {key: host.to(parameter.device, copy=True, non_blocking=True) for key, host in entries.items()}
            )
        optimizer.step()
        for parameter, entries in resting.items():
            parameter.grad = None
            for key, host in entries.items():
                host.copy_(self.state[parameter][key], non_blocking=True)
                self.state[parameter][key] = host
        # The host may read them at once.
        _wait(next(iter(grads)))

    def _keys(self, parameter: Tensor) -> list[str]:
        # Numbers, such as a counter of steps, are where the rule wants them.
        return [key for key, entry in self.state[parameter].items() if key not in self.ours and entry.ndim]

    def _portions(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        some: list[Tensor] = []
        held = 0
        for parameter in parameters:
            own = sum(self.state[parameter][key].nbytes for key in self._keys(parameter))
            if some and held + own > REST_AT_A_TIME:
                yield some
                some, held = [], 0
            some.append(parameter)
            held += own
        if some:
            yield some


@contextmanager
def _parked(parameters: Sequence[Tensor]) -> Iterator[dict[Tensor, Tensor | None]]:
    """Take the gradients away, and put them back at the end: a rule leaves alone what has none."""
    grads = {parameter: parameter.grad for parameter in parameters}
    for parameter in parameters:
        parameter.grad = None
    try:
        yield grads
    finally:
        for parameter, grad in grads.items():
            parameter.grad = grad


def _in_host_memory(tensor: Tensor) -> Tensor:
    if tensor.is_cuda and type(tensor) is Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to("cpu", copy=True)


def _wait(parameter: Tensor) -> None:
    if parameter.is_cuda:
        torch.cuda.current_stream(parameter.device).synchronize()
