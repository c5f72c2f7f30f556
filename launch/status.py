"""`hope launch status` and `hope launch history`: what Slurm and the run directory say together."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hope_train.checkpoint.manifest import CHECKPOINTS, list_checkpoints
from hope_train.config.load import load_config
from hope_train.errors import UserError
from launch.client import Slurm, SlurmError
from launch.parse import Job, show_duration
from launch.places import Places, find_run, read_lines, submitted_jobs, tasks_of

if TYPE_CHECKING:
    from rich.table import Table


def status_command(runs: Sequence[str], as_json: bool, slurm: Slurm | None = None) -> int:
    """Print where runs are. Raises UserError for a run that cannot be found."""
    slurm = slurm or Slurm()
    found = [status_of(places, slurm) for run in runs for places in tasks_of(find_run(run))]
    if as_json:
        print(json.dumps(found if len(found) > 1 else found[0]))
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    for status in found:
        console.print(_table(status))
    return 0


def status_of(places: Places, slurm: Slurm) -> dict[str, Any]:
    """Everything, as plain values; None where it is not known (yet)."""
    events, run_dir = places.events(), places.run_dir
    rows, evaluations = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "eval.jsonl")
    last = rows[-1] if rows else {}
    total_steps, total_tokens = _totals(places)
    starts = [event for event in events if event["event"] == "started"]
    perplexities = [row for row in evaluations if row.get("word_ppl") is not None]
    job, trouble = _job(places, slurm)
    there = list_checkpoints(run_dir / CHECKPOINTS)
    age = time.time() - there[-1].stat().st_mtime if there else None
    speed = last.get("tokens_per_s")
    trained = last.get("tokens")
    left = (total_tokens - trained) / speed if speed and total_tokens and trained is not None else None
    running = job is not None and job.state == "RUNNING"
    stopped = Places(run_dir).stopped()
    ends = [event for event in events if event["event"] == "ended"]
    return {
        "run": run_dir.name,
        "run_dir": str(run_dir),
        "job": None if job is None else job.handle,
        "state": None if job is None else job.state,
        "reason": None if job is None else job.reason,
        "nodes": None if job is None else job.node_list,
        "expected_start": job.start if job is not None and job.state == "PENDING" else None,
        "time_limit_at": job.end if running and job is not None else None,
        "slurm": trouble,
        "starts": len(starts),
        "restarts": max(len(starts) - 1, 0),
        "step": last.get("step"),
        "total_steps": total_steps,
        "loss": last.get("loss"),
        "tokens": last.get("tokens"),
        "tokens_per_s": speed,
        "word_ppl": perplexities[-1]["word_ppl"] if perplexities else None,
        "word_ppl_step": perplexities[-1].get("step") if perplexities else None,
        "checkpoint_step": places.newest_step() or None,
        "checkpoint_age_s": age,
        "last_line_age_s": time.time() - last["time"] if last.get("time") else None,
        "estimated_end": time.time() + left if running and left is not None else None,
        "training_left_s": left,
        "stopped": stopped.get("reason"),
        "last_end": ends[-1]["reason"] if ends else None,
    }


def _totals(places: Places) -> tuple[int | None, int | None]:
    """(steps, tokens) of the whole run."""
    files = [places.run_dir / "config.yaml", *sorted(places.folder.glob("submissions/*/*.yaml"), reverse=True)]
    for file in files:
        with suppress(UserError):
            train = load_config(file).train
            return train.total_steps, train.tokens_after(train.total_steps)
    return None, None


def _job(places: Places, slurm: Slurm) -> tuple[Job | None, str | None]:
    """The run's job that is active, or its last one if Slurm remembers it; and what kept us from asking."""
    names = submitted_jobs(places)
    if not names:
        return None, None
    try:
        active = slurm.queue(names[-50:])
        return slurm.job(active[0].handle if active else names[-1]), None
    except SlurmError as error:
        return None, str(error)


