"""What collectives carry, counted from outside: by looking at every call that reaches the communication library."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
MESSAGES = ("send", "recv_", "broadcast_", "barrier", "allgather_", "recv_any_source_")
"""Calls that are no sums or gathers of tensors of the model: between stages, of objects, of control."""


class CountCollectives(TorchDispatchMode):
    """Bytes and calls by operation, of tensors of one type: the whole tensor that a collective makes or takes.

    With fp32 weights the norms, which are in float64, and counters, which are integers, stay out.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what `func` carries if it is a collective, then call it."""
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name not in MESSAGES:
            # A collective that this does not know would go uncounted.
            assert name in OPERATIONS, f"{name} is not counted"
            tensors = [tensor for part in args[:2] for tensor in (part if isinstance(part, list) else [part])]
            if tensors[0].dtype in (self.dtype, torch.bfloat16):
                self.bytes[OPERATIONS[name]] += max(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
                self.calls[OPERATIONS[name]] += 1
        return func(*args, **(kwargs or {}))
