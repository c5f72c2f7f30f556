"""Weight decay is for matrices that are neither embeddings nor initial memories."""

from __future__ import annotations

import pytest

from hope_train.optim.decay import is_decayed


@pytest.mark.parametrize(
    ("name", "ndim", "decayed"),
    [
        ("blocks.0.mixer.out_proj.weight", 2, True),
        ("blocks.0.cms.levels.1.up.weight", 2, True),
        ("blocks.0.mixer.conv.weight", 3, True),
        ("head.weight", 2, True),
        ("embed.weight", 2, False),
        ("norm.weight", 1, False),
        ("blocks.0.mixer.head_norm.weight", 2, False),
        ("blocks.0.mixer.out_proj.bias", 1, False),
        ("blocks.0.cms.mix", 1, False),
        ("blocks.0.mixer.memory.k.w1", 3, False),
        ("blocks.0.mixer.memory.alpha.w2", 3, False),
        ("blocks.0.mixer.memory_proj.weight", 2, True),
    ],
)
def test_is_decayed(name: str, ndim: int, decayed: bool) -> None:
    assert is_decayed(name, ndim) == decayed
