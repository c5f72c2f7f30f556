"""Small models and a small text in WikiText's form, for the tests of evaluation and generation."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from data_pipelines.tokenizer import Tokenizer
from data_pipelines.tokenizer_training import train_tokenizer
from hope_train.checkpoint.fence import Fence
from hope_train.checkpoint.tensors import model_state
from hope_train.checkpoint.writer import CheckpointWriter, Facts
from hope_train.config.model import ModelConfig
from hope_train.config.tree import RunConfig
from hope_train.evaluate.scoring import Scorer
from hope_train.model.hope import HopeModel, build_model

ARCHS = ("hope", "hope_attention", "transformer_pp")

TEXT = (
    'the of lobster was in 1994 New York 3 @.@ 5 metres ( or more ) , and it @-@ self said ; " quite so " \'s 20 '
    "@,@ 000 café ° N naïve [ sic ] 漢字 its ' own ' claws : blue . which ! dogs ' tails ? species game ship album song"
)
WORDS = TEXT.split()


def tiny_config(arch: str, vocab_size: int, **changes: object) -> ModelConfig:
    """Two layers of width 16. Chunks of 16 and 8, so that windows hold several and end inside one."""
    tree: dict[str, object] = {"arch": arch, "d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": vocab_size}
    # Weights far from their small initial values: predictions that differ from token to token.
    tree["init_std"] = 0.3
    if arch == "transformer_pp":
        tree["mlp_width"] = 24
    else:
        tree["cms"] = {"levels": [{"width": 12, "period": 1}, {"width": 8, "period": 4}]}
    if arch == "hope":
        tree["memory"] = {"chunk_size": 16, "generator_chunk_size": 8}
    return ModelConfig.model_validate({**tree, **changes})


def tiny_model(arch: str, vocab_size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> HopeModel:
    """A model with random weights."""
    return build_model(tiny_config(arch, vocab_size), seed).to(dtype)


def scorer(model: HopeModel, eot_id: int, batch_size: int = 3, chunk: int = 37, precision: str = "fp32") -> Scorer:
    """With an odd batch and chunk, so that both end unevenly."""
    return Scorer(model, torch.device("cpu"), eot_id, precision, batch_size, chunk)


def wikitext_like(seed: int = 0, paragraphs: tuple[int, ...] = (6, 1, 0, 3, 2)) -> str:
    """A raw file: pages of the given numbers of paragraphs, with sections; one page is a heading and nothing else."""
    rng = random.Random(seed)
    lines = [" "]
    for number, count in enumerate(paragraphs):
        lines += [f" = Page {number} = ", " "]
        for paragraph in range(count):
            if paragraph % 2:
                lines += [f" = = Section {paragraph} = = ", " "]
            if paragraph == 4:
                lines += [" = = = Below = = = ", " "]
            lines += [" " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(20, 60))) + " . ", " "]
    return "\n".join(lines) + "\n"


def tiny_tokenizer(folder: Path, pieces: int = 400) -> Tokenizer:
    """BPE, trained on other pages than the tests score."""
    return train_tokenizer([wikitext_like(seed) for seed in range(100, 110)], folder / "tiny.model", pieces)


def run_config(arch: str, vocab_size: int, **sections: dict[str, object]) -> RunConfig:
    """A run's configuration around `tiny_config`; `sections` replace keys of its sections."""
    tree: dict[str, object] = {
        "model": tiny_config(arch, vocab_size).model_dump(mode="json"),
        "train": {"context_length": 32, "batch_tokens": 64, "micro_batch_size": 2, "device": "cpu"},
        "eval": {"batch_size": 3},
    }
    for name, section in sections.items():
        old = tree.get(name)
        tree[name] = {**(old if isinstance(old, dict) else {}), **section}
    return RunConfig.model_validate(tree)


def make_run(folder: Path, config: RunConfig, tokenizer: Tokenizer, step: int = 5) -> HopeModel:
    """A run directory with one checkpoint of a model with random weights (fp32), and that model."""
    model = build_model(config.model, config.seed)
    writer = CheckpointWriter(Fence.take(folder), keep_last=1, tell=lambda line: None)
    facts = Facts(step, step * 64, config.model_dump(mode="json"), tokenizer.fingerprint, data={})
    writer.save(model_state(model), facts)
    tokenizer.save(folder / "tokenizer.model")
    return model.eval()
