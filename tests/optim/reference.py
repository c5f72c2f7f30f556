"""Every rule once more for one matrix, slowly and plainly, in float64 numpy. Shares no line with what it checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hope_train.config.train import OptimizerConfig

Update = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(weights, gradient, rate) -> new weights; remembers."""


def orthogonal(matrix: np.ndarray, config: OptimizerConfig) -> np.ndarray:
    """Newton-Schulz through the singular values: on each the iteration is the polynomial a s + b s^3 + c s^5."""
    schulz = config.newton_schulz
    size = max(math.sqrt((matrix**2).sum()), schulz.eps)
    u, s, v = np.linalg.svd(matrix / size, full_matrices=False)
    for _ in range(schulz.steps):
        a, b, c = schulz.coefficients
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ v


def scaled(matrix: np.ndarray, config: OptimizerConfig) -> np.ndarray:
    rows, columns = matrix.shape
    kind = config.newton_schulz.scale
    factor = {
        "none": 1.0,
        "original": max(1, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
    }
    return factor[kind] * orthogonal(matrix, config)


def adamw(config: OptimizerConfig) -> Update:
    state: dict[str, Any] = {"t": 0, "m": 0.0, "v": 0.0}

    def update(w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        (b1, b2), state["t"] = config.betas, state["t"] + 1
        state["m"] = b1 * state["m"] + (1 - b1) * g
        state["v"] = b2 * state["v"] + (1 - b2) * g * g
        m, v = state["m"] / (1 - b1 ** state["t"]), state["v"] / (1 - b2 ** state["t"])
        return w * (1 - lr * config.weight_decay) - lr * m / (np.sqrt(v) + config.eps)

    return update


def descent(momentum: float, nesterov: bool, config: OptimizerConfig) -> Update:
    state: dict[str, Any] = {"m": 0.0}

    def update(w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        state["m"] = momentum * state["m"] + g
        direction = g + momentum * state["m"] if nesterov else state["m"]
        return w * (1 - lr * config.weight_decay) - lr * direction

    return update


def muon(config: OptimizerConfig) -> Update:
    state: dict[str, Any] = {"m": 0.0}

    def update(w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        mu = config.muon.momentum
        state["m"] = mu * state["m"] + (1 - mu) * g
        direction = (1 - mu) * g + mu * state["m"] if config.muon.nesterov else state["m"]
        return w * (1 - lr * config.weight_decay) - lr * scaled(direction, config)

    return update


def m3(config: OptimizerConfig) -> Update:
    """Algorithm 1 with its buffer of the last f gradients kept as a list."""
    c = config.m3
    b1, b2, b3 = c.betas
    state: dict[str, Any] = {"t": 0, "m1": 0.0, "m2": 0.0, "v": 0.0, "o2": 0.0, "last": []}

    def update(w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        state["t"] += 1
        state["last"].append(g)
        if c.accumulation == "ema":
            state["m1"] = b1 * state["m1"] + (1 - b1) * g
            state["v"] = b2 * state["v"] + (1 - b2) * g * g
            v = state["v"] / (1 - b2 ** state["t"])
        else:
            state["m1"] = state["m1"] + b1 * g
            v = state["v"] = state["v"] + b2 * g * g
        change = (orthogonal(state["m1"], config) + c.alpha * state["o2"]) / (np.sqrt(v) + c.eps)
        if c.rescale:
            change = 0.2 * change / np.sqrt((change**2).mean())
        if len(state["last"]) == c.slow_period:
            kept, weight = (b3, 1 - b3) if c.accumulation == "ema" else (1.0, b3)
            state["m2"] = kept * state["m2"] + weight * sum(state["last"])
            state["o2"], state["last"] = orthogonal(state["m2"], config), []
        return w * (1 - lr * config.weight_decay) - lr * change

    return update


def delta_momentum(config: OptimizerConfig) -> Update:
    state: dict[str, Any] = {"m": 0.0}

    def update(w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        factor = config.delta_momentum.alpha * np.eye(g.shape[1]) - g.T @ g / (g**2).sum()
        state["m"] = (state["m"] @ factor if isinstance(state["m"], np.ndarray) else 0.0) + g
        change = state["m"] if config.delta_momentum.output == "linear" else scaled(state["m"], config)
        return w * (1 - lr * config.weight_decay) - lr * change

    return update


def deep_momentum(config: OptimizerConfig, start: np.ndarray) -> Update:
    """The MLP row by row; its gradient by finite differences would not reach 1e-6, so the chain rule is written out.

    start: W2 [h, I].
    """
    c = config.deep_momentum
    state = {"w1": np.zeros(start.T.shape), "w2": start.copy()}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def update(w: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        w1, w2 = state["w1"], state["w2"]
        inputs = g / np.sqrt((g**2).mean())
        d1, d2, hidden_size, input_size = np.zeros_like(w1), np.zeros_like(w2), 0.0, 0.0
        for u in inputs:
            z = w2 @ u
            h = z * sigmoid(z)
            error = w1 @ h - u
            slope = sigmoid(z) + z * sigmoid(z) * (1 - sigmoid(z))
            d1 += np.outer(error, h) / len(inputs)
            d2 += np.outer((w1.T @ error) * slope, u) / len(inputs)
            hidden_size += h @ h / len(inputs)
            input_size += u @ u / len(inputs)
        state["w1"] = c.alpha * w1 - c.rate / (1 + c.rate * hidden_size) * d1
        state["w2"] = w2 - c.rate / (1 + c.rate * (w1**2).sum() * input_size) * d2
        z = inputs @ state["w2"].T
        change = (z * sigmoid(z)) @ state["w1"].T
        if c.output == "newton_schulz":
            change = scaled(change, config)
        return w * (1 - lr * config.weight_decay) - lr * change

    return update
