"""The memories over long inputs: finite, bounded, moving, and seldom held by the clamp (docs/living-memory.md).

Head width 64 and default settings in fp32, on three kinds of input: random, coherent (a constant plus 0.1 noise: keys
that hardly differ, which is where naive rules blow up), and what an untrained model gives its memories.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hope_train.config.model import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig
from hope_train.memory import chunked
from hope_train.memory.activity import FRESH_BAND, MOST_HELD, Activity, observe
from hope_train.model.activity import observe_model
from hope_train.model.hope import build_model
from tests.memory.cases import make_init

WIDTH = 64
INPUTS = ("random", "coherent")
KINDS = ("mlp", "linear")

MOST = 3.0
"""No single matrix can be farther away: |W - W_init| <= |W| + |W_init| and the clamp is 2. Measured: 0.96."""


def inputs(name: str, tokens: int, seed: int, heads: int = 1) -> tuple[Tensor, Tensor]:
    """z and q, [1, T, H, 64]."""
    generator = torch.Generator().manual_seed(50 + seed)
    z = torch.randn(1, tokens, heads, WIDTH, generator=generator)
    if name == "coherent":
        z = torch.randn(1, 1, heads, WIDTH, generator=generator) + 0.1 * z
    return z, torch.randn(1, tokens, heads, WIDTH, generator=generator)


def run(config: MemoryConfig, name: str, tokens: int, seed: int) -> Activity:
    z, q = inputs(name, tokens, seed)
    return observe(config, z, None if config.adaptive_q else q, make_init(config, 1, WIDTH, seed, torch.float32))


def finite(activity: Activity) -> bool:
    tensors = [activity.o_BTHN, activity.eta_BTH, activity.alpha_BTH]
    return all(t.isfinite().all() for t in (*tensors, *(part.norm for part in activity.matrices.values())))


@pytest.mark.parametrize("read", ["after", "before", "start"])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_and_bounded_over_16k_tokens(kind: str, name: str, read: str) -> None:
    """Answers stay near the length of a query (1): measured at most 1.69 for MLP memories, 0.68 for linear ones."""
    config = MemoryConfig(kind=kind, read=read)  # type: ignore[arg-type]
    z, q = inputs(name, 16_384, seed=0)
    init = make_init(config, 1, WIDTH, 0, torch.float32)
    with torch.no_grad():
        o, state = chunked.run(config, z, q, init)
    assert o.isfinite().all()
    assert o.norm(dim=-1).max() < 4.0
    for group in state.groups:
        assert all(weight.isfinite().all() for weight in group.now.values())


@pytest.mark.parametrize(
    "changes", [{"momentum": True, "eta_max": 0.3}, {"adaptive_q": True}, {"decay_to": "zero"}], ids=str
)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_options_are_finite_over_4k_tokens(kind: str, name: str, changes: dict[str, Any]) -> None:
    seen = run(MemoryConfig(kind=kind, **changes), name, 4096, seed=1)  # type: ignore[arg-type]
    assert finite(seen)
    assert max(part.norm.max() for part in seen.matrices.values()) <= 2.0 * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_on_random_input_do_not_grow_with_length(kind: str, seed: int) -> None:
    """With respect to inputs and all initial states; a loss whose own gradient has norm 1 at every length."""
    norms = []
    for tokens in (128, 2048):
        grads = gradients(kind, "random", tokens, seed)
        assert all(grad.isfinite().all() for grad in grads.values())
        norms.append(max(grad.norm().item() for grad in grads.values()))
    assert norms[1] < 2 * norms[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_on_coherent_input_are_finite(kind: str, seed: int) -> None:
    """Finite, and bounded for the main memory. Those of the generators, which feed back into themselves, may be
    large."""
    grads = gradients(kind, "coherent", 2048, seed)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(grad.norm() > 0 for grad in grads.values())
    assert max(grad.norm() for name, grad in grads.items() if name.endswith("_mem")) < 30


def gradients(kind: str, name: str, tokens: int, seed: int) -> dict[str, Tensor]:
    """Of a random read-out whose weights have norm 8 in all, by the name of the leaf."""
    config = MemoryConfig(kind=kind)  # type: ignore[arg-type]
    init = make_init(config, 1, WIDTH, seed, torch.float32)
    z, q = inputs(name, tokens, seed)
    leaves = {"z": z.requires_grad_(), "q": q.requires_grad_(), **init}
    o, _ = chunked.run(config, z, q, init)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed)) / tokens**0.5
    return dict(zip(leaves, torch.autograd.grad((o * weight).sum(), list(leaves.values())), strict=True))


# Alive


def held_share(seen: Activity) -> float:
    """Share of all (chunk, sequence, head, matrix) that the clamp held."""
    return torch.cat([part.held.flatten() for part in seen.matrices.values()]).double().mean().item()


def check_alive(seen: Activity) -> None:
    for box in ("k", "v", "mem"):
        matrices = seen.box(box)
        assert FRESH_BAND[0] < matrices.deviation.mean() < FRESH_BAND[1], box
        assert matrices.deviation.max() <= MOST, box
        assert matrices.deviation.min() > 1e-3, box
    for box in ("eta", "alpha"):
        assert 0.01 < seen.box(box).deviation.mean() < 0.6, box
    assert held_share(seen) <= MOST_HELD


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_in_their_band(kind: str, name: str, seed: int) -> None:
    check_alive(run(MemoryConfig(kind=kind), name, 4096, seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_in_their_band_in_a_model(kind: str) -> None:
    """Every layer of an untrained model; eta near 0.12 and alpha near 0.982, where they are meant to begin."""
    config = ModelConfig(
        d_model=128,
        n_layers=2,
        n_heads=2,
        vocab_size=256,
        memory=MemoryConfig(kind=kind),  # type: ignore[arg-type]
        cms=CMSConfig(levels=(CMSLevelConfig(width=64),)),
    )
    for seed in range(2):
        tokens = torch.randint(0, 256, (1, 2048), generator=torch.Generator().manual_seed(seed))
        for seen in observe_model(build_model(config, seed), tokens).values():
            check_alive(seen)
            assert 0.1 < seen.eta_BTH.mean() < 0.15
            assert 0.975 < seen.alpha_BTH.mean() < 0.987


def test_linear_memories_move_as_far_as_theory_says() -> None:
    """A random walk that decay pulls back. With random keys each write adds on average eta^2 |W_init (2k - v)|^2, 5/4
    eta^2 by the scale of W_init (|W_init k| is 1/2), and decay takes a share 2 (1 - alpha) of |D|^2; the mean of the
    writes adds eta / n / (1 - alpha + eta / n) of |W_init|. With the means of eta and alpha in place of their
    distribution: a quarter either way."""
    seen = run(MemoryConfig(kind="linear"), "random", 4096, seed=0)
    eta, loss = seen.eta_BTH.mean().item(), 1 - seen.alpha_BTH.mean().item()
    size = 0.5 * WIDTH**0.5
    drift = eta / WIDTH / (loss + eta / WIDTH)
    noise = (1.25 * eta**2 / (2 * (loss + eta / WIDTH))) ** 0.5 / size
    expected = (drift**2 + noise**2) ** 0.5
    assert seen.box("mem").deviation[5:].mean().item() == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_without_writes_nothing_moves(kind: str) -> None:
    """The lower end of the band means something."""
    seen = run(MemoryConfig(kind=kind, eta_max=0.0), "random", 512, seed=0)  # type: ignore[arg-type]
    assert max(part.deviation.max() for part in seen.matrices.values()) < 1e-6


def test_the_clamp_is_what_saves_a_memory_that_forgets_nothing() -> None:
    """alpha = 1 and eta = 0.5 on coherent input: bounded with the clamp (which then holds a large share), without it
    not."""
    rates: dict[str, Any] = {"alpha_bias": 30.0, "eta_bias": 0.0}
    held = run(MemoryConfig(**rates), "coherent", 4096, seed=1)
    assert finite(held)
    assert max(part.norm.max() for part in held.matrices.values()) <= 2.0 * (1 + 1e-5)
    assert held_share(held) > 0.05
    loose = run(MemoryConfig(**rates, clamp=None), "coherent", 4096, seed=1)
    assert not finite(loose) or max(part.norm.max() for part in loose.matrices.values()) > 10
    assert held_share(loose) == 0.0
