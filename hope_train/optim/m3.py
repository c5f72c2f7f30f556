"""M3, multi-scale momentum Muon (Nested Learning, arXiv 2512.24695, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hope_train.config.train import OptimizerConfig
from hope_train.optim.kinds import MATCHED_RMS
from hope_train.optim.matrices import MatrixOptimizer, grads_of, zeros_like
from hope_train.optim.newton_schulz import newton_schulz, working_type
from hope_train.optim.wholes import Job, Stacks, Wholes


class M3(MatrixOptimizer):
    """W <- W - lr (O1 + alpha O2) / (sqrt(V) + eps).

    At update t of the parameter, with gradient g, slow period f and betas b1, b2, b3:

        ema:     M1 <- b1 M1 + (1 - b1) g    V <- b2 V + (1 - b2) g^2, used as V / (1 - b2^t)
                 M2 <- M2 + (1 - b3) g, and M2 <- b3 M2 before the first of f updates
        literal: M1 <- M1 + b1 g             V <- V + b2 g^2             M2 <- M2 + b3 g
        O1 = NS(M1); after each f-th update O2 = NS(M2), which serves the next f (zero before)

    M2 so holds the sums of whole periods at those moments, as printed. t counts updates of the parameter's own level: a
    level of period P renews O2 every P f training steps. With `rescale` the update, but for lr, is scaled to a root
    mean square of 0.2. Eq. 75 of the paper differs from its Algorithm 1 in sign and index; this is the algorithm.
    """

    @staticmethod
    def fresh(config: OptimizerConfig, parameter: Tensor, wholes: Wholes) -> dict[str, Tensor]:
        """Updates so far; M1, M2, O2, V."""
        named = {key: zeros_like(parameter) for key in ("fast", "slow", "slow_direction", "second_moment")}
        return {"step": torch.tensor(0.0), **named}

    def updates(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See MatrixOptimizer."""
        if not parameters:
            return
        config = self.config.m3
        steps = [int(step.add_(1)) for step in self.entries("step", parameters)]
        self._remember(parameters, steps)
        changes: list[Tensor] = []
        order: list[Tensor] = []
        for parameter, direction in self._orthogonalised("fast", parameters):
            state = self.state[parameter]
            direction = direction.to(parameter.dtype).add(state["slow_direction"], alpha=config.alpha)
            second = state["second_moment"]
            if config.accumulation == "ema":
                second = second / (1 - config.betas[1] ** int(state["step"]))
            order.append(parameter)
            changes.append(direction.div_(second.sqrt().add_(config.eps)))
        if config.rescale:
            means = self.wholes.mean_squares(order, changes)
            for change, mean in zip(changes, means, strict=True):
                smallest = torch.finfo(change.dtype).tiny
                change.mul_((MATCHED_RMS / mean.clamp(min=smallest).sqrt()).to(change.dtype))
        yield from zip(order, changes, strict=True)
        ended = [p for p, step in zip(parameters, steps, strict=True) if step % config.slow_period == 0]
        for parameter, direction in self._orthogonalised("slow", ended):
            self.state[parameter]["slow_direction"].copy_(direction)

    def _remember(self, parameters: Sequence[Tensor], steps: Sequence[int]) -> None:
        config, grads = self.config.m3, grads_of(parameters)
        first, second, third = config.betas
        fast, slow = self.entries("fast", parameters), self.entries("slow", parameters)
        squares = self.entries("second_moment", parameters)
        if config.accumulation == "literal":
            torch._foreach_add_(fast, grads, alpha=first)
            torch._foreach_add_(slow, grads, alpha=third)
            torch._foreach_addcmul_(squares, grads, grads, second)
            return
        torch._foreach_lerp_(fast, grads, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, 1 - second)
        begun = [memory for memory, step in zip(slow, steps, strict=True) if (step - 1) % config.slow_period == 0]
        if begun:
            torch._foreach_mul_(begun, third)
        torch._foreach_add_(slow, grads, alpha=1 - third)

    def _orthogonalised(self, key: str, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config.newton_schulz

        def orthogonalise(parts: Stacks, _: Stacks) -> tuple[Stacks, Stacks]:
            return [newton_schulz(parts[0], config)], []

        jobs = [Job(p, lambda p=p: [self.state[p][key]]) for p in parameters]  # type: ignore[misc]
        dtype = working_type(config, parameters[0]) if parameters else None
        for done in self.wholes.each(jobs, orthogonalise, dtype=dtype):
            yield done.job.parameter, done.parts[0]
