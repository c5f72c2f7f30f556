"""`hope …`: parses the command line, imports what the command needs, and calls one function.

Importing this file imports neither torch nor any command, so that `hope --help` answers at once. Exit codes:
0 done, 2 the input is wrong (one line on stderr says what to change), 130 interrupted, 1 an error of ours
(`checkpoint diff`: 1 the two differ).
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hope_train import __version__
from hope_train.config.arguments import check_overrides
from hope_train.errors import UserError
from launch.cli import app as launch_app

app = typer.Typer(
    name="hope",
    help="Pretrain Hope, measure it, sample from it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data, tokenise it; train tokenizers.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="List, verify, prune, convert and compare checkpoints.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(launch_app, name="launch")
data_app.add_typer(tokenizer_app, name="tokenizer")

# Third-party packages that only some commands need, and the extra that brings each.
EXTRAS = {
    "torch": "train",
    "sentencepiece": "train",
    "datasets": "train",
    "filelock": "train",
    "huggingface_hub": "train",
    "py_spy": "train",
    "pyarrow": "train",
    "rapidgzip": "train",
    "tokenizers": "train",
    "safetensors": "train",
    "zstandard": "train",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "matplotlib": "report",
    "deepspeed": "deepspeed",
    "megatron": "megatron",
    "lm_eval": "lmeval",
    "transformers": "lmeval",
}

MAX_SEED = 2**63 - 1
"""The largest that a configuration takes, and torch's generators."""

# click's UsageError, wherever this version of typer keeps it.
_UsageError: Any = typer.BadParameter.__base__

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file such as configs/hope_tiny.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.tokens=1e6.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory (its newest checkpoint) or a checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hope-train {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """The options of `hope` itself."""


@app.command("train")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="auto: go on from the newest whole checkpoint, if there is one."),
    ] = "auto",
    force_config: Annotated[
        bool, typer.Option("--force-config", help="Go on in a run directory that belongs to another configuration.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Train, or go on training after a stop."""
    chosen = check_overrides(overrides, config)
    from hope_train.train.run import train_command

    return train_command(config, chosen, resume, force_config, as_json)


@app.command("eval")
def evaluate(
    run: Run,
    overrides: Overrides = None,
    wikitext: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with wiki.valid.raw and wiki.test.raw, or `hub`.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="validation|test", help="Which part of WikiText.")] = "validation",
    protocol: Annotated[
        list[str] | None,
        typer.Option(metavar="word|token|classic", help="Which perplexity; may be repeated. Default: the run's."),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. Default: the run's.", show_default=False)
    ] = None,
    stateful: Annotated[
        bool, typer.Option("--stateful", help="Also carry the state across a page's windows, as its own number.")
    ] = False,
    pages: Annotated[int | None, typer.Option(min=1, help="Only the first n pages (marked as partial).")] = None,
    as_json: Json = False,
) -> int:
    """WikiText perplexity of a checkpoint."""
    _one_of("--split", split, ("validation", "test"))
    protocols = protocol or []
    for name in protocols:
        _one_of("--protocol", name, ("word", "token", "classic"))
    chosen = check_overrides(overrides, run)
    from hope_train.evaluate.commands import eval_command

    return eval_command(
        run=run,
        overrides=chosen,
        wikitext=wikitext,
        split=split,
        protocols=protocols,
        context_length=context_length,
        stateful=stateful,
        pages=pages,
        as_json=as_json,
    )


@app.command("generate")
def generate(
    run: Run,
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The same seed gives the same text.")] = 0,
    as_json: Json = False,
) -> int:
    """Stream text from a checkpoint."""
    chosen = check_overrides(overrides, run)
    from hope_train.generate import generate_command

    return generate_command(run, chosen, prompt, max_tokens, temperature, top_p, seed, as_json)


