"""Batched scoring against a slow reference: one window at a time, one token at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hope_train.evaluate.protocols import rolling_windows
from hope_train.evaluate.scoring import Window
from hope_train.model.hope import HopeModel
from hope_train.model.loss import token_nll
from tests.evaluate.tiny import ARCHS, scorer, tiny_model

VOCAB = 50
EOT = 1


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, count).tolist()


@torch.no_grad()
def slow_nll(model: HopeModel, tokens: list[int], scored: int) -> float:
    """Each scored token predicted by a forward pass of its own over exactly what stands before it in the window."""
    total = 0.0
    for place in range(len(tokens) - scored, len(tokens)):
        logits_V = model(torch.tensor([tokens[:place]]))[0, -1]
        total -= logits_V.log_softmax(0)[tokens[place]].item()
    return total


@pytest.mark.parametrize("arch", ARCHS)
def test_windows_of_mixed_lengths_in_batches(arch: str) -> None:
    model = tiny_model(arch, VOCAB)
    windows = []
    for owner, count in enumerate((40, 7, 0, 1, 19)):
        windows += rolling_windows(random_tokens(count, owner), EOT, 16, owner)
    fast = scorer(model, EOT).windows(windows)
    slow = [slow_nll(model, window.tokens.tolist(), window.scored) for window in windows]
    assert fast == pytest.approx(slow, rel=1e-11)


@pytest.mark.parametrize("arch", ARCHS)
def test_neither_padding_nor_company_changes_a_window(arch: str) -> None:
    model = tiny_model(arch, VOCAB)
    windows = [Window(n, np.array(random_tokens(count, n)), count - 1) for n, count in enumerate((50, 3, 17, 18, 33))]
    together = scorer(model, EOT, batch_size=5).windows(windows)
    alone = [scorer(model, EOT, batch_size=1).windows([window])[0] for window in windows]
    other_padding = scorer(model, 7, batch_size=5).windows(windows)
    assert together == pytest.approx(alone, rel=1e-12)
    assert together == other_padding


@pytest.mark.parametrize("arch", ARCHS)
def test_streams_see_everything_before_them(arch: str) -> None:
    """The state carried over windows gives the full forward over the whole page, in any division into windows."""
    model = tiny_model(arch, VOCAB)
    streams = [np.array([EOT, *random_tokens(count, count)]) for count in (45, 0, 12, 1)]
    full = [slow_nll(model, stream.tolist(), len(stream) - 1) for stream in streams]
    for length in (5, 16, 1000):
        for batch_size, chunk in ((1, 3), (3, 37)):
            made = scorer(model, EOT, batch_size, chunk).streams(streams, length)
            assert made == pytest.approx(full, rel=1e-10), (length, batch_size)


def test_a_state_carried_over_is_not_a_window_afresh() -> None:
    model = tiny_model("hope", VOCAB)
    tokens = random_tokens(60)
    afresh = sum(scorer(model, EOT).windows(rolling_windows(tokens, EOT, 16)))
    (carried,) = scorer(model, EOT).streams([np.array([EOT, *tokens])], 16)
    assert abs(carried / afresh - 1) > 1e-3


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_token_nll_is_the_log_softmax_in_any_chunk(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    target_M = torch.arange(7)
    expected_M = torch.nn.functional.cross_entropy(x_MD @ weight_VD.T, target_M, reduction="none")
    torch.testing.assert_close(token_nll(x_MD, weight_VD, target_M, chunk), expected_M, rtol=1e-13, atol=0)
    assert token_nll(x_MD[:0], weight_VD, target_M[:0], chunk).shape == (0,)


def test_no_more_logits_than_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("transformer_pp", VOCAB)
    sizes = []
    inner = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = inner(x, weight, bias)
        if y.shape[-1] == VOCAB:
            sizes.append(y.numel() // VOCAB)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    tokens = random_tokens(100)
    scorer(model, EOT, batch_size=4, chunk=10).windows(rolling_windows(tokens, EOT, 16))
    assert sum(sizes) == 100
    assert max(sizes) == 10
    sizes.clear()
    scorer(model, EOT, batch_size=4, chunk=10).streams([np.array(tokens)] * 4, 16)
    assert max(sizes) <= 10


def test_modes_are_put_back_and_no_gradients_are_made() -> None:
    model = tiny_model("hope", VOCAB)
    model.train()
    model.blocks["1"].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.embed.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    scorer(model, EOT).windows([Window(0, np.array([1, 2, 3]), 2)])
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop"), scorer(model, EOT).running():
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_bf16_is_the_autocast_of_training() -> None:
    model = tiny_model("hope_attention", VOCAB, torch.float32)
    window = np.array([*random_tokens(30), 5])
    made = scorer(model, EOT, precision="bf16").windows([Window(0, window, 30)])
    exact = scorer(model, EOT).windows([Window(0, window, 30)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, _ = model.loss(torch.from_numpy(window[None, :-1]), torch.from_numpy(window[None, 1:]))
    assert made == pytest.approx([expected.item()], rel=1e-6)
    assert made != pytest.approx(exact, rel=1e-6)


def test_twice_the_same() -> None:
    model = tiny_model("hope", VOCAB, torch.float32)
    windows = rolling_windows(random_tokens(90), EOT, 16)
    assert scorer(model, EOT).windows(windows) == scorer(model, EOT).windows(windows)


def test_progress_ends_at_the_number_of_scored_tokens() -> None:
    model = tiny_model("transformer_pp", VOCAB)
    told: list[tuple[int, int]] = []
    scorer(model, EOT).windows(rolling_windows(random_tokens(50), EOT, 8), lambda *pair: told.append(pair))
    assert told[-1] == (50, 50)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    told.clear()
    scorer(model, EOT).streams([np.array(random_tokens(50))], 8, lambda *pair: told.append(pair))
    assert told[-1] == (49, 49)


def test_streams_of_like_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("transformer_pp", VOCAB)
    rows = []
    initial_state = model.initial_state
    monkeypatch.setattr(model, "initial_state", lambda batch: rows.append(batch) or initial_state(batch))
    lengths = (100, 9, 80, 75, 10, 71, 8)
    scorer(model, EOT, batch_size=3).streams([np.array(random_tokens(count)) for count in lengths], 16)
    assert rows == [3, 1, 3]  # 100 80 75, 71, 10 9 8
