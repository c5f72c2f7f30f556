"""The whole schedule once more, slowly and plainly, in float64 numpy. Shares no line with what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from hope_train.config.tree import RunConfig
from tests.levels.toy import initial_weights, problem, tokens_of


def level(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("levels") + 1]) if "cms" in parts else None


def factor(run: RunConfig, update: int, total: int, warmup: int) -> float:
    """Learning-rate factor, written from the documentation's words."""
    shape = run.optimizer.schedule
    if update < warmup:
        return update / warmup
    first_full = max(warmup, 1)
    if shape.kind == "constant" or update == first_full:
        return 1.0
    if shape.kind == "cosine":
        share = (update - first_full) / (total - first_full) if total > first_full else 0.0
        return shape.min_ratio + (1 - shape.min_ratio) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
    start = max(first_full, (1 - shape.decay_fraction) * total)
    if update <= start:
        return 1.0
    share = min((update - start) / (total - start), 1.0)
    return 1.0 - (1 - shape.min_ratio) * share


def train(
    run: RunConfig, batches: int, spoil: Callable[[int], bool] = lambda step: False
) -> tuple[list[dict[str, np.ndarray]], dict[int | None, int]]:
    """Weights after every batch, and the number of updates of each level (None: the core)."""
    optimizer, cms = run.optimizer, run.model.cms
    weights = initial_weights(len(cms.levels))
    first = {name: value.copy() for name, value in weights.items()}
    steps_in_all = math.ceil(run.train.tokens / run.train.batch_tokens)
    warmup_steps = math.ceil(optimizer.schedule.warmup_tokens / run.train.batch_tokens)
    keys: list[int | None] = [None, *range(len(cms.levels))]
    period: dict[int | None, int] = {None: 1}
    scale: dict[int | None, float] = {None: 1.0}
    warmup: dict[int | None, int] = {None: warmup_steps}
    for index, cfg in enumerate(cms.levels):
        period[index], scale[index], own = cfg.period, cfg.lr_scale, cfg.warmup_updates
        warmup[index] = own if own is not None else (max(1, warmup_steps // cfg.period) if warmup_steps else 0)

    sums = {name: np.zeros_like(value) for name, value in weights.items()}
    counts = dict.fromkeys(keys, 0)
    updates = dict.fromkeys(keys, 0)
    moment1 = {name: np.zeros_like(value) for name, value in weights.items()}
    moment2 = {name: np.zeros_like(value) for name, value in weights.items()}
    history, step = [], 0
    for batch in range(1, batches + 1):
        if spoil(batch):
            history.append({name: value.copy() for name, value in weights.items()})
            continue
        step += 1
        tokens = tokens_of(batch)
        for name, value in weights.items():
            curvature, target = problem(batch, name, value.shape)
            sums[name] += tokens * curvature * (value - target)
        for key in keys:
            counts[key] += tokens
        due = [key for key in keys if step % period[key] == 0]
        mean = {name: sums[name] / counts[level(name)] for name in weights if level(name) in due}
        for group in {period[key] for key in due}:
            members = [name for name in mean if period[level(name)] == group]
            norm = math.sqrt(sum(float((mean[name] ** 2).sum()) for name in members))
            if run.train.clip_norm is not None and norm + 1e-6 > run.train.clip_norm:
                for name in members:
                    mean[name] = mean[name] * (run.train.clip_norm / (norm + 1e-6))
        for key in due:
            updates[key] += 1
        for name, gradient in mean.items():
            key = level(name)
            rate = optimizer.lr * scale[key]
            rate *= factor(run, updates[key], steps_in_all // period[key], warmup[key])
            beta1, beta2 = optimizer.betas
            decays = name.split(".")[-2] in ("proj", "up", "head")
            value = weights[name] * (1 - rate * (optimizer.weight_decay if decays else 0.0))
            moment1[name] = beta1 * moment1[name] + (1 - beta1) * gradient
            moment2[name] = beta2 * moment2[name] + (1 - beta2) * gradient**2
            corrected1 = moment1[name] / (1 - beta1 ** updates[key])
            corrected2 = moment2[name] / (1 - beta2 ** updates[key])
            weights[name] = value - rate * corrected1 / (np.sqrt(corrected2) + optimizer.eps)
            sums[name] = np.zeros_like(sums[name])
        for key in due:
            counts[key] = 0
        if cms.variant == "nested":
            for slower in due:
                if slower is None or slower == 0:
                    continue
                for name in weights:
                    if level(name) == slower - 1:
                        first[name] = first[name] + cms.nested_rate * (weights[name] - first[name])
                        weights[name] = first[name].copy()
        history.append({name: value.copy() for name, value in weights.items()})
    return history, updates
