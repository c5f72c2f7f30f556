"""Every parameter of a model by name and shape, counted without building it (no torch).

Names are those of the unsharded model (`blocks.3.mixer.out_proj.weight`); a test holds them to the built one's, so
that a plan is exact to the last parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from hope_train.config.model import CMSLevelConfig, MemoryConfig, ModelConfig

Shape = tuple[int, ...]

WIDE_BOXES = ("k", "v", "mem")
"""Memories that return a vector of the head's width; `q` joins them when `memory.adaptive_q`."""

SCALAR_BOXES = ("eta", "alpha")
"""Memories that return one number per token: the write rate and the retention."""


def memory_boxes(memory: MemoryConfig) -> tuple[str, ...]:
    """The memories of one head, `k, v, eta, alpha, mem` and `q` where it is adaptive (Eqs. 83-87)."""
    return (*(("q",) if memory.adaptive_q else ()), "k", "v", "eta", "alpha", "mem")


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every parameter of `build_model(model)`."""
    width = model.d_model
    shapes: dict[str, Shape] = {"embed.weight": (model.vocab_size, width)}
    for index in range(model.n_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in _block(model)}
    shapes["norm.weight"] = (width,)
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, width)
    return shapes


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters, the embedding (and an untied head) included."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def counts_by_component(model: ModelConfig) -> dict[str, int]:
    """Parameters per component, in the order a token meets them; the values add up to `parameter_count`."""
    counts: dict[str, int] = {}
    for name, shape in parameter_shapes(model).items():
        key = component_of(name, model.arch)
        counts[key] = counts.get(key, 0) + math.prod(shape)
    order = ["embedding", "mixer projections", "convolution", "memory initial states", "attention", "mlp"]
    levels = sorted((key for key in counts if key.startswith("cms level")), key=lambda key: int(key.split()[-1]))
    order += [*levels, "cms mix", "norms", "output head"]
    return {key: counts[key] for key in order if key in counts}


def level_counts(model: ModelConfig) -> dict[int, int]:
    """Parameters per CMS level over all blocks, each level's norm included: what is stepped every `period` steps."""
    counts = dict.fromkeys(range(len(model.cms.levels)), 0)
    for name, shape in parameter_shapes(model).items():
        match = re.search(r"\.cms\.levels\.(\d+)\.", name)
        if match:
            counts[int(match[1])] += math.prod(shape)
    return counts


def component_of(name: str, arch: str) -> str:
    """The component a parameter belongs to, from its name and the architecture."""
    level = re.search(r"\.cms\.levels\.(\d+)\.", name)
    if level:
        return f"cms level {level[1]}"
    if name.startswith("embed."):
        return "embedding"
    if name.startswith("head."):
        return "output head"
    if ".cms." in name:
        return "cms mix"
    if "norm" in name.removesuffix(".weight").rsplit(".", 1)[-1]:
        return "norms"
    if ".mlp." in name:
        return "mlp"
    if ".mixer.memory." in name:
        return "memory initial states"
    if ".mixer.conv." in name:
        return "convolution"
    return "mixer projections" if arch == "hope" else "attention"


def memory_state_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Fast weights of one layer's memories, `w2_k`, `w1_k`, …: [H, rows, columns], the state a sequence carries."""
    memory, heads, width = model.memory, model.n_heads, model.head_dim
    hidden = memory.expansion * width
    shapes: dict[str, Shape] = {}
    for box in memory_boxes(memory):
        rows = 1 if box in SCALAR_BOXES else width
        if memory.kind == "linear":
            shapes[f"w_{box}"] = (heads, rows, width)
        else:
            shapes[f"w2_{box}"] = (heads, hidden, width)
            shapes[f"w1_{box}"] = (heads, rows, hidden)
    return shapes


def _block(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield "mixer_norm.weight", (model.d_model,)
    for name, shape in _hope_mixer(model) if model.arch == "hope" else _attention(model):
        yield f"mixer.{name}", shape
    if model.arch == "transformer_pp":
        assert model.mlp_width is not None, "the configuration tree demands it"
        for name, shape in _mlp(model.d_model, model.mlp_width, gated=True):
            yield f"mlp.{name}", shape
        return
    for index, level in enumerate(model.cms.levels):
        for name, shape in _level(model.d_model, level):
            yield f"cms.levels.{index}.{name}", shape
    if model.cms.variant == "independent":
        yield "cms.mix", (len(model.cms.levels),)


def _hope_mixer(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    memory, width = model.memory, model.d_model
    if memory.in_proj:
        yield "in_proj.weight", (width, width)
    if not memory.adaptive_q:
        yield "q_proj.weight", (width, width)
    if memory.conv_width > 1:
        yield "conv.weight", (width, 1, memory.conv_width)
    yield "out_norm", (width,)
    yield "out_proj.weight", (width, width)
    for name, shape in memory_state_shapes(model).items():
        yield f"memory.{name}", shape
    if memory.momentum:
        yield "memory.theta_logit", (model.n_heads,)


def _attention(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield f"{name}.weight", (model.d_model, model.d_model)


def _level(width: int, level: CMSLevelConfig) -> Iterator[tuple[str, Shape]]:
    return _mlp(width, level.width, gated=level.activation == "swiglu")


def _mlp(width: int, hidden: int, gated: bool) -> Iterator[tuple[str, Shape]]:
    yield "norm.weight", (width,)
    yield "up.weight", (hidden, width)
    if gated:
        yield "gate.weight", (hidden, width)
    yield "down.weight", (width, hidden)
