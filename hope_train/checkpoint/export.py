"""The weights of a checkpoint as one safetensors file, for use elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hope_train import __version__
from hope_train.checkpoint.manifest import Manifest
from hope_train.checkpoint.sets import is_accumulator_set
from hope_train.checkpoint.tensors import OPTIMIZER, entries, load_set
from hope_train.errors import UserError


def read_weights(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """All weights of a verified checkpoint in host memory, in the types and under the names they were saved with."""
    weights: dict[str, torch.Tensor] = {}
    for name in manifest.sets:
        if is_accumulator_set(name):
            continue
        place = manifest.set_folder(folder, name)
        part = {
            key: torch.empty(shape, dtype=dtype)
            for key, (shape, dtype) in entries(place).items()
            if not key.startswith(OPTIMIZER)
        }
        load_set(place, part)
        weights |= part
    return dict(sorted(weights.items()))


def consolidate(folder: Path, manifest: Manifest, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the weights of a verified checkpoint into the file `out`, whole or not at all.

    The file's metadata has `config` (the run's configuration as JSON), `tokenizer` (its fingerprint), `step`, `tokens`
    and `hope_train` (the version). Returns what was written: tensors, parameters, bytes.

    Raises UserError if the file is there already, or cannot be written.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder: name the file to write")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already: choose another name, or say --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}")
    weights = read_weights(folder, manifest)
    metadata = {
        "format": "pt",
        "hope_train": __version__,
        "step": str(manifest.step),
        "tokens": str(manifest.tokens),
        "tokenizer": manifest.tokenizer,
        "config": json.dumps(manifest.config, ensure_ascii=False),
    }
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save_file(weights, temporary, metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{out} cannot be written: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "file": str(out),
        "checkpoint": str(folder),
        "step": manifest.step,
        "tensors": len(weights),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "bytes": out.stat().st_size,
    }
