"""Kernels per chunk against the operators that the chunk functions dispatch."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hope_train.config.model import MemoryConfig
from hope_train.config.tree import RunConfig
from hope_train.memory import chunked
from hope_train.memory.rules import parameter_shapes
from hope_train.plan.speed import CHUNK_KERNELS, launch_seconds

WITHOUT_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "scalar_tensor"}


class CountKernels(TorchDispatchMode):
    """Counts operators that are neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket.__name__ not in WITHOUT_KERNEL
        return func(*args, **(kwargs or {}))


def kernels(config, tokens):
    """(forward, backward) operators of one layer's memories over `tokens` tokens."""
    init = {name: torch.rand(shape, requires_grad=True) for name, shape in parameter_shapes(config, 1, 8).items()}
    z, q = (torch.rand(1, tokens, 1, 8, requires_grad=True) for _ in range(2))
    with CountKernels() as forward:
        output, _ = chunked.run(config, z, q, init)
    with CountKernels() as backward:
        output.sum().backward()
    return forward.count, backward.count


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize(("main", "generators"), [(64, 64), (64, 32), (32, 64)])
def test_kernels_per_chunk_are_those_dispatched(kind, main, generators):
    config = MemoryConfig(kind=kind, chunk_size=main, generator_chunk_size=generators)
    counted = [more - less for more, less in zip(kernels(config, 256), kernels(config, 128), strict=True)]
    table = CHUNK_KERNELS[kind]
    for measured, direction in zip(counted, (0, 1), strict=True):
        if main == generators:
            expected = 128 / main * table["joint"][direction]
        else:
            expected = 128 / main * table["memory"][direction] + 128 / generators * table["generators"][direction]
        assert expected == pytest.approx(measured, rel=0.1)


def test_shorter_generator_chunks_launch_more():
    def seconds(**memory):
        model = {"arch": "hope", "memory": memory, "cms": {"levels": [{"width": 8}]}}
        return launch_seconds(RunConfig.model_validate({"model": model}))

    assert seconds() < seconds(generator_chunk_size=32) < seconds(generator_chunk_size=16)
    assert seconds(chunk_size=32) < seconds(chunk_size=32, generator_chunk_size=16)