@app.command("plan")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="Kind of accelerator: h200, h100, a100, ...")] = "h200",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    interconnect: Annotated[
        str | None, typer.Option(metavar="NAME", help="Links, such as nvlink4+ib-ndr. Default: the usual ones.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build the mesh's ranks without storage and compare; needs torch.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Parameters, memory, traffic, speed and days of a run before it starts; needs no GPU."""
    chosen = check_overrides(overrides, config)
    from hope_train.plan.report import plan_command

    return plan_command(config, chosen, device, devices, as_json, interconnect=interconnect, with_dry_run=dry_run)


@app.command("report")
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories, drawn side by side.")],
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to write. Default: report/ in the first run.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Draw curves as PNG and one self-contained HTML page."""
    from hope_train.report.draw import report_command

    return report_command(runs, out, as_json)


@app.command("config")
def config(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML file; with --docs: a key or section to explain.")
    ] = None,
    overrides: Overrides = None,
    docs: Annotated[bool, typer.Option("--docs", help="Explain every field, or the keys and sections named.")] = False,
    as_json: Json = False,
) -> int:
    """Print a resolved configuration as YAML, or what each field means."""
    from hope_train.config.commands import docs_command, show_command

    if docs:
        return docs_command([text for text in (config, *(overrides or [])) if text is not None], as_json)
    if config is None:
        raise UserError("name a configuration file, or say --docs for the documentation of every field")
    return show_command(config, check_overrides(overrides, config), as_json)


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Files, folders, hub:OWNER/NAME[:CONFIG], or builtin:python-docs."),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The model file to write.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of pieces.")] = 32000,
    kind: Annotated[str, typer.Option(metavar="bpe|unigram", help="Kind of model.")] = "bpe",
    text_field: Annotated[str, typer.Option(help="Column or JSON key that holds the text.")] = "text",
    split_digits: Annotated[
        bool, typer.Option("--split-digits/--no-split-digits", help="Each digit is a piece of its own.")
    ] = True,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Train on about this much text, taken evenly.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Chooses the text, where max-bytes limits it.")] = 0,
    symbol: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A string that is always one piece; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    as_json: Json = False,
) -> int:
    """Train a lossless SentencePiece tokenizer."""
    _one_of("--kind", kind, ("bpe", "unigram"))
    from data_pipelines.commands import train_tokenizer_command

    train_tokenizer_command(
        inputs, out, vocab_size, kind, text_field, split_digits, max_bytes, seed, as_json, overwrite, symbol or []
    )
    return 0


@data_app.command("inspect")
def data_inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(min=0, help="Which global batch.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="How many of its rows.")] = 2,
    as_json: Json = False,
) -> int:
    """Show the text of a batch as the model sees it."""
    chosen = check_overrides(overrides, config)
    from data_pipelines.looking import inspect_command

    inspect_command(config, chosen, batch, rows, as_json)
    return 0


@data_app.command("stats")
def data_stats(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> int:
    """Count documents, bytes, tokens and unknowns of each source."""
    chosen = check_overrides(overrides, config)
    from data_pipelines.looking import stats_command

    stats_command(config, chosen, as_json)
    return 0


@data_app.command("tokenize")
def data_tokenize(
    config: ConfigFile,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write; an interrupted one is gone on with.")],
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for each core.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Write the text of a configuration as tokens in Megatron's indexed format, for data.mode=indexed."""
    chosen = check_overrides(overrides, config)
    from data_pipelines.commands import tokenize_command

    return tokenize_command(config, chosen, out, workers or len(os.sched_getaffinity(0)), as_json)


@data_app.command("verify")
def data_verify(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A token set, or a cached corpus.")], as_json: Json = False
) -> int:
    """Compare every file with its manifest; exit code 2 when something is damaged."""
    from data_pipelines.commands import verify_command

    return verify_command(path, as_json)


RunDirectory = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]


@checkpoint_app.command("ls")
def checkpoint_ls(run: RunDirectory, as_json: Json = False) -> int:
    """List what is there: step, tokens, size, and where each level's files lie."""
    from hope_train.checkpoint.commands import ls_command

    return ls_command(run, as_json)


@checkpoint_app.command("verify")
def checkpoint_verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A run directory (all it has) or a checkpoint.")],
    as_json: Json = False,
) -> int:
    """Compare every file with its hash; exit code 2 when something is damaged."""
    from hope_train.checkpoint.commands import verify_command

    return verify_command(path, as_json)


