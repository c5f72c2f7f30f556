"""Generation: equal to the full forward, reproducible, streamed, and strict about its arguments."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from data_pipelines.tokenizer import Tokenizer
from hope_train.cli import run as hope
from hope_train.errors import UserError
from hope_train.generate import generate, sample
from hope_train.model.hope import HopeModel
from tests.evaluate.tiny import ARCHS, make_run, run_config, tiny_model, tiny_tokenizer

VOCAB = 60
PROMPT = [1, 17, 5, 9, 33, 2, 40]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run_dir(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    make_run(tmp_path, run_config("hope", tokenizer.vocab_size), tokenizer)
    return tmp_path


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward_at_each_step(arch: str) -> None:
    """Past several chunk boundaries of the memories, which stand at 8 and 16 tokens."""
    model = tiny_model(arch, VOCAB)
    prompt = [1, 30, 11, 52, 7, 26, 19]  # an untrained Hope soon repeats itself; from here it does so late enough
    made = list(generate(model, prompt, max_tokens=40, temperature=0.0))
    assert len(made) == 40
    logits_TV = model(torch.tensor([prompt + made]))[0]
    assert made == logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len(set(made)) > 3  # not one token over and over, which would hide a state that does not move


def test_a_long_prompt_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("hope", VOCAB)
    prompt = torch.arange(100).remainder(VOCAB).tolist()
    whole = list(generate(model, prompt, max_tokens=5, temperature=0.0))
    monkeypatch.setattr("hope_train.generate._PREFILL", 13)
    assert list(generate(model, prompt, max_tokens=5, temperature=0.0)) == whole


def test_the_same_seed_gives_the_same_tokens() -> None:
    model = tiny_model("hope", VOCAB)

    def draw(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_tokens=20, temperature=2.0, top_p=1.0, seed=seed))

    torch.manual_seed(0)
    first = draw(3)
    torch.manual_seed(1)  # the global generator has no part in it
    assert draw(3) == first
    assert draw(4) != first


def test_small_top_p_is_greedy() -> None:
    model = tiny_model("hope_attention", VOCAB)
    greedy = list(generate(model, PROMPT, max_tokens=12, temperature=0.0))
    for top_p in (0.0, 1e-9):
        assert list(generate(model, PROMPT, max_tokens=12, temperature=5.0, top_p=top_p, seed=8)) == greedy
    assert list(generate(model, PROMPT, max_tokens=12, temperature=1e-300, top_p=1.0, seed=8)) == greedy


def test_sampling_has_the_probabilities_of_the_nucleus() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = [sample(p.log(), 1.0, 0.75, generator) for _ in range(4000)]
    # 0.4 + 0.3 < 0.75, so the third likeliest (0.15) is in, and nothing else.
    counts = torch.tensor([draws.count(token) for token in range(5)]) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.4, 0.0, 0.3, 0.15]) / 0.85, rtol=0, atol=0.03)
    draws = [sample(p.log(), 0.5, 1.0, generator) for _ in range(4000)]
    counts = torch.tensor([draws.count(token) for token in range(5)]) / 4000
    torch.testing.assert_close(counts, (p**2 / (p**2).sum()).float(), rtol=0, atol=0.03)


def test_the_text_ends_before_the_stop_token() -> None:
    model = tiny_model("hope", VOCAB)
    free = list(generate(model, PROMPT, max_tokens=30, temperature=0.0))
    stop = free[-1]
    assert list(generate(model, PROMPT, max_tokens=30, temperature=0.0, stop_id=stop)) == free[: free.index(stop)]


def test_tokens_come_one_by_one_and_gradients_stay_as_they_were() -> None:
    model = tiny_model("hope", VOCAB)
    calls: list[int] = []
    step = model.step

    def counting(tokens_BT: torch.Tensor, *rest: object) -> object:
        calls.append(tokens_BT.shape[1])
        return step(tokens_BT, *rest)  # type: ignore[arg-type]

    model.step = counting  # type: ignore[method-assign, assignment]
    stream = generate(model, PROMPT, max_tokens=10**9)
    assert calls == []
    for taken in range(1, 4):
        next(stream)
        assert len(calls) == taken
        assert torch.is_grad_enabled()
    assert calls == [len(PROMPT), 1, 1]


def state_size(model: HopeModel, tokens: int) -> int:
    """Numbers held in the state after so many tokens."""
    with torch.no_grad():
        _, state = model.step(torch.ones(1, tokens, dtype=torch.int64), model.initial_state(1))
    seen: set[int] = set()

    def count(value: object) -> int:
        if isinstance(value, torch.Tensor):
            if value.data_ptr() in seen:
                return 0
            seen.add(value.data_ptr())
            return value.numel()
        if isinstance(value, dict):
            return sum(count(inner) for inner in value.values())
        if isinstance(value, list | tuple):
            return sum(count(inner) for inner in value)
        return sum(count(inner) for inner in vars(value).values()) if hasattr(value, "__dict__") else 0

    return count(state)


def test_hopes_state_does_not_grow_with_the_text() -> None:
    model = tiny_model("hope", VOCAB)
    assert state_size(model, 16) == state_size(model, 160) > 100
    attention = tiny_model("transformer_pp", VOCAB)
    assert state_size(attention, 160) > 5 * state_size(attention, 16)  # the count sees what grows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 1.01}, "top-p is 1.01"),
        ({"top_p": -1}, "top-p is -1"),
        ({"top_p": math.nan}, "top-p is nan"),
        ({"max_tokens": 0}, "max-tokens is 0"),
        ({"tokens": []}, "nothing to continue"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, object], said: str) -> None:
    given = {"tokens": PROMPT, "max_tokens": 3, **arguments}
    with pytest.raises(UserError, match=said):
        generate(tiny_model("hope", VOCAB), **given)  # type: ignore[arg-type]


def test_a_broken_model_is_called_broken() -> None:
    model = tiny_model("transformer_pp", VOCAB)
    with torch.no_grad():
        model.head_weight_VD.fill_(math.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        next(generate(model, PROMPT, max_tokens=3))


def test_the_command_prints_prompt_and_text(
    run_dir: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(run_dir), "--prompt", "The café ", "--max-tokens", "30", "--seed", "5"]
    assert hope(command) == 0
    plain = capsys.readouterr().out
    assert hope([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert plain == "The café " + figures["text"] + "\n"
    assert (figures["prompt"], figures["step"], figures["seed"]) == ("The café ", 5, 5)
    assert figures["stopped"] == ("max-tokens" if figures["tokens"] == 30 else "end-of-text")

    from hope_train.checkpoint.store import load_model

    model, _, _ = load_model(run_dir)
    tokens = [tokenizer.eot_id, *tokenizer.encode("The café ")]
    made = generate(model, tokens, max_tokens=30, seed=5, stop_id=tokenizer.eot_id)
    assert figures["text"] == tokenizer.decode(made)


def test_a_prompt_that_is_no_text_is_refused_before_it_is_shown(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hope(["generate", str(run_dir), "--prompt", "abc \udcff def"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1


def test_the_prompt_may_come_from_standard_input(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode())))
    assert hope(["generate", str(run_dir), "--prompt", "-", "--max-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "naïve\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert hope(["generate", str(run_dir), "--prompt", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_characters_of_several_tokens_are_printed_whole_and_at_once(
    run_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that spells é, a character without a piece of its own, in bytes; each print is seen as it happens."""
    text = "aé🙂b"
    spelt = tokenizer.encode(text)
    assert len(spelt) > len(text)
    monkeypatch.setattr("hope_train.generate.generate", lambda *_, **__: iter(spelt))
    writes: list[str] = []

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def write(self, piece: str) -> int:
            writes.append(piece)
            return len(piece)

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert hope(["generate", str(run_dir)]) == 0
    assert "".join(writes) == text + "\n"
    assert not [piece for piece in writes if "\N{REPLACEMENT CHARACTER}" in piece]
    assert len(writes) > 3


def test_control_characters_do_not_reach_a_terminal(
    run_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelt = tokenizer.encode("a\x1b[2J\tb\n")
    monkeypatch.setattr("hope_train.generate.generate", lambda *_, **__: iter(spelt))
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", written)
    assert hope(["generate", str(run_dir)]) == 0
    assert written.getvalue() == "a\N{REPLACEMENT CHARACTER}[2J\tb\n\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "1.5"], "top-p"),
        (["--max-tokens", "0"], "max-tokens"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    options: list[str], said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hope(["generate", str(run_dir), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_endless_stream_can_be_left_early() -> None:
    model = tiny_model("hope", VOCAB, torch.float32)
    assert len(list(itertools.islice(generate(model, PROMPT, max_tokens=10**9, temperature=1.0), 5))) == 5
