"""Which parameters weight decay applies to: one predicate over the unsharded model's names."""

from __future__ import annotations


def is_decayed(parameter_name: str, ndim: int) -> bool:
    """Whether weight decay applies to a parameter of the unsharded model.

    Matrices (two or more dimensions) are decayed, the output head among them. Not decayed: vectors and scalars
    (norm gains, biases, mixing weights), the embedding `embed.weight` (also where the head is tied to it), norm gains
    of any shape (a per-head gain has two dimensions), and everything below a module called `memory`: the learned
    initial states, which decay would pull towards a memory that remembers nothing.
    """
    segments = parameter_name.split(".")
    if ndim < 2 or "embed" in segments or "memory" in segments[:-1]:
        return False
    return not any(segment.endswith("norm") for segment in segments)
