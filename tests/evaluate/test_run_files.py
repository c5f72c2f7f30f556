"""The tokenizer beside a checkpoint, and the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.errors import UserError
from hope_train.evaluate.run_files import checkpoint_tokenizer, pick_device
from tests.evaluate.tiny import run_config, wikitext_like


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Another tokenizer with as many pieces."""
    return train_tokenizer([wikitext_like(3)], tmp_path_factory.mktemp("other") / "other.model", 400)


def test_the_copy_in_the_run_directory_is_found_from_the_run_and_from_a_checkpoint(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = run_config("hope", tokenizer.vocab_size)
    tokenizer.save(tmp_path / "tokenizer.model")
    checkpoint = tmp_path / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    for place in (tmp_path, checkpoint, checkpoint.parent):
        assert checkpoint_tokenizer(place, config, tokenizer.fingerprint).fingerprint == tokenizer.fingerprint


def test_the_file_of_the_configuration_stands_in(tokenizer: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "original.model")
    other.save(tmp_path / "tokenizer.model")
    config = run_config("hope", tokenizer.vocab_size, data={"tokenizer": str(tmp_path / "original.model")})
    assert checkpoint_tokenizer(tmp_path, config, tokenizer.fingerprint).path == str(tmp_path / "original.model")


def test_another_tokenizer_is_refused(tokenizer: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    other.save(tmp_path / "tokenizer.model")
    config = run_config("hope", tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"was trained with tokenizer {tokenizer.fingerprint[:12]}, but .* has "):
        checkpoint_tokenizer(tmp_path, config, tokenizer.fingerprint)


def test_no_tokenizer_at_all(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        checkpoint_tokenizer(tmp_path, run_config("hope", tokenizer.vocab_size), tokenizer.fingerprint)


def test_a_tokenizer_that_does_not_fit_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"has 400 pieces, the model of .* 401"):
        checkpoint_tokenizer(tmp_path, run_config("hope", 401), tokenizer.fingerprint)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
