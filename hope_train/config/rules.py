"""Hyperparameters of the update rules, a section each. Which rule is used is `optimizer.name`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_train.config.base import Section

RuleName = Literal["adamw", "sgd", "muon", "m3", "delta_momentum", "deep_momentum", "dgd"]
"""Every rule; see docs/optimizers.md."""


MATRIX_ONLY = ("muon", "m3", "delta_momentum", "deep_momentum", "dgd")
"""Those that take matrices alone."""

Output = Literal["linear", "newton_schulz"]
"""What becomes of a momentum before it is applied (Eq. 52): nothing, or its orthogonalisation."""


def check_betas(betas: tuple[float, ...], where: str = "betas") -> None:
    """Raises ValueError unless each is in [0, 1)."""
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{where}={list(betas)}: each must be in [0, 1)")


class NewtonSchulzConfig(Section):
    """Orthogonalisation of a matrix by a quintic iteration (Jordan et al., Muon, 2024)."""

    steps: int = Field(5, ge=1, lt=100)
    """Iterations."""

    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    """a, b, c of X <- a X + b (X X^T) X + c (X X^T)^2 X."""

    eps: float = Field(1e-7, gt=0.0)
    """Smallest norm that a matrix is divided by."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the iteration. auto: bf16 on a GPU, the parameter's type on a CPU."""

    scale: Literal["match_rms_adamw", "original", "none"] = "match_rms_adamw"
    """Factor on an orthogonalised [O, I]: 0.2 sqrt(max(O, I)), which has the size of AdamW's updates, so that both can
    share `lr` (Liu et al., arXiv 2502.16982); sqrt(max(1, O / I)) (Jordan et al.); or 1."""


class SGDConfig(Section):
    """Gradient descent with momentum: m <- momentum m + g."""

    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the sum of gradients. 0: no momentum, and no state."""

    nesterov: bool = False
    """Look ahead: g + momentum m is applied in place of m."""

    @model_validator(mode="after")
    def _check(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class MuonConfig(Section):
    """Orthogonalised momentum: Newton-Schulz of a linear memory of gradients."""

    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the mean of gradients."""

    nesterov: bool = True
    """Orthogonalise (1 - momentum) g + momentum m in place of m."""


class M3Config(Section):
    """Multi-scale momentum Muon (Nested Learning, Algorithm 1): a fast and a slow momentum, both orthogonalised."""

    betas: tuple[float, float, float] = (0.95, 0.95, 0.9)
    """Factors of the fast momentum, the second moment and the slow momentum: decay rates with accumulation=ema, weights
    of what is added with literal."""

    alpha: float = Field(0.5, ge=0.0)
    """Weight of the slow direction beside the fast one."""

    slow_period: int = Field(10, ge=1)
    """The slow direction is made anew every this many updates, of the parameter's own level."""

    eps: float = Field(1e-8, gt=0.0)
    """Added to the square root of the second moment."""

    accumulation: Literal["ema", "literal"] = "ema"
    """`ema`: momenta and second moment decay, and the second moment is corrected for its start at zero. `literal`:
    sums without decay, as printed. Open."""

    rescale: bool = True
    """Scale each matrix's update to a root mean square of 0.2, the size of AdamW's: as printed an update is inversely
    proportional to the size of the gradients. Open."""

    @model_validator(mode="after")
    def _check(self) -> M3Config:
        check_betas(self.betas)
        if self.accumulation == "literal" and not all(self.betas):
            raise ValueError(
                f"betas={list(self.betas)}: accumulation=literal weighs what it adds by them, so none is 0"
            )
        return self


class DeltaMomentumConfig(Section):
    """Delta momentum (Eq. 49): m <- m (alpha I - g^T g / |g|^2) + g."""

    alpha: float = Field(0.95, ge=0.0, le=1.0)
    """What is kept of the momentum outside the direction of the gradient."""

    output: Output = "newton_schulz"
    """`linear` applies m as printed; `newton_schulz` its orthogonalisation (Eq. 52). Open."""


class DeepMomentumConfig(Section):
    """Deep momentum, DMGD (Eq. 50): W <- W + m(u), m an MLP of each matrix's own that learns its gradients' rows."""

    width: int = Field(64, ge=1)
    """Hidden units of the MLP, m(u) = W1 silu(W2 u) per row u of the gradient. Open."""

    rate: float = Field(1.0, gt=0.0)
    """Rate at which the MLP learns, before it is divided by a bound of the curvature. Open."""

    alpha: float = Field(0.999, gt=0.0, le=1.0)
    """What the MLP's last layer keeps at each update (Eq. 50's alpha); the first does not decay. Open."""

    output: Output = "newton_schulz"
    """`linear` applies m(u); `newton_schulz` its orthogonalisation (Eq. 52). Open."""


class DGDConfig(Section):
    """Delta gradient descent (Eqs. 56-57), for linear layers."""

    momentum: float = Field(0.0, ge=0.0, lt=1.0)
    """Momentum on its updates. 0, as printed: none, and no state."""
