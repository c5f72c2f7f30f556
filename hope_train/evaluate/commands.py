"""`hope eval`: the perplexities of a checkpoint, as a table or as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from hope_train.config.load import merge, validate
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.loop import Evaluator, Row
from hope_train.evaluate.run_files import allowed_overrides, checkpoint_tokenizer, prepare_device
from hope_train.evaluate.scoring import Progress as Report
from hope_train.evaluate.sources import ENVIRONMENT

# Everything else is fixed by the checkpoint.
_FREE = (
    *("eval.", "parallel.", "train.device", "train.precision", "train.threads", "train.loss_chunk"),
    "data.hub_timeout",
)
FIGURES = ("word_ppl", "byte_ppl", "bits_per_byte", "token_ppl", "classic_ppl")


def eval_command(
    run: str,
    overrides: Sequence[str],
    wikitext: str | None,
    split: str,
    protocols: Sequence[str],
    context_length: int | None,
    stateful: bool,
    pages: int | None,
    as_json: bool,
) -> int:
    """Measure the newest checkpoint of run directory `run`, or the checkpoint `run` itself.

    Args:
        overrides: `eval.*`, `parallel.*`, `train.device`, `train.precision` and the like; what the checkpoint fixes is
            refused. Under torchrun the windows are shared by the ranks, and the first one reports.
        wikitext: folder or `hub`; None: what the run's configuration or $HOPE_WIKITEXT says.
        split: `validation` or `test`.
        protocols: empty: the run's.
        context_length: tokens in a window; None: the training one.
        pages: only the first n. None: all, whatever the run's loop used.

    Returns:
        The exit code.

    Raises:
        UserError: no such checkpoint, text or tokenizer, or a protocol that does not apply. Of several processes the
            first raises it, and the others return 2.
    """
    from hope_train.parallel.mesh import process_rank, world_size
    from hope_train.parallel.slurm import adopt_step
    from hope_train.parallel.team import SharedError, Team, leave_to_first

    adopt_step(os.environ)
    asked = {"wikitext": wikitext, "protocols": list(protocols) or None, "stateful": stateful or None, "pages": pages}
    asked = {key: value for key, value in asked.items() if value is not None}

    def measure() -> int:
        return _eval(run, overrides, asked, split, context_length, as_json)

    try:
        return Team(process_rank(), world_size()).alike(measure)
    except SharedError as error:
        return leave_to_first(error)


def _eval(
    run: str, overrides: Sequence[str], asked: dict[str, Any], split: str, context_length: int | None, as_json: bool
) -> int:
    """`eval_command` of one process of the job; `asked`: keys of the `eval` section. Raises UserError."""
    chosen = allowed_overrides(overrides, _FREE, "hope eval")
    from hope_train.checkpoint.spread import load_on_mesh
    from hope_train.parallel.mesh import close_mesh

    device = prepare_device(chosen)
    # A mesh is this job's own affair, not the training's.
    mesh_overrides = [text for text in overrides if text.startswith("parallel.")]
    loaded = load_on_mesh(run, device, ["parallel={}", *mesh_overrides], _warn)
    model, manifest, leads = loaded.model, loaded.manifest, loaded.mesh.team.leads
    tree = loaded.config.model_dump(mode="json")
    tree["eval"]["pages"] = None  # The loop may make do with a part; here all is meant unless a part is asked for.
    tree = merge(tree, chosen)
    tree["eval"].update(asked)
    config = validate(RunConfig, tree, origin=run)

    tokenizer = checkpoint_tokenizer(run, config, manifest.tokenizer)
    evaluator = Evaluator(
        config, tokenizer, loaded.mesh.device, context_length, splits=(split,), whole_test=False, shares=loaded.shares
    )
    with _bar(f"{split} of {run}", shown=leads) as progress:
        rows = evaluator.evaluate(model, split, manifest.step, manifest.tokens, progress)
    if not rows:
        raise UserError(
            f"no WikiText to measure the {split} split on: name a folder with --wikitext DIR (or `hub`), or set "
            f"${ENVIRONMENT}"
        )
    close_mesh()
    if not leads:
        return 0
    if as_json:
        print(strict_json(rows))
    else:
        print(evaluator.sources())
        Console().print(_table(rows, f"{run}, step {manifest.step:,}, {manifest.tokens:,} tokens, {split}"))
        print(*_measured(rows), sep="\n")
    return 0


def _table(rows: Sequence[Row], title: str) -> Table:
    """One line per figure; two perplexities never share a name."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("protocol")
    table.add_column("divided by")
    for row in rows:
        protocol = row["protocol"] + (", stateful" if row.get("stateful") else "")
        for key, value in row.items():
            if key.endswith(FIGURES):
                number = f"{value:,.4f}" if abs(value) < 1e5 else f"{value:.6g}"
                table.add_row(key, number, protocol, _divisor(key, row["denominators"]))
    return table


def _measured(rows: Sequence[Row]) -> list[str]:
    """`word: wikitext-2-raw, 60 pages, windows of 512 tokens` for each protocol."""
    lines: dict[str, None] = {}
    for row in rows:
        pages = f", {row['pages']} pages{' (partial)' if row.get('partial') else ''}" if "pages" in row else ""
        lines[f"{row['protocol']}: {row['source']}{pages}, windows of {row['context_length']:,} tokens"] = None
    return list(lines)


def _divisor(figure: str, denominators: dict[str, int]) -> str:
    if "words" in denominators:
        name = "words" if figure.endswith("word_ppl") else "bytes"
    else:
        (name,) = denominators
    return f"{denominators[name]:,} {name.replace('_', ' ')}"


def strict_json(rows: Sequence[Row]) -> str:
    """Rows as JSON; figures that are not finite become null, which every reader of JSON takes."""
    tidy = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]
    return json.dumps(tidy, ensure_ascii=False)


@contextmanager
def _bar(title: str, shown: bool) -> Iterator[Report | None]:
    """A progress bar on standard error where that is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
