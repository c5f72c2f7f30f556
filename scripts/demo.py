"""`make demo`: the whole way from text to a WikiText perplexity in a few minutes, by the commands a user would type.

Every command is printed before it runs and can be typed again. Files go to runs/demo/.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipelines.hub import hub_reachable

# Sizes: about six minutes on two cores.
CONFIG = "configs/hope_tiny.yaml"
HUB_CORPUS = "Salesforce/wikitext:wikitext-2-raw-v1"
CORPUS_BYTES = 8_000_000  # of the text read, from its beginning
TOKENIZER_BYTES = 4_000_000  # of it that the tokenizer is trained on
VOCABULARY = 4096
TRAIN_TOKENS = 600_000
STOP_AT = 0.5  # share of the run after which it is interrupted
EVALUATIONS = 6  # of WikiText's validation split during the run
EVALUATION_PAGES = 8
SAMPLE_TOKENS = 120
HUB_PATIENCE_S = 4.0

FOLDER = Path("runs/demo")
RUN = FOLDER / "hope"
ROOT = Path(__file__).resolve().parent.parent
HOPE = Path(sys.executable).parent / "hope"
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Text:
    """The text of the demo: what to call it, and how the command line and the configuration name it."""

    label: str
    argument: str
    source: dict[str, Any]
    wikitext: str | None
    """`hub`, the folder HOPE_WIKITEXT, or None where WikiText cannot be had."""

    prompt: str
    slug: str = field(default="text")


class StepError(Exception):
    """A command of the demo failed."""


def choose_text() -> Text:
    """A local corpus if one is named, else the hub's, else what every machine has. Says which in one line."""
    local = os.environ.get("HOPE_CORPUS")
    folder = os.environ.get("HOPE_WIKITEXT") or None
    if local and not Path(local).exists():
        raise StepError(f"HOPE_CORPUS={local} is neither a file nor a folder")
    # The hub is asked only where the answer matters.
    online = not (local and folder) and hub_reachable(HUB_PATIENCE_S)
    wikitext = folder or ("hub" if online else None)
    if local:
        path = str(Path(local).resolve())
        slug = "local-" + "".join(letter if letter.isalnum() else "-" for letter in path).strip("-")[-60:]
        return Text(f"{local} (HOPE_CORPUS)", path, {"path": path}, wikitext, "The ", slug)
    if online:
        label = f"{HUB_CORPUS}, from the Hugging Face hub"
        return Text(label, f"hub:{HUB_CORPUS}", {"hub": HUB_CORPUS}, wikitext, "The ", "hub")
    label = "Python's own documentation and library, since no hub can be reached and HOPE_CORPUS names no local corpus"
    return Text(label, "builtin:python-docs", {"builtin": "python-docs"}, wikitext, "The ", "python-docs")


def hope(*arguments: str) -> list[str]:
    """Show a command as one would type it; returns it as it is run."""
    console.print(f"\n[bold]$ hope {shlex.join(arguments)}[/bold]", markup=True)
    return [str(HOPE), *arguments] if HOPE.exists() else [sys.executable, "-m", "hope_train.cli", *arguments]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`hope …` as a process that does not outlive this one: left early, it is asked to save and stop."""
    process = subprocess.Popen(hope(*arguments), cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run(*arguments: str) -> None:
    """Run `hope …` to its end. Raises StepError when it fails."""
    with running(*arguments) as process:
        code = process.wait()
    if code:
        raise StepError(f"`hope {arguments[0]}` ended with exit code {code}")


def run_and_interrupt(step: int, *arguments: str) -> None:
    """Run `hope train …` and send it SIGINT once `step` has been logged, as Ctrl-C does."""
    with running(*arguments) as process:
        while process.poll() is None and last_step() < step:
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        code = process.wait()
    reason = stop_reason()
    if reason != "signal":
        raise StepError(f"`hope train` was to stop on the signal; exit code {code}, reason {reason}")
    console.print(f"\nStopped by SIGINT after step {last_step()}; the checkpoint is saved. The same command goes on:")


def rows(name: str) -> list[dict[str, Any]]:
    """The lines of a .jsonl file in the run directory; a line still being written is left out."""
    path = ROOT / RUN / name
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def last_step() -> int:
    """The newest step in metrics.jsonl, 0 before the first."""
    found = rows("metrics.jsonl")
    return int(found[-1]["step"]) if found else 0


def stop_reason() -> str | None:
    """What STOPPED.json gives as the reason."""
    path = ROOT / RUN / "STOPPED.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("reason")) if path.is_file() else None


def train_arguments(text: Text, tokenizer: Path, steps: int) -> list[str]:
    """The command that begins the run, and that goes on with it."""
    source = {**text.source, "max_bytes": CORPUS_BYTES}
    overrides: dict[str, Any] = {
        "name": "demo",
        "dir": str(RUN),
        "data.sources": [source],
        "data.tokenizer": str(tokenizer),
        "data.cache_dir": str(FOLDER / "cache"),
        "train.tokens": TRAIN_TOKENS,
        "eval.every": max(1, steps // EVALUATIONS),
        "eval.pages": EVALUATION_PAGES,
        "checkpoint.every": max(1, steps // EVALUATIONS),
    }
    if text.wikitext is not None:
        overrides["eval.wikitext"] = text.wikitext
    return ["train", CONFIG, *(f"{key}={in_yaml(value)}" for key, value in overrides.items())]


def in_yaml(value: Any) -> str:
    """A value as an override writes it; JSON is YAML, and plain words need no quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def total_steps() -> int:
    """Optimizer steps of the run."""
    from hope_train.config.load import load_config

    return load_config(ROOT / CONFIG, [f"train.tokens={TRAIN_TOKENS}"]).train.total_steps


