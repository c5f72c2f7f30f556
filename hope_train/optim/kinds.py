"""Which rule a parameter gets, and how many numbers the rule keeps for it. No torch: the planner asks as well."""

from __future__ import annotations

import math
from typing import Literal, get_args

from hope_train.config.rules import RuleName
from hope_train.config.train import OptimizerConfig
from hope_train.optim.decay import is_decayed

Kind = Literal["matrices", "vectors", "embeddings", "memories"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BATCH_BYTES = 32 * 2**20
"""Whole matrices of one shape are worked on together, as many as stay below this (or one)."""

MATCHED_RMS = 0.2
"""Root mean square of AdamW's updates, about (Liu et al., arXiv 2502.16982)."""


def kind_of(parameter_name: str, ndim: int) -> Kind:
    """The kind of a parameter of the unsharded model.

    `memories`: everything below a module called `memory`, the learned initial states. `embeddings`: the embedding and
    the output head. `matrices`: the weights of linear layers. `vectors`: the rest, convolution kernels among them.
    """
    segments = parameter_name.split(".")
    if "memory" in segments[:-1]:
        return "memories"
    if segments[0] in ("embed", "head"):
        return "embeddings"
    return "matrices" if ndim == 2 and is_decayed(parameter_name, ndim) else "vectors"


def rule_of(config: OptimizerConfig, kind: Kind) -> RuleName:
    """The rule that steps parameters of a kind."""
    return config.name if kind == "matrices" else getattr(config, kind)


def scale_of(config: OptimizerConfig, shape: tuple[int, ...]) -> float:
    """Factor on an orthogonalised update of a matrix that is [O, I] in the unsharded model."""
    rows, columns = shape
    if config.newton_schulz.scale == "match_rms_adamw":
        return MATCHED_RMS * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if config.newton_schulz.scale == "original" else 1.0


def state_numbers(config: OptimizerConfig, rule: RuleName, local: int, shape: tuple[int, ...]) -> int:
    """Numbers, of the parameter's type, that a rule keeps on a rank; single counters are left out.

    Args:
        local: numbers of the parameter itself on the rank.
        shape: the parameter's in the unsharded model.
    """
    if rule == "deep_momentum":
        return 2 * config.deep_momentum.width * shape[1]  # whole on every rank
    momentum = {"sgd": config.sgd.momentum, "dgd": config.dgd.momentum}.get(rule, 1.0)
    return local * {"adamw": 2, "m3": 4}.get(rule, int(momentum > 0))


def batch_size(shape: tuple[int, ...], itemsize: int) -> int:
    """Matrices of this shape that are worked on together."""
    return max(1, BATCH_BYTES // (math.prod(shape) * itemsize))
