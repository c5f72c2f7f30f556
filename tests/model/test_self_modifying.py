"""The mixer around the memories: convolution, projections, and heads that know nothing of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hope_train.model.self_modifying import SelfModifyingTitans
from tests.model.small import relative, small_config

TOKENS = 19


def make(**memory: Any) -> SelfModifyingTitans:
    mixer = SelfModifyingTitans(small_config(memory=memory)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return mixer


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [1, 2, 4, 30])
def test_inputs_of_the_memories(window: int) -> None:
    """z = SiLU(conv(W_x x)), causal; q = W_q x without the convolution. A window longer than the text included."""
    mixer, x = make(conv_width=window), inputs()
    assert mixer.in_proj is not None
    assert mixer.q_proj is not None
    with torch.no_grad():
        z, q = mixer.before(x)
        u = (x @ mixer.in_proj.weight.T).mT
        if mixer.conv is not None:
            u = torch.nn.functional.conv1d(torch.nn.functional.pad(u, (window - 1, 0)), mixer.conv.weight, groups=12)
        assert (mixer.conv is None) == (window == 1)
        assert relative(z.flatten(2), torch.nn.functional.silu(u.mT)) < 1e-12
        assert q is not None
        assert relative(q.flatten(2), x @ mixer.q_proj.weight.T) < 1e-12


def test_without_an_input_projection_the_heads_slice_x() -> None:
    mixer, x = make(in_proj=False, conv_width=1, adaptive_q=True), inputs()
    z, q = mixer.before(x)
    assert q is None
    assert torch.equal(z.flatten(2), torch.nn.functional.silu(x))
    assert {name.split(".")[0] for name, _ in mixer.named_parameters()} == {"memory", "out_norm", "out_proj"}


def test_taps_do_not_reach_into_another_document() -> None:
    mixer, x = make(), inputs()
    starts = torch.zeros(2, TOKENS, dtype=torch.bool)
    starts[:, [6, 7]] = True
    with torch.no_grad():
        z, _ = mixer.before(x, starts)
        for first, last in ((0, 6), (6, 7), (7, TOKENS)):
            alone, _ = mixer.before(x[:, first:last])
            assert relative(z[:, first:last], alone) < 1e-12


@pytest.mark.parametrize("memory", [{}, {"kind": "linear"}, {"adaptive_q": True, "momentum": True}], ids=str)
def test_heads_can_live_on_different_devices(memory: dict[str, Any]) -> None:
    """Two mixers with one head's rows each: their outputs add up to the whole one's."""
    mixer, x = make(**memory), inputs()
    with torch.no_grad():
        total = torch.zeros_like(x)
        for head in range(2):
            rows = slice(6 * head, 6 * head + 6)
            part = SelfModifyingTitans(small_config(d_model=6, n_heads=1, memory=memory)).double()
            own = {}
            for name, parameter in mixer.named_parameters():
                if name.startswith("memory."):
                    own[name] = parameter[head : head + 1]
                elif name == "out_proj.weight":
                    own[name] = parameter[:, rows]  # row-parallel
                else:
                    own[name] = parameter[rows]  # column-parallel
            for name, values in own.items():
                module, _, last = name.rpartition(".")
                setattr(part.get_submodule(module), last, torch.nn.Parameter(values.clone()))
            total += part(x)
        assert relative(total, mixer(x)) < 1e-12


def test_the_output_norm_is_per_head() -> None:
    """Scaling one head's answers changes nothing: each is normalised by itself."""
    mixer, x = make(), inputs()
    o = torch.randn(2, TOKENS, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scaled = o * torch.tensor([1.0, 50.0], dtype=torch.float64)[:, None]
    with torch.no_grad():
        assert relative(mixer.after(scaled, x), mixer.after(o, x)) < 1e-5
