"""Whole runs of a tiny model, in this process or in one of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.checkpoint.manifest import CHECKPOINTS, is_trimmed, list_checkpoints, step_name, verify
from hope_train.checkpoint.tensors import entries, load_set
from hope_train.train.run import train_command

ROOT = Path(__file__).resolve().parents[2]
STEPS = 9
TIMEOUT = 120.0
"""Seconds after which a process that hangs is killed; nothing takes a tenth of that."""

HOPE = {
    "arch": "hope",
    "memory": {"chunk_size": 16, "generator_chunk_size": 16},
    "cms": {"levels": [{"width": 16, "period": 1}, {"width": 16, "period": 2}, {"width": 16, "period": 4}]},
}
TRANSFORMER = {"arch": "transformer_pp", "mlp_width": 48}
MODELS = {"hope": HOPE, "transformer_pp": TRANSFORMER}

WORDS = (
    *("river", "stone", "lamp", "green", "walked", "under", "seven", "quietly", "the", "a", "of", "into"),
    *("été", "x ="),
)


def write_corpus(folder: Path) -> dict[str, Any]:
    """The data section of a corpus of some 10,000 tokens under a tokenizer of 300 pieces."""
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) + "\n" for _ in range(200)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), encoding="utf-8")
    tokenizer = train_tokenizer(texts, folder / "tiny.model", 300)
    return {
        "sources": [{"path": str(text)}],
        "tokenizer": tokenizer.path,
        "validation_fraction": 0.1,
        "cache_dir": str(folder / "cache"),
    }


def write_config(path: Path, data: dict[str, Any], **more: Any) -> Path:
    """A run of 9 steps of 2 micro-batches of 2 rows of 32 tokens."""
    tree = {
        "name": "tiny",
        "dir": str(path.parent / "{name}"),
        "seed": 3,
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 300, **HOPE},
        "data": data,
        "optimizer": {"lr": 0.01, "schedule": {"kind": "cosine", "warmup_tokens": 384}},
        "train": {
            "context_length": 32,
            "batch_tokens": 128,
            "micro_batch_size": 2,
            "tokens": STEPS * 128,
            "device": "cpu",
            "threads": 1,
        },
        "eval": {"every": 4, "validation_batches": 2},
        "log": {"progress": False},
        **more,
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@dataclass
class Tiny:
    """Starts runs; `name=` chooses the run directory."""

    folder: Path
    config: Path

    def model(self, arch: str) -> list[str]:
        """Overrides for an architecture."""
        if arch == "hope":
            return []
        return ["model.arch=transformer_pp", "model.mlp_width=48", "model.cms.levels=[]"]

    def train(self, name: str, *overrides: str, resume: str = "auto", force: bool = False, json: bool = False) -> int:
        """`hope train` in this process."""
        return train_command(str(self.config), [f"name={name}", *overrides], resume, force, json)

    def spawn(self, name: str, *overrides: str, program: list[str] | None = None, **env: str) -> subprocess.Popen[str]:
        """`hope train` in a process of its own, or another program that takes the same arguments."""
        command = [sys.executable, *(program or ["-m", "hope_train.cli", "train"]), str(self.config), f"name={name}"]
        return subprocess.Popen(
            [*command, *overrides],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def dir(self, name: str) -> Path:
        """The run directory."""
        return self.folder / name

    def checkpoint(self, name: str, step: int) -> Path:
        """A checkpoint's folder."""
        return self.dir(name) / CHECKPOINTS / step_name(step)

    def checkpoints(self, name: str) -> list[str]:
        """Names of the checkpoints that are there, without what remains of others because these refer to it."""
        return [path.name for path in list_checkpoints(self.dir(name) / CHECKPOINTS) if not is_trimmed(path)]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, without what is measured by a clock."""
        measured = {"tokens_per_s", "peak_memory_bytes", "time"}
        return [{k: v for k, v in row.items() if k not in measured} for row in lines(self.dir(name) / "metrics.jsonl")]

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """Lines of eval.jsonl, without the seconds."""
        return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(self.dir(name) / "eval.jsonl")]

    def stopped(self, name: str) -> dict[str, Any]:
        """STOPPED.json."""
        marker: dict[str, Any] = json.loads((self.dir(name) / "STOPPED.json").read_text(encoding="utf-8"))
        return marker


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a process; its output. One that hangs is made to dump its stacks, and killed."""
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(6)  # SIGABRT: faulthandler prints where every thread is
        raise AssertionError(f"hangs:\n{process.communicate()[0]}") from None


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl; a torn one is an error here."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a verified checkpoint: parameters, moments, accumulators, counters."""
    manifest = verify(folder)
    found: dict[str, torch.Tensor] = {}
    for name in manifest.sets:
        place = manifest.set_folder(folder, name)
        tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in entries(place).items()}
        load_set(place, tensors)
        found |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    return found


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same, bit for bit."""
    mine, theirs = read_checkpoint(found), read_checkpoint(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def assert_same_run(tiny: Tiny, found: str, expected: str, step: int = STEPS) -> None:
    """Two runs logged the same, evaluated the same and ended in the same."""
    assert tiny.metrics(found) == tiny.metrics(expected)
    assert tiny.evaluations(found) == tiny.evaluations(expected)
    assert_same_tensors(tiny.checkpoint(found, step), tiny.checkpoint(expected, step))