@checkpoint_app.command("prune")
def checkpoint_prune(
    run: RunDirectory,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Keep so many of the newest checkpoints. Default: all.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=0, help="Keep multiples of this too. Default: as the run is configured.")
    ] = None,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="Remove those of continuations that were given up too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Although the run belongs to a process on another machine.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Remove what no checkpoint that is kept refers to."""
    from hope_train.checkpoint.commands import prune_command

    return prune_command(run, keep_last, keep_every, superseded, dry_run, force, as_json)


@checkpoint_app.command("consolidate")
def checkpoint_consolidate(
    run: Run,
    out: Annotated[str, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    as_json: Json = False,
) -> int:
    """Write the weights into one safetensors file, for use elsewhere."""
    from hope_train.checkpoint.commands import consolidate_command

    return consolidate_command(run, out, overwrite, as_json)


@checkpoint_app.command("to-universal")
def checkpoint_to_universal(
    run: Run,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The folder to write; it must not be there.")],
    as_json: Json = False,
) -> int:
    """Write a checkpoint in DeepSpeed's universal format."""
    from hope_train.checkpoint.commands import to_universal_command

    return to_universal_command(run, out, as_json)


@checkpoint_app.command("from-universal")
def checkpoint_from_universal(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder in DeepSpeed's universal format.")],
    out: Annotated[str, typer.Option(metavar="CHECKPOINT", help="The checkpoint to write; it must not be there.")],
    like: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="A checkpoint of the same model, for what FOLDER does not say: configuration, tokenizer, data. "
            "Default: what to-universal has left in FOLDER.",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Make a checkpoint of what lies in DeepSpeed's universal format."""
    from hope_train.checkpoint.commands import from_universal_command

    return from_universal_command(folder, out, like, as_json)


@checkpoint_app.command("diff")
def checkpoint_diff(
    one: Run,
    other: Run,
    weights: Annotated[bool, typer.Option("--weights", help="Leave out the optimizer's state and counters.")] = False,
    as_json: Json = False,
) -> int:
    """Show which tensors differ, and by how much; exit code 1 when some do."""
    from hope_train.checkpoint.commands import diff_command

    return diff_command(one, other, weights, as_json)


def _one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option} is one of {', '.join(allowed)} (got {value!r})")


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns the exit code; writes at most one line of error to stderr.

    Errors of ours (anything but UserError, usage errors and interrupts) come through with their traceback.
    """
    try:
        return _invoke(typer.main.get_command(app), list(arguments))
    except UserError as error:
        return _complain(str(error))
    except _UsageError as error:
        return _usage(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        return _complain(f"this needs the package {package}, which is not installed: pip install -e '.[{extra}]'")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 0


def _invoke(command: Any, arguments: list[str]) -> int:
    """What click's own `main` does, less its handling of errors, which hides broken pipes that are not stdout's."""
    try:
        with command.make_context("hope", arguments) as context:
            code = command.invoke(context)
    except typer.Exit as stop:
        code = stop.exit_code
    if sys.stdout is not None:  # a process may be started without
        sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _usage(error: Any) -> int:
    """One line for click's complaint, with a hint where an override was written like an option."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        print(context.get_help(), file=sys.stderr)
        return 2
    message = error.format_message().rstrip(".")
    option = str(getattr(error, "option_name", "") or "")
    name = option.lstrip("-")
    if "." in name:
        message += f": overrides are written without dashes, {name}=VALUE"
    path = context.command_path if context is not None else "hope"
    return _complain(f"{message} (see `{path} --help`)")


def _stdout_is_closed() -> bool:
    """Whether stdout's reader has gone (`| head`); if so stdout leads nowhere from here on, quietly."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by something that is no file
        return False
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def main() -> None:
    """The console script `hope`."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
