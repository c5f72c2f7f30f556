"""Deep momentum, DMGD: an MLP as the memory of gradients (Nested Learning, Eq. 50; output non-linearity Eq. 52)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hope_train.config.rules import DeepMomentumConfig
from hope_train.config.train import OptimizerConfig
from hope_train.optim.kinds import scale_of
from hope_train.optim.matrices import WHOLE, MatrixOptimizer
from hope_train.optim.newton_schulz import newton_schulz, working_type
from hope_train.optim.wholes import Job, Stacks, Wholes

FIRST, SECOND = WHOLE + "first", WHOLE + "second"


class DeepMomentum(MatrixOptimizer):
    """W <- W - lr m(u), or W <- W - lr scale NS(m(u)); m(u) = W1 silu(W2 u) for each row u of the gradient.

    The paper leaves the MLP, its objective and its keys open. Here every matrix [O, I] has an MLP of its own, I -> h
    -> I, which learns to give back the gradient's rows (L2 regression, as delta momentum's): what recurs in gradients
    is written, what does not is forgotten, so that m(u) is the gradient with its noise left out. Gradients enter with a
    root mean square of 1; the memory so does not depend on their size, and neither does the update.

    One step of gradient descent on 1/2 mean |m(u) - u|^2 over the rows, then W is stepped by the new m (Eq. 50). Rates
    are divided by a bound of the curvature, r / (1 + r mean |h|^2) for W1 and r / (1 + r |W1|^2 mean |u|^2) for W2, so
    that no rate diverges. W1 starts at zero and keeps alpha at each step; W2 starts at random (the same for all
    matrices of one shape) and does not decay.

    Cost per update of a matrix: 14 O I h floating-point operations besides Newton-Schulz; state: 2 h I numbers, whole
    on every rank.
    """

    @staticmethod
    def fresh(config: OptimizerConfig, parameter: Tensor, wholes: Wholes) -> dict[str, Tensor]:
        """The layers of the MLP: W2 [h, I] and W1 [I, h]."""
        width, columns = config.deep_momentum.width, wholes.shape(parameter)[1]
        second = torch.empty(width, columns, dtype=parameter.dtype)
        if not parameter.is_meta:
            second.normal_(0.0, columns**-0.5, generator=torch.Generator().manual_seed(0))
        first = torch.zeros(columns, width, dtype=parameter.dtype, device=parameter.device)
        return {FIRST: first, SECOND: second.to(parameter.device)}

    def updates(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """See MatrixOptimizer."""
        config, schulz = self.config.deep_momentum, self.config.newton_schulz

        def learn(parts: Stacks, layers: Stacks) -> tuple[Stacks, Stacks]:
            grad = parts[0]
            rms = grad.square().mean((-2, -1), keepdim=True).sqrt()
            rows = grad / rms.clamp(min=torch.finfo(grad.dtype).tiny)
            first, second = learn_rows(rows, layers[0], layers[1], config)
            update = torch.nn.functional.silu(rows @ second.mT) @ first.mT
            if config.output == "newton_schulz":
                update = newton_schulz(update.to(working_type(schulz, update)), schulz).to(grad.dtype)
            return [update], [first, second]

        jobs = [
            Job(p, lambda p=p: [p.grad], [self.state[p][FIRST], self.state[p][SECOND]])  # type: ignore[misc]
            for p in parameters
        ]
        for done in self.wholes.each(jobs, learn):
            parameter = done.job.parameter
            for key, layer in zip((FIRST, SECOND), done.wholes, strict=True):
                self.state[parameter][key].copy_(layer)
            linear = config.output == "linear"
            yield parameter, done.parts[0] * (1.0 if linear else scale_of(self.config, self.wholes.shape(parameter)))


def learn_rows(
    rows_NOI: Tensor, first_NIH: Tensor, second_NHI: Tensor, config: DeepMomentumConfig
) -> tuple[Tensor, Tensor]:
    """One step of each of N memories on its rows: the new W1 [N, I, H] and W2 [N, H, I]."""
    count, rate = rows_NOI.shape[-2], config.rate
    before_NOH = rows_NOI @ second_NHI.mT
    gate_NOH = before_NOH.sigmoid()
    hidden_NOH = before_NOH * gate_NOH
    error_NOI = hidden_NOH @ first_NIH.mT - rows_NOI
    back_NOH = (error_NOI @ first_NIH) * gate_NOH * (1 + before_NOH * (1 - gate_NOH))
    size_N11 = first_NIH.square().sum((-2, -1), keepdim=True) * rows_NOI.square().sum((-2, -1), keepdim=True) / count
    first_rate = rate / (1 + rate * hidden_NOH.square().sum((-2, -1), keepdim=True) / count)
    first = config.alpha * first_NIH - first_rate * (error_NOI.mT @ hidden_NOH) / count
    second = second_NHI - rate / (1 + rate * size_N11) * (back_NOH.mT @ rows_NOI) / count
    return first, second