def _table(status: dict[str, Any]) -> Table:
    from rich.table import Table as RichTable

    table = RichTable(show_header=False, title=status["run"], title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in _lines(status):
        table.add_row(name, text)
    return table


def _lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if status["slurm"]:
        lines.append(("Slurm", status["slurm"]))
    elif status["job"] is None:
        lines.append(("job", "none that Slurm remembers"))
    else:
        reason = f" ({status['reason']})" if status["reason"] else ""
        where = f" on {status['nodes']}" if status["nodes"] else ""
        lines.append(("job", f"{status['job']}: {status['state'].lower()}{reason}{where}"))
    if status["expected_start"]:
        lines.append(("expected start", _clock(status["expected_start"])))
    if status["time_limit_at"]:
        lines.append(("time limit", f"in {show_duration(max(status['time_limit_at'] - time.time(), 0))}"))
    lines.append(("starts", f"{status['starts']} ({status['restarts']} restarts)"))
    if status["step"] is not None:
        loss = "" if status["loss"] is None else f", loss {status['loss']:.4f}"
        lines.append(("step", f"{status['step']:,} of {status['total_steps'] or 0:,}{loss}"))
    if status["tokens_per_s"]:
        age = f", {show_duration(status['last_line_age_s'])} ago" if status["last_line_age_s"] else ""
        lines.append(("speed", f"{status['tokens_per_s']:,.0f} tokens/s{age}"))
    if status["word_ppl"] is not None:
        lines.append(("WikiText word_ppl", f"{status['word_ppl']:.2f} at step {status['word_ppl_step']:,}"))
    if status["checkpoint_step"]:
        ago = show_duration(status["checkpoint_age_s"] or 0)
        lines.append(("newest checkpoint", f"step {status['checkpoint_step']:,}, {ago} ago"))
    if status["estimated_end"]:
        lines.append(("estimated end", _clock(status["estimated_end"])))
    elif status["training_left_s"] and status["stopped"] != "completed":
        lines.append(("training left", show_duration(status["training_left_s"])))
    if status["stopped"] or status["last_end"]:
        lines.append(("last end", str(status["last_end"] or status["stopped"])))
    return lines


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


# History


def history_command(run: str, as_json: bool, slurm: Slurm | None = None) -> int:
    """Print every start of a run, or of each of a sweep's. Raises UserError for a run that cannot be found."""
    slurm = slurm or Slurm()
    found = [(places, history_of(places)) for places in tasks_of(find_run(run))]
    known = [_accounts(rows, slurm) for _, rows in found]
    if as_json:
        print(
            json.dumps(
                [
                    {"run": places.run_dir.name, **row, "account": accounts.get(row["start"])}
                    for (places, rows), accounts in zip(found, known, strict=True)
                    for row in rows
                ]
            )
        )
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    for (places, rows), accounts in zip(found, known, strict=True):
        console.print(_history_table(places, rows, accounts))
    return 0


def _history_table(places: Places, rows: Sequence[dict[str, Any]], accounts: dict[str, str]) -> Table:
    from rich.table import Table as RichTable

    table = RichTable(title=places.run_dir.name, title_justify="left", title_style="bold", header_style="bold")
    names = ("start", "began", "lasted", "nodes", "from step", "to step", "end")
    for name in (*names, "accounting") if accounts else names:
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = [
            row["start"],
            _clock(row["began"]),
            show_duration(row["lasted_s"]) if row["lasted_s"] is not None else "",
            ",".join(row["nodes"]),
            str(row["from_step"]),
            "" if row["to_step"] is None else str(row["to_step"]),
            row["end"],
        ]
        table.add_row(*cells, *([accounts.get(row["start"], "")] if accounts else []))
    return table


def history_of(places: Places) -> list[dict[str, Any]]:
    """A row for each start, the oldest first. One that left no word of its end was lost with its node, or runs."""
    rows: list[dict[str, Any]] = []
    asked: str | None = None
    for event in places.events():
        if event["event"] == "started":
            if rows and rows[-1]["to_step"] is None:
                late = f"{asked}, and ended from outside before it could say what came of it"
                rows[-1]["end"] = late if asked else "lost: its node ended before it could say why"
                rows[-1]["to_step"] = event["from_step"]
            asked = None
            rows.append(_start_row(event, event["nodes"], event["from_step"]))
        elif event["event"] == "asked":
            asked = event["why"]
        elif event["event"] == "ended":
            if event["start"] not in [row["start"] for row in rows]:  # it found nothing to do, or no space to say more
                rows.append(_start_row(event, [], event["step"]))
            if rows[-1]["start"] == event["start"]:
                left_out = f"; left out: {', '.join(event['exclude'])}" if event.get("exclude") else ""
                rows[-1] |= {
                    "lasted_s": event["time"] - rows[-1]["began"],
                    "to_step": event["step"],
                    "end": f"{event['reason']}: {event['action']}{left_out}",
                }
    return rows


def _start_row(event: dict[str, Any], nodes: list[str], step: int) -> dict[str, Any]:
    return {
        "start": event["start"],
        "began": event["time"],
        "lasted_s": None,
        "nodes": nodes,
        "from_step": step,
        "to_step": None,
        "end": "",
    }


def _accounts(rows: Sequence[dict[str, Any]], slurm: Slurm) -> dict[str, str]:
    """What the accounting says of each start, where there is one: `<state>, exit code`."""
    jobs = list(dict.fromkeys(row["start"].rpartition(".")[0] for row in rows if not row["start"].startswith("local-")))
    found: dict[str, str] = {}
    with suppress(SlurmError):
        seen: dict[str, int] = {}
        for row in slurm.accounts(jobs):
            number = seen.get(row["JobIDRaw"], 0)
            seen[row["JobIDRaw"]] = number + 1
            found[f"{row['JobIDRaw']}.{number}"] = f"{row['State']}, {row['ExitCode']}"
    return found
