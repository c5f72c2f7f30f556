"""Text from a checkpoint, token by token through the recurrent form: Hope's memory use does not grow with the text."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hope_train.errors import UserError
from hope_train.model.hope import HopeModel, ModelState

# Logits of a prompt are made this many tokens at a time; only the last ones are used.
_PREFILL = 512

Around = Callable[[], AbstractContextManager[object]]
Agree = Callable[[int], int]

# Everything else is fixed by the checkpoint or an option of its own.
_FREE = ("parallel.", "train.device", "train.precision", "train.threads")


def generate(
    model: HopeModel,
    tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop_id: int | None = None,
    around: Around = nullcontext,
    agree: Agree = int,
) -> Iterator[int]:
    """Tokens that continue `tokens`, each given out as soon as it is drawn.

    Args:
        tokens: what has been read so far, at least one; a text begins with the end-of-text token.
        max_tokens: how many at most.
        temperature: logits are divided by it; 0 takes the likeliest token each time.
        top_p: draw from the smallest set of likeliest tokens that has this probability; 0 leaves only the likeliest.
        seed: the same seed gives the same tokens; below 2**63.
        stop_id: the text ends before this token, which is not given out.
        around: makes a context in which the model runs, such as autocast.
        agree: with a model spread over ranks, which all call this: from the token drawn here to the one all go on with.

    Raises:
        UserError: bad arguments, or logits that are not finite.
    """
    check_sampling(max_tokens, temperature, top_p)
    if not len(tokens):
        raise UserError("nothing to continue: give at least one token (a text begins with the end-of-text token)")
    return _generate(model, list(tokens), max_tokens, temperature, top_p, seed, stop_id, around, agree)


def _generate(
    model: HopeModel,
    tokens: list[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_id: int | None,
    around: Around,
    agree: Agree,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    state = model.initial_state(1)
    pending = tokens
    for _ in range(max_tokens):
        logits_V, state = _read(model, pending, state, around)
        token = agree(sample(logits_V, temperature, top_p, generator))
        if token == stop_id:
            return
        yield token
        pending = [token]


@torch.no_grad()
def _read(model: HopeModel, tokens: list[int], state: ModelState, around: Around) -> tuple[Tensor, ModelState]:
    """The logits after `tokens` [V], on the CPU in fp32 at least, and the state there."""
    tokens_1T = torch.tensor([tokens], device=next(model.parameters()).device)
    logits_1TV: Tensor | None = None
    with around():
        for first in range(0, tokens_1T.shape[1], _PREFILL):
            logits_1TV, state = model.step(tokens_1T[:, first : first + _PREFILL], state)
    assert logits_1TV is not None
    logits_V = logits_1TV[0, -1].cpu()
    return (logits_V if logits_V.dtype == torch.float64 else logits_V.float()), state


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token number drawn from logits [V]; see `generate`. Raises UserError where they are not finite."""
    if not bool(torch.isfinite(logits_V).all()):
        raise UserError("the model's logits are not finite: this checkpoint is broken (its training diverged?)")
    if temperature == 0 or top_p == 0:
        return int(logits_V.argmax())
    # The largest logit is taken off first, so that a small temperature does not overflow.
    p_V = ((logits_V.double() - logits_V.max().double()) / temperature).softmax(0)
    p_V, token_V = p_V.sort(descending=True, stable=True)
    # A token stays if the likelier ones do not have the mass yet, so the likeliest always does.
    keep_V = p_V.cumsum(0) - p_V < top_p
    choice = torch.multinomial(p_V * keep_V, 1, generator=generator)
    return int(token_V[choice])


def check_sampling(max_tokens: int, temperature: float, top_p: float) -> None:
    """Raises UserError for values that mean nothing."""
    if max_tokens < 1:
        raise UserError(f"max-tokens is {max_tokens}: ask for at least 1")
    if not math.isfinite(temperature) or temperature < 0:
        raise UserError(f"temperature is {temperature}: it is 0 (the likeliest token each time) or more")
    if not 0 <= top_p <= 1:
        raise UserError(f"top-p is {top_p}: it is a probability, from 0 to 1")


def generate_command(
    run: str,
    overrides: Sequence[str],
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> int:
    """`hope generate`: the prompt and its continuation, printed as it is made; with `as_json` one object at the end.

    Under torchrun every process decodes the same text with its part of the model, and the first one prints it.

    Args:
        run: a run directory (its newest checkpoint) or a checkpoint.
        overrides: `parallel.*`, `train.device`, `train.precision` and the like; what the checkpoint fixes is refused.
        prompt: `-` reads standard input to its end.

    Returns:
        The exit code.

    Raises:
        UserError: no such checkpoint, no tokenizer that fits it, a mesh that does not fit, or bad sampling values. Of
            several processes the first raises it, and the others return 2.
    """
    check_sampling(max_tokens, temperature, top_p)
    from hope_train.parallel.mesh import process_rank, world_size
    from hope_train.parallel.team import SharedError, Team, leave_to_first

    def speak() -> int:
        return _speak(run, overrides, prompt, max_tokens, temperature, top_p, seed, as_json)

    try:
        return Team(process_rank(), world_size()).alike(speak)
    except SharedError as error:
        return leave_to_first(error)


def _speak(
    run: str,
    overrides: Sequence[str],
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> int:
    """`generate_command` of one process of the job. Raises UserError."""
    from hope_train.checkpoint.spread import load_on_mesh
    from hope_train.evaluate.run_files import allowed_overrides, checkpoint_tokenizer, prepare_device
    from hope_train.parallel.mesh import close_mesh

    settings = allowed_overrides(overrides, _FREE, "hope generate")
    device = prepare_device(settings)
    # A mesh is this job's own affair, not the training's.
    loaded = load_on_mesh(run, device, ["parallel={}", *overrides], lambda line: print(line, file=sys.stderr))
    model, manifest, device, team = loaded.model, loaded.manifest, loaded.mesh.device, loaded.mesh.team
    if prompt == "-":
        prompt = team.on_first(_stdin)
    tokenizer = checkpoint_tokenizer(run, loaded.config, manifest.tokenizer)
    tokens = tokenizer.encode(prompt)  # before it is shown: a prompt that is no text is refused
    low = loaded.config.train.precision == "bf16"
    started = time.perf_counter()
    made: list[int] = []
    decoder = tokenizer.decode_stream()
    show = (lambda text: None) if as_json or not team.leads else _show
    show(prompt)
    # Of sharded blocks that return views: a danger to backward alone.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for token in generate(
        model,
        [tokenizer.eot_id, *tokens],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_id=tokenizer.eot_id,
        around=lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=low),
        # Replicas may round otherwise than each other; all must read the same text on.
        agree=team.of_first,
    ):
        made.append(token)
        show(decoder.push(token))
    show(decoder.flush() + "\n")
    close_mesh()
    if as_json and team.leads:
        seconds = time.perf_counter() - started
        figures = {
            "run": run,
            "step": manifest.step,
            "prompt": prompt,
            "text": tokenizer.decode(made),
            "tokens": len(made),
            "stopped": "max-tokens" if len(made) == max_tokens else "end-of-text",
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "seconds": seconds,
            "tokens_per_s": len(made) / seconds,
        }
        print(json.dumps(figures, ensure_ascii=False))
    return 0


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not UTF-8") from None


def _show(text: str) -> None:
    """Print at once. A model may write anything: control characters do not reach a terminal."""
    if not text:
        return
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