def perplexities(text: Text) -> tuple[str, list[tuple[int, float]], dict[str, Any] | None]:
    """What was measured: its name, (step, value) in the order of the run, and the row of WikiText's test split."""
    found = rows("eval.jsonl")
    if text.wikitext is not None:
        words = [row for row in found if row.get("word_ppl") is not None and not row.get("stateful")]
        series = [(int(row["step"]), float(row["word_ppl"])) for row in words if row["split"] == "validation"]
        test = [row for row in words if row["split"] == "test"]
        name = f"WikiText word_ppl, validation (first {EVALUATION_PAGES} pages)"
        return name, series, test[-1] if test else None
    held_out = [row for row in found if row.get("heldout_byte_ppl") is not None and not row.get("stateful")]
    series = [(int(row["step"]), float(row["heldout_byte_ppl"])) for row in held_out]
    return "perplexity per byte of a held-out part of the text above (not WikiText)", series, None


def show_result(text: Text, tokenizer: Path, begun: float) -> bool:
    """The table at the end. Returns whether the perplexity fell."""
    metrics = rows("metrics.jsonl")
    name, series, test = perplexities(text)
    steps = [int(row["step"]) for row in metrics]
    speed = sorted(float(row["tokens_per_s"]) for row in metrics)[len(metrics) // 2]
    once = steps == list(range(1, len(steps) + 1))
    table = Table(title="What happened", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("text", text.label)
    table.add_row("tokenizer", f"{VOCABULARY} pieces: {tokenizer}")
    table.add_row("trained", f"{metrics[-1]['tokens']:,} tokens in {steps[-1]} steps, {speed:,.0f} tokens/s")
    table.add_row("stopped and resumed", "every step is there once" if once else "steps are missing or there twice")
    table.add_row("training loss", f"{metrics[0]['loss']:.3f} -> {metrics[-1]['loss']:.3f} nats per token")
    table.add_row(name, " -> ".join(f"{value:,.1f}" for _, value in series) or "nothing measured")
    if test is not None:
        table.add_row(f"WikiText word_ppl, test (all {test['pages']} pages)", f"{test['word_ppl']:,.1f}")
    table.add_row("checkpoints", f"{RUN}/checkpoints")
    table.add_row("report", f"{RUN}/report (open the .html file)")
    table.add_row("time", f"{(time.monotonic() - begun) / 60:.1f} minutes")
    console.print()
    console.print(table)
    return once and len(series) > 1 and series[-1][1] < series[0][1]


def demo() -> int:
    """All of it, in order. Returns the exit code."""
    begun = time.monotonic()
    os.chdir(ROOT)
    text = choose_text()
    console.print(f"Text: {text.label}.")
    if text.wikitext is None:
        console.print("WikiText: neither HOPE_WIKITEXT nor a hub; a held-out part of the text is measured instead.")
    tokenizer = FOLDER / f"tokenizer-{text.slug}-{VOCABULARY}.model"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if tokenizer.is_file():
        console.print(f"Tokenizer: {tokenizer} from an earlier demo.")
    else:
        sizes = ["--vocab-size", str(VOCABULARY), "--kind", "bpe", "--max-bytes", str(TOKENIZER_BYTES)]
        run("data", "tokenizer", "train", text.argument, "--out", str(tokenizer), *sizes)
    if RUN.exists():
        console.print(f"Removing the run of an earlier demo, {RUN}.")
        shutil.rmtree(RUN)
    steps = total_steps()
    command = train_arguments(text, tokenizer, steps)
    run_and_interrupt(max(1, int(STOP_AT * steps)), *command)
    run(*command)
    if stop_reason() != "completed":
        raise StepError(f"the resumed run did not complete (reason {stop_reason()})")
    run("generate", str(RUN), "--prompt", text.prompt, "--max-tokens", str(SAMPLE_TOKENS))
    run("report", str(RUN))
    if not show_result(text, tokenizer, begun):
        raise StepError("the perplexity did not fall, or steps are missing; see the table")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The exit code of the demo; a failed step says so in one line."""
    if arguments:
        print("error: the demo takes no arguments; its sizes are at the top of scripts/demo.py", file=sys.stderr)
        return 2
    # SIGTERM unwinds like Ctrl-C, so that no training is left behind.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        return demo()
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
