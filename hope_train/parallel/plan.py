"""How Hope, Hope-Attention and Transformer++ split over tensor-parallel ranks: data, and questions about it.

One statement for every interpreter (`tensor.py` here, the planner, other engines): no torch in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase


class Split(Enum):
    """What becomes of a module, and of the parameters directly in it."""

    COLWISE = "colwise"
    """Output features are divided: rows of the weight. Its input is whole, its output this rank's part."""

    ROWWISE = "rowwise"
    """Input features are divided: columns of the weight. Its outputs are summed over the ranks; there the residual
    stream is left."""

    HEADWISE = "headwise"
    """Whole heads are divided, along the first dimension; nothing is exchanged."""

    VOCAB = "vocab"
    """Rows of the vocabulary are divided, the last ranks holding fewer where it does not divide evenly."""

    SEQUENCE = "sequence"
    """The parameters are on every rank. With sequence parallelism each rank computes its own tokens, the output is
    gathered, and gradients of the parameters are summed over the ranks."""

    REPLICATED = "replicated"
    """As `sequence`, but the output stays where it is made (it goes back to the residual stream)."""

    @property
    def dim(self) -> int | None:
        """The dimension of a parameter that is divided. None: every rank holds it whole."""
        return {Split.ROWWISE: 1, Split.SEQUENCE: None, Split.REPLICATED: None}.get(self, 0)


@dataclass(frozen=True)
class Rule:
    """`pattern` names modules, or single parameters, of the unsharded model; `*` stands for anything."""

    pattern: str
    split: Split


PLAN = (
    Rule("embed", Split.VOCAB),
    Rule("head", Split.VOCAB),
    Rule("norm", Split.SEQUENCE),
    Rule("blocks.*.mixer_norm", Split.SEQUENCE),
    # Memories: z and q are made per head; states, convolution and output norm are per head or channel.
    Rule("blocks.*.mixer.in_proj", Split.COLWISE),
    Rule("blocks.*.mixer.q_proj", Split.COLWISE),
    Rule("blocks.*.mixer.conv", Split.HEADWISE),
    Rule("blocks.*.mixer.memory", Split.HEADWISE),
    Rule("blocks.*.mixer.out_norm", Split.HEADWISE),
    Rule("blocks.*.mixer.out_proj", Split.ROWWISE),
    # Attention, besides q_proj and out_proj.
    Rule("blocks.*.mixer.k_proj", Split.COLWISE),
    Rule("blocks.*.mixer.v_proj", Split.COLWISE),
    # The CMS, and the baseline's MLP, which is one of its levels.
    Rule("blocks.*.cms", Split.REPLICATED),
    *(
        Rule(f"blocks.*.{mlp}.{part}", split)
        for mlp in ("cms.levels.*", "mlp")
        for part, split in (
            ("norm", Split.SEQUENCE),
            ("up", Split.COLWISE),
            ("gate", Split.COLWISE),
            ("down", Split.ROWWISE),
        )
    ),
)


def split_of_module(name: str) -> Split | None:
    """What the plan says of the module (or single parameter) `name`. None: nothing."""
    depth = name.count(".")
    for rule in PLAN:
        # `*` matches dots as well: a name of another depth is another module.
        if rule.pattern.count(".") == depth and fnmatchcase(name, rule.pattern):
            return rule.split
    return None


def split_of_parameter(name: str) -> Split:
    """How the parameter `name` of the unsharded model is divided. Raises KeyError for one the plan does not know."""
    found = split_of_module(name) or split_of_module(name.rpartition(".")[0])
    if found is None:
        raise KeyError(f"the tensor-parallel plan says nothing of {name}")
    return found


def part_of(size: int, rank: int, ranks: int) -> range:
    """The rows of a dimension of `size` that a rank holds: equal shares, what is missing missing at the end."""
    share = -(-size // ranks)
    return range(min(size, rank * share), min(size, (rank + 1) * share))


def local_shape(name: str, shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, ...]:
    """The shape of a rank's part of the parameter `name`, which has `shape` in the unsharded model."""
    dim = split_of_parameter(name).dim
    if dim is None:
        return shape
    return (*shape[:dim], len(part_of(shape[dim], rank, ranks)), *shape[dim + 1 :])
