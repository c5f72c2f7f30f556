"""`hope report`: run directories in, PNGs and one self-contained HTML page out. Reads run directories only."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hope_train.errors import UserError
from hope_train.report.figures import draw_all
from hope_train.report.page import render_page, summary_rows
from hope_train.report.runs import Run, read_runs
from hope_train.report.summary import Summary, summarise


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    images: dict[str, Path]
    summaries: list[Summary]
    notes: list[str]


def make_report(paths: Sequence[str], out: str | None = None) -> Report:
    """Draw the runs into `out`, or `<run>/report` (`<first run>/report/with_<others>` for several runs).

    Files: report.html (self-contained), and a PNG per plot. Raises UserError for a folder that is no run, a run that
    has logged nothing, an output folder that cannot be written.
    """
    runs = read_runs(list(paths))
    folder = Path(out) if out else _default_folder(runs)
    summaries = [summarise(run) for run in runs]
    images = _images(runs)
    page = render_page(runs, summaries, {stem: base64.b64encode(data).decode() for stem, data in images.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem, data in images.items():
            _write(folder / f"{stem}.png", data)
        _write(folder / "report.html", page.encode())
    except OSError as error:
        raise UserError(f"cannot write the report into {folder}: {error.strerror}") from None
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return Report(folder / "report.html", {stem: folder / f"{stem}.png" for stem in images}, summaries, notes)


def report_command(runs: list[str], out: str | None = None, as_json: bool = False) -> int:
    """Write the report and print its summary as a table or, with `as_json`, as one JSON object. Returns 0."""
    report = make_report(runs, out)
    if as_json:
        print(
            json.dumps(
                {
                    "report": str(report.page),
                    "images": {stem: str(path) for stem, path in report.images.items()},
                    "runs": [summary.to_dict() for summary in report.summaries],
                    "notes": report.notes,
                }
            )
        )
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    for summary in report.summaries:
        table.add_column(summary.run, justify="right")
    for label, cells in summary_rows(report.summaries):
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(note, style="yellow", markup=False)
    # A path is for copying: never wrapped, never coloured in the middle.
    console.print(f"report: {report.page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _default_folder(runs: Sequence[Run]) -> Path:
    folder = runs[0].path / "report"
    others = "_".join(run.path.resolve().name for run in runs[1:])
    return folder / f"with_{others[:100]}" if others else folder


def _images(runs: Sequence[Run]) -> dict[str, bytes]:
    """File stem -> PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("`hope report` needs matplotlib: pip install 'hope-train[report]'") from None
    images = {}
    # A name with dollar signs is a name, not mathematics.
    with matplotlib.rc_context({"text.parse_math": False}):
        for stem, figure in draw_all(runs).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            images[stem] = buffer.getvalue()
    return images


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, so that a browser never reloads half a page while a run is being watched."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
