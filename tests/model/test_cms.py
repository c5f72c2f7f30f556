"""The chain of levels: its variants against their equations, and weights added per sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hope_train.config.model import CMSConfig, CMSLevelConfig
from hope_train.model.cms import CMS
from hope_train.model.layers import SwiGLU

WIDTH, EPS = 6, 1e-6


def make(variant: str, seed: int = 0, activation: str = "swiglu") -> CMS:
    """Three levels of widths 4, 8 and 5 in float64, every parameter random (norms and mix too)."""
    levels = [
        CMSLevelConfig(width=width, period=period, activation=activation)  # type: ignore[arg-type]
        for width, period in ((4, 1), (8, 2), (5, 8))
    ]
    cms = CMS(WIDTH, CMSConfig(variant=variant, levels=tuple(levels)), EPS).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in cms.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return cms


def tokens(rows: int = 3) -> Tensor:
    return torch.randn(rows, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def branch(cms: CMS, level: int, x: Tensor) -> Tensor:
    """W_down s(W_up norm x), written out."""
    weights = {name.removeprefix(f"levels.{level}."): p for name, p in cms.named_parameters()}
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["norm.weight"]
    up = normed @ weights["up.weight"].T
    if "gate.weight" in weights:
        gate = normed @ weights["gate.weight"].T
        hidden = gate * torch.sigmoid(gate) * up
    else:
        hidden = 0.5 * up * (1.0 + torch.erf(up / 2**0.5))
    return hidden @ weights["down.weight"].T


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_sequential_and_nested_are_a_composition(variant: str, activation: str) -> None:
    """Eqs. 72 and 73 differ in when levels are reset, not in what they compute."""
    cms, x = make(variant, activation=activation), tokens()
    want = x
    for level in range(3):
        want = want + branch(cms, level, want)
    torch.testing.assert_close(cms(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_independent_is_a_weighted_sum_over_one_input(activation: str) -> None:
    """Eq. 74."""
    cms, x = make("independent", activation=activation), tokens()
    assert cms.mix is not None
    want = x + sum(cms.mix[level] * branch(cms, level, x) for level in range(3))
    torch.testing.assert_close(cms(x), want, rtol=1e-12, atol=1e-12)


def test_the_mix_exists_in_the_independent_variant_alone() -> None:
    assert CMS(WIDTH, CMSConfig(variant="independent", levels=(CMSLevelConfig(width=3),)), EPS).mix is not None
    for variant in ("sequential", "nested"):
        assert "mix" not in dict(make(variant).named_parameters())


def test_names_say_the_level() -> None:
    """Who steps when is read off the names; every parameter but the mix belongs to one level."""
    for variant in ("sequential", "nested", "independent"):
        names = [name for name, _ in make(variant).named_parameters() if name != "mix"]
        assert {name.split(".")[1] for name in names} == {"0", "1", "2"}
        assert all(name.startswith("levels.") for name in names)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_weights_added_per_sequence(variant: str, activation: str) -> None:
    """A delta for each sequence gives what a model with those weights gives; levels and matrices may go without."""
    cms, x = make(variant, activation=activation), tokens(rows=3)
    generator = torch.Generator().manual_seed(2)
    matrices = ("up", "gate", "down") if activation == "swiglu" else ("up", "down")
    state: list[dict[str, Tensor] | None] = []
    for number, level in enumerate(cms.levels):
        assert isinstance(level, SwiGLU)
        chosen = matrices if number == 0 else ("down",)
        delta = {
            name: torch.randn(3, *level.get_parameter(f"{name}.weight").shape, dtype=torch.float64, generator=generator)
            for name in chosen
        }
        state.append(None if number == 1 else delta)
    got = cms(x, state)
    for row in range(3):
        own = copy.deepcopy(cms)
        with torch.no_grad():
            for number, delta_or_none in enumerate(state):
                for name, delta_of_all in (delta_or_none or {}).items():
                    own.get_parameter(f"levels.{number}.{name}.weight").add_(delta_of_all[row])
        torch.testing.assert_close(got[row : row + 1], own(x[row : row + 1]), rtol=1e-11, atol=1e-11)


def test_a_delta_of_zeros_changes_nothing_and_gets_gradients() -> None:
    cms, x = make("sequential"), tokens()
    zeros: list[dict[str, Tensor] | None] = [
        {
            name: torch.zeros(3, *level.get_parameter(f"{name}.weight").shape, dtype=torch.float64, requires_grad=True)
            for name in ("up", "gate", "down")
        }
        for level in cms.levels
    ]
    got = cms(x, zeros)
    assert torch.equal(got, cms(x))
    assert torch.equal(cms(x, None), cms(x, [None] * 3))
    leaves = [leaf for delta in zeros for leaf in (delta or {}).values()]
    assert all(grad.abs().min() > 0 for grad in torch.autograd.grad(got.square().sum(), leaves))


@pytest.mark.parametrize("state", [[], [None], [None] * 4])
def test_a_state_for_another_number_of_levels_is_refused(state: list[Any]) -> None:
    with pytest.raises(ValueError):
        make("sequential")(tokens(), state)
