"""Random small problems for the memories, and the comparison of two forms of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope_train.config.model import MemoryConfig
from hope_train.memory import chunked, reference
from hope_train.memory.rules import SCALAR_BOXES, Init, initial_std, parameter_shapes

HEADS, WIDTH, BATCH, TOKENS = 2, 3, 2, 19


@dataclass
class Problem:
    """Inputs of one comparison, all float64 leaves."""

    config: MemoryConfig
    init: Init
    z_BTHN: Tensor
    q_BTHN: Tensor | None
    starts_BT: Tensor | None
    weight_BTHN: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """Everything a gradient is asked for: inputs and ALL initial states."""
        return [self.z_BTHN, *([] if self.q_BTHN is None else [self.q_BTHN]), *self.init.values()]


def make_init(config: MemoryConfig, heads: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Init:
    """Initial states as the model draws them."""
    generator = torch.Generator().manual_seed(seed)
    init = {}
    for name, shape in parameter_shapes(config, heads, width).items():
        scale = 1.0 if name == "theta_logit" else initial_std(name, shape)
        init[name] = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    return init


def make_problem(config: MemoryConfig, seed: int, documents: bool) -> Problem:
    """A problem whose documents begin at a chunk's edge, inside one, several in one, and at the first token."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (BATCH, TOKENS, HEADS, WIDTH)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    q = None if config.adaptive_q else torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    starts = None
    if documents:
        starts = torch.rand(BATCH, TOKENS, generator=generator) < 0.1
        starts[0, [4, 13, 14]] = True
        starts[1, [0, 8, 10]] = True
    return Problem(
        config,
        make_init(config, HEADS, WIDTH, seed),
        z,
        q,
        starts,
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| (absolute where want is zero)."""
    scale = want.norm().item()
    return (got - want).norm().item() / (scale if scale > 0 else 1.0)


def flat_state(config: MemoryConfig, state: chunked.MemoryState, which: str, width: int = WIDTH) -> dict[str, Tensor]:
    """States of the chunked form under the reference's names, [B, H, …]."""
    flat = {}
    for group, boxes in zip(state.groups, chunked.groups_of(config), strict=True):
        for name, weight in getattr(group, which).items():
            if name in ("w1", "w1s"):
                parts = weight.permute(1, 2, 0, 3, 4).unbind(0)
                flat |= {
                    f"w1_{box}": w for box, w in zip(boxes.matrix if name == "w1" else boxes.scalar, parts, strict=True)
                }
                continue
            hidden = config.expansion * width
            sizes = [hidden if name == "w2" else (1 if box in SCALAR_BOXES else width) for box in boxes.all]
            split = weight.transpose(0, 1).split(sizes, 2)
            flat |= {f"{name}_{box}": w for box, w in zip(boxes.all, split, strict=True)}
    return flat


def worst_error(problem: Problem, kernels: chunked.Kernels = chunked.PLAIN) -> tuple[float, int]:
    """The chunked form's largest relative error (outputs, states, gradients), and how many matrices were clamped."""
    config = problem.config
    want = reference.run(config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT)
    got, state = chunked.run(config, problem.z_BTHN, problem.q_BTHN, problem.init, problem.starts_BT, kernels=kernels)
    assert want.o_BTHN.abs().max() < 1e3, "the rule itself diverges here: the case tests nothing"
    errors = [relative(got, want.o_BTHN)]
    for which, states in (("now", want.current), ("anchor", want.anchors)):
        flat = flat_state(config, state, which)
        assert flat.keys() == states.keys()
        errors += [relative(flat[name], weight) for name, weight in states.items()]
    want_grads = torch.autograd.grad(
        (want.o_BTHN * problem.weight_BTHN).sum(), problem.leaves, allow_unused=True, materialize_grads=True
    )
    got_grads = torch.autograd.grad(
        (got * problem.weight_BTHN).sum(), problem.leaves, allow_unused=True, materialize_grads=True
    )
    errors += [relative(a, b) for a, b in zip(got_grads, want_grads, strict=True)]
    return max(errors), want.clamped


RULES: list[dict[str, Any]] = [{"kind": "mlp"}, {"kind": "mlp", "rank_one": "w2"}, {"kind": "linear"}]
CHUNKS = [(4, 4), (8, 4), (4, 8), (32, 32)]
MINOR: list[dict[str, Any]] = [
    {"activation": a, "loss_factor": f, "normalize_q": q, "normalize_v": v, "expansion": e, "save_every": s}
    for a, f, (q, v), (e, s) in itertools.product(
        ("silu", "gelu", "relu"), (0.5, 1.0), ((True, True), (False, True), (True, False)), ((1, 1), (2, 2))
    )
]


def all_cases() -> list[tuple[MemoryConfig, bool]]:
    """The cross product of the options that change the recurrence; the others take turns over it."""
    cases = []
    product = itertools.product(
        RULES,
        ("after", "before", "start"),
        ("init", "zero"),
        (1.02, None),
        (False, True),
        (False, True),
        CHUNKS,
        (False, True),
    )
    for number, (rule, read, decay_to, clamp, momentum, adaptive_q, (chunk, generator_chunk), documents) in enumerate(
        product
    ):
        minor = dict(MINOR[(number * 7) % len(MINOR)])
        if rule["kind"] == "linear":
            minor["expansion"] = 1
            clamp = clamp and 0.9  # linear memories hardly grow in 19 tokens
        # These diverge within 19 tokens at full write rate, and then any two orders of summation part ways.
        eta_max = 0.3 if minor["loss_factor"] == 1.0 or momentum else 1.0
        eta_max *= 1.0 if minor["normalize_v"] else 0.1
        config = MemoryConfig(
            **rule,
            **minor,
            eta_max=eta_max,
            # retention as it begins (0.98), and as trained layers may have it (0.12, 2e-3)
            alpha_bias=(4.0, -2.0, 4.0, -6.0)[number // 2 % 4],
            read=read,
            decay_to=decay_to,
            clamp=clamp,
            momentum=momentum,
            adaptive_q=adaptive_q,
            chunk_size=chunk,
            generator_chunk_size=generator_chunk,
        )
        cases.append((config, documents))
    return cases
