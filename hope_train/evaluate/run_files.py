"""What measuring and sampling need beside the weights of a checkpoint: its tokenizer and a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipelines.tokenizer import Tokenizer
from hope_train.config.load import apply_override
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError

TOKENIZER_FILE = "tokenizer.model"


def checkpoint_tokenizer(path: str | Path, config: RunConfig, fingerprint: str) -> Tokenizer:
    """The tokenizer that the checkpoint at `path` (a run directory, or a checkpoint in one) was trained with.

    It is the copy in the run directory; where that is gone, the file that the configuration names.

    Args:
        fingerprint: of the tokenizer, from the checkpoint's manifest.

    Raises:
        UserError: no tokenizer is there, or only another one: figures and text would be nonsense.
    """
    place = Path(path)
    wanted = [folder / TOKENIZER_FILE for folder in (place, *place.resolve().parents[:2])]
    if config.data.tokenizer is not None:
        wanted.append(Path(config.data.tokenizer).expanduser())
    others = []
    for file in wanted:
        if not file.is_file():
            continue
        tokenizer = Tokenizer(file, lossy=fingerprint.endswith("-lossy"))
        if tokenizer.fingerprint == fingerprint:
            if tokenizer.vocab_size != config.model.vocab_size:
                raise UserError(
                    f"tokenizer {file} has {tokenizer.vocab_size} pieces, the model of {path} {config.model.vocab_size}"
                )
            return tokenizer
        others.append(f"{file} has {tokenizer.fingerprint[:12]}")
    if others:
        raise UserError(
            f"{path} was trained with tokenizer {fingerprint[:12]}, but {', '.join(others)}: put the right file at "
            f"{TOKENIZER_FILE} in the run directory"
        )
    raise UserError(
        f"{path} has no tokenizer: put the one it was trained with at {TOKENIZER_FILE} in the run directory"
    )


def pick_device(name: str) -> torch.device:
    """`train.device` as a torch device; `auto` is cuda where there is one. Raises UserError for a missing cuda."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device: say train.device=cpu")
    return torch.device(name)


def allowed_overrides(overrides: Sequence[str], free: tuple[str, ...], command: str) -> dict[str, Any]:
    """The tree that overrides make of a checkpoint's configuration. Raises UserError for what the checkpoint fixes."""
    chosen: dict[str, Any] = {}
    for text in overrides:
        if not text.startswith(free):
            raise UserError(f"override {text!r}: the checkpoint fixes that; {command} takes {', '.join(free)}")
        apply_override(chosen, text)
    return chosen


def prepare_device(chosen: Mapping[str, Any]) -> torch.device:
    """The device that `train.device` of such a tree means, and `train.threads` set. Raises UserError."""
    settings = chosen.get("train") or {}
    if isinstance(settings.get("threads"), int):
        torch.set_num_threads(settings["threads"])
    return pick_device(settings.get("device") or "auto")
