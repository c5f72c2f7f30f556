"""Small models and a small text in WikiText's form, for the tests of evaluation and generation."""

from __future__ import annotations

import random

import torch

from hope_train.config.model import ModelConfig
from hope_train.evaluate.scoring import Scorer
from hope_train.model.hope import HopeModel, build_model

ARCHS = ("hope", "hope_attention", "transformer_pp")

WORDS = (
    "the of lobster was in 1994 New York 3 @.@ 5 metres ( or more ) , and it @-@ self said ; \" quite so \" 's 20 @,@ 000 "
    "café ° N naïve [ sic ] 漢字 its ' own ' claws : blue . which ! dogs ' tails ? species game ship river album song"
).split()


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
