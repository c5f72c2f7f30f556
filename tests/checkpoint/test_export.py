"""One safetensors file with a checkpoint's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hope_train.checkpoint import export
from hope_train.checkpoint.export import consolidate
from hope_train.checkpoint.store import find_checkpoint
from hope_train.checkpoint.tensors import training_state
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.build import build_optimizer
from hope_train.model.hope import HopeModel, build_model
from tests.checkpoint.toy import facts, make_writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saved(run_dir: Path, **model: object) -> tuple[HopeModel, RunConfig]:
    """A run with one checkpoint."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}
    levels = {"levels": [{"width": 16}, {"width": 16, "period": 2}]}
    config = RunConfig.model_validate({"name": "small", "model": {**sizes, "cms": levels, **model}})
    built = build_model(config.model, 1)
    optimizer = build_optimizer(built.named_parameters(), config)
    writer, _ = make_writer(run_dir)
    writer.save(training_state(built, optimizer), facts(5, config=config.model_dump(mode="json")))
    return built, config


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_made_from_the_file_alone(tmp_path: Path, tied: bool) -> None:
    model, config = saved(tmp_path, tie_embeddings=tied)
    written = consolidate(*find_checkpoint(tmp_path), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert RunConfig.model_validate(json.loads(metadata["config"])) == config
    assert (metadata["tokenizer"], metadata["step"], metadata["tokens"]) == ("f" * 64, "5", "50")
    again = build_model(config.model, 2)
    again.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert names == set(model.state_dict())
    assert written["tensors"] == len(names)
    assert written["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert written["bytes"] == (tmp_path / "x.safetensors").stat().st_size


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    saved(tmp_path)
    found, out = find_checkpoint(tmp_path), tmp_path / "x.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        consolidate(*found, out)
    assert out.read_text() == "mine"
    consolidate(*found, out, overwrite=True)
    assert load_file(out)


def test_a_full_disk_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    out = tmp_path / "x.safetensors"
    out.write_text("old")

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        consolidate(*find_checkpoint(tmp_path), out, overwrite=True)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
