"""Muon: a linear memory of gradients whose output is orthogonalised (Nested Learning, Eq. 52 with a linear m)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig
from hope_train.optim.kinds import scale_of
from hope_train.optim.matrices import MatrixOptimizer, grads_of, zeros_like
from hope_train.optim.newton_schulz import newton_schulz, working_type
from hope_train.optim.wholes import Job, Stacks, Wholes


class Muon(MatrixOptimizer):
    """m <- momentum m + (1 - momentum) g; the update is Newton-Schulz of m or, looking ahead, of
    (1 - momentum) g + momentum m (Jordan et al., 2024).

    Equal to torch.optim.Muon where that is applicable (one process, bf16), with which a test compares it. Not that one,
    as it takes matrices one by one, always in bf16 (on a CPU too), and cannot be given matrices that are spread out.
    """

    @staticmethod
    def fresh(config: OptimizerConfig, parameter: Tensor, wholes: Wholes) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum_buffer": zeros_like(parameter)}

    def updates(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See MatrixOptimizer."""
        config, momentum = self.config.newton_schulz, self.config.muon.momentum
        buffers, grads = self.entries("momentum_buffer", parameters), grads_of(parameters)
        torch._foreach_lerp_(buffers, grads, 1 - momentum)

        def direction(grad: Tensor, buffer: Tensor) -> list[Tensor]:
            return [grad.lerp(buffer, momentum) if self.config.muon.nesterov else buffer]

        def orthogonalise(parts: Stacks, _: Stacks) -> tuple[Stacks, Stacks]:
            return [newton_schulz(parts[0], config)], []

        jobs = [
            Job(parameter, lambda grad=grad, buffer=buffer: direction(grad, buffer))  # type: ignore[misc]
            for parameter, grad, buffer in zip(parameters, grads, buffers, strict=True)
        ]
        dtype = working_type(config, parameters[0]) if parameters else None
        for done in self.wholes.each(jobs, orthogonalise, dtype=dtype):
            parameter = done.job.parameter
            yield parameter, done.parts[0].to(parameter.dtype) * scale_of(self.config, self.wholes.shape(parameter))
