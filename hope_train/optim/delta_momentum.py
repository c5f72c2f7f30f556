"""Delta momentum: a linear memory of gradients written by the delta rule (Nested Learning, Eq. 49)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig
from hope_train.optim.kinds import scale_of
from hope_train.optim.matrices import MatrixOptimizer, zeros_like
from hope_train.optim.newton_schulz import newton_schulz, working_type
from hope_train.optim.wholes import Job, Stacks, Wholes


class DeltaMomentum(MatrixOptimizer):
    """m <- m (alpha I - g^T g / |g|^2) + g;  W <- W - lr m, or W <- W - lr scale NS(m).

    Momentum whose inner objective is L2 regression in place of the dot product. Eq. 49 is written for a vector g; for
    the gradient of a matrix, [O, I], the factor stands to the right, |g| is the Frobenius norm and P = I (open). The
    rate stands at the update and not inside m, as in torch's optimizers: the same where the rate does not change.
    """

    @staticmethod
    def fresh(config: OptimizerConfig, parameter: Tensor, wholes: Wholes) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum_buffer": zeros_like(parameter)}

    def updates(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See MatrixOptimizer."""
        config = self.config.delta_momentum

        def write(parts: Stacks, _: Stacks) -> tuple[Stacks, Stacks]:
            memory = write_delta(parts[0], parts[1], config.alpha)
            if config.output == "linear":
                return [memory], []
            schulz = self.config.newton_schulz
            direction = newton_schulz(memory.to(working_type(schulz, memory)), schulz)
            return [memory, direction.to(memory.dtype)], []

        jobs = [
            Job(p, lambda p=p: [self.state[p]["momentum_buffer"], p.grad])  # type: ignore[misc]
            for p in parameters
        ]
        for done in self.wholes.each(jobs, write, results=1 if config.output == "linear" else 2):
            parameter = done.job.parameter
            self.state[parameter]["momentum_buffer"].copy_(done.parts[0])
            linear = config.output == "linear"
            scale = 1.0 if linear else scale_of(self.config, self.wholes.shape(parameter))
            yield parameter, done.parts[-1] * scale


def write_delta(memory_NOI: Tensor, grad_NOI: Tensor, alpha: float) -> Tensor:
    """m (alpha I - g^T g / |g|^2) + g for each of N matrices; for g = 0 what is left is alpha m."""
    square = grad_NOI.square().sum((-2, -1), keepdim=True).clamp(min=torch.finfo(grad_NOI.dtype).tiny)
    unit = grad_NOI / square.sqrt()
    rows, columns = grad_NOI.shape[-2:]
    # The cheaper order of the two products.
    read = (memory_NOI @ unit.mT) @ unit if rows < columns else memory_NOI @ (unit.mT @ unit)
    return alpha * memory_NOI - read + grad_NOI
