"""The chunk functions through torch.compile: the same functions, with their element-wise work fused.

Only whole chunks take this path: a run has one or two shapes of them, while lengths of left-over pieces vary freely
and would each be compiled anew. The share of activations that compiled code keeps for backward is a budget (the rest
is recomputed, cheapest first). On some processors the products go through a kernel of ours (`cpu_products`), or whole
chunks do (`cpu_piece`, which keeps next to nothing, whatever the budget).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from hope_train.memory import cpu_piece, cpu_products, pieces
from hope_train.memory.chunked import Kernels

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.lru_cache(maxsize=4)
def compiled_kernels(budget: float = 1.0) -> Kernels:
    """The chunk functions compiled with an activation budget in [0, 1]; 1 recomputes only what is free."""
    return Kernels(
        compile_with_budget(pieces.joint_piece, budget, own_products=True),
        compile_with_budget(pieces.generator_piece, budget, own_products=True),
        compile_with_budget(pieces.memory_piece, budget, own_products=True),
        cpu_piece.ROW,
    )


def compile_with_budget(
    function: Function, budget: float, own_products: bool = False, backend: str = "inductor"
) -> Function:
    """`function` compiled for fixed shapes; `own_products`: with our kernel, where this processor gains from it."""
    # as an option of this one compilation: its backward is compiled later, outside of this call
    ours = own_products and cpu_products.load()
    options: dict[str, Any] | None = {"post_grad_custom_post_pass": UseOurProducts()} if ours else None
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        import torch._functorch.config as functorch_config

        with functorch_config.patch(activation_memory_budget=budget):
            return compiled(*arguments)

    return call  # type: ignore[return-value]


class UseOurProducts(CustomGraphPass):
    """The compiler's graph with its batched float32 products on the CPU replaced by ours."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            result = node.meta.get("val")
            if not isinstance(result, Tensor) or result.device.type != "cpu" or result.dtype != torch.float32:
                continue
            if isinstance(result.shape[-1], int) and result.shape[-1] % cpu_products.LANES == 0:
                node.target = torch.ops.hope.bmm.default

    def uuid(self) -> Any:
        """What the compiler's cache knows this pass by."""
        return get_hash_for_files((__file__, *map(str, (*cpu_products.SOURCES, *cpu_products.HEADERS))))
