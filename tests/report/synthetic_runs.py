"""Run directories as the trainer writes them, made up: a loss that falls, levels that step when due."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

BATCH_TOKENS = 4096


def metrics_line(step: int, steps: int, periods: tuple[int, ...] = (1, 2, 4, 8), offset: float = 0.0) -> dict[str, Any]:
    """One line of metrics.jsonl. The noise is a function of the step alone."""
    noise = random.Random(step)
    rate = 3e-3 * min(1.0, step / 10) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    levels: dict[str, Any] = {
        "core": {"period": 1, "updates": step, "due": True, "lr": rate, "grad_norm": 0.9, "update_ratio": rate * 0.8}
    }
    for index, period in enumerate(periods):
        due = step % period == 0
        levels[str(index)] = {
            "period": period,
            "updates": step // period,
            "due": due,
            "lr": rate * period**0.25,
            "grad_norm": (0.4 + 0.05 * noise.random()) / period**0.5,
            "update_ratio": rate * period**0.25 * (1 + 0.2 * noise.random()) if due else None,
        }
    return {
        "step": step,
        "tokens": step * BATCH_TOKENS,
        "loss": 3.2 + offset + 5.1 * math.exp(-6 * step / steps) + 0.12 * noise.gauss(0, 1),
        "lr": rate,
        "grad_norm": 0.6 + 2 * math.exp(-9 * step / steps) + 0.1 * noise.random(),
        "tokens_per_s": 2400 + 60 * noise.gauss(0, 1),
        "peak_memory_bytes": 700 << 20,
        "time": 1.7e9 + step,
        "levels": levels,
    }


def eval_line(step: int, steps: int, split: str = "validation", offset: float = 0.0, **more: Any) -> dict[str, Any]:
    """One line of eval.jsonl with a word_ppl."""
    nats = 5.3 + offset + 4.0 * math.exp(-5 * step / steps)
    return {
        "step": step,
        "tokens": step * BATCH_TOKENS,
        "split": split,
        "source": "wikitext-2-raw-v1",
        "protocol": "word",
        "word_ppl": math.exp(nats),
        "byte_ppl": math.exp(nats / 5.36),
        "bits_per_byte": nats / 5.36 / math.log(2),
        **more,
    }


def write_run(
    folder: Path,
    steps: int = 150,
    name: str | None = None,
    arch: str = "hope",
    periods: tuple[int, ...] = (1, 2, 4, 8),
    offset: float = 0.0,
    evals: bool = True,
    reason: str | None = "completed",
) -> Path:
    """Write a whole run directory and return it."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", [metrics_line(step, steps, periods, offset) for step in range(1, steps + 1)])
    lines = []
    if evals:
        for step in range(0, steps + 1, max(1, steps // 6)):
            lines.append(eval_line(step, steps, offset=offset, partial=True, pages=8))
            validation = {"step": step, "tokens": step * BATCH_TOKENS, "split": "validation", "source": "training text"}
            lines.append({**validation, "validation_loss": 3.35 + offset + 5.1 * math.exp(-6 * step / steps)})
        lines.append(eval_line(steps, steps, "test", offset))
    write_lines(folder / "eval.jsonl", lines)
    (folder / "config.yaml").write_text(f"name: {name or folder.name}\nmodel: {{arch: {arch}, d_model: 128}}\n")
    if reason:
        (folder / "STOPPED.json").write_text(json.dumps({"reason": reason, "step": steps}))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
