"""Observing a whole model, and the same model without writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hope_train.model.activity import observe_model, without_writes
from hope_train.model.hope import HopeModel
from tests.model.small import CHUNK, VOCABULARY, relative, small_model, text


@pytest.mark.parametrize("documents", [False, True])
def test_every_layer_is_seen_with_its_own_inputs(documents: bool) -> None:
    """The answers observed in each block, taken through its output, give the block's own output."""
    model, tokens = small_model(), text(2, 29)
    starts = None
    if documents:
        starts = torch.zeros(2, 29, dtype=torch.bool)
        starts[:, [3, CHUNK, 20]] = True
    before = {name: p.clone() for name, p in model.state_dict().items()}
    seen = observe_model(model, tokens, starts)
    assert list(seen) == ["0", "1"]
    with torch.no_grad():
        x = model.embed(tokens)
        for name, block in model.blocks.items():
            normed = block.mixer_norm(x)
            want = block.mixer(normed, starts)
            assert relative(block.mixer.after(seen[name].o_BTHN, normed), want) < 1e-10
            x = block(x, starts)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks.values())


def test_a_model_of_attention_has_nothing_to_observe() -> None:
    with pytest.raises(ValueError, match="arch=transformer_pp has no fast weights"):
        observe_model(small_model("transformer_pp"), text(1, 8))


@pytest.mark.parametrize("memory", [{}, {"kind": "linear"}, {"decay_to": "zero"}, {"momentum": True}], ids=str)
def test_without_writes_memories_stay_where_they_began(memory: dict[str, str]) -> None:
    model, tokens = small_model(memory=memory), text(2, 29)
    frozen = without_writes(model)
    assert frozen.config.memory.eta_max == 0.0
    assert model.config.memory.eta_max == 1.0
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in frozen.named_parameters())
    for seen in observe_model(frozen, tokens).values():
        assert max(part.deviation.max() for part in seen.matrices.values()) < 1e-12
    with torch.no_grad():
        assert relative(frozen(tokens), model(tokens)) > 1e-3


def felt(model: HopeModel) -> Tensor:
    """How much the logits of each token change when token 10 does, [29]."""
    tokens = text(1, 29)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCABULARY
    with torch.no_grad():
        return (model(tokens) - model(changed)).abs().amax((0, 2))


def test_without_writes_a_token_sees_nothing_but_itself() -> None:
    """The convolution feeds k, v, eta and alpha alone, which only writes use; q is a projection of the token itself."""
    assert (felt(small_model())[10:] > 1e-9).all()
    change = felt(without_writes(small_model()))
    assert change[10] > 1e-3
    assert change.count_nonzero() == 1


def test_without_writes_an_adaptive_q_sees_the_convolutions_window() -> None:
    """Window 4 in two layers: 6 tokens back, and no farther."""
    change = felt(without_writes(small_model(memory={"adaptive_q": True})))
    assert (change[10:17] > 1e-9).all()
    assert change.count_nonzero() == 7
