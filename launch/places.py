"""Where everything about a run's jobs lies in its run directory, and the log of what happened to them.

<run>/launch/
    events.jsonl              submitted, started, asked to stop, ended, …: one line each
    submissions/1/            job.sh, request.json (or one per task of an array), config.yaml
    code/<name>/              the code that runs, as it was when it was submitted
    <job>.<restart>/          a start: environment, what each node said, ranks/, health/, stacks/, heartbeat
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_train.checkpoint.fence import write_atomically
from hope_train.checkpoint.manifest import CHECKPOINTS, list_checkpoints, step_of
from hope_train.errors import UserError

Event = dict[str, Any]

LOCAL = "local-"
"""How the names of calls of `hope launch local` begin, where jobs of Slurm's have numbers."""


@dataclass(frozen=True)
class Places:
    """The folders and files of one run."""

    run_dir: Path

    @property
    def folder(self) -> Path:
        """All that the launcher writes."""
        return self.run_dir / "launch"

    def submission(self, number: int) -> Path:
        """What was submitted the n-th time."""
        return self.folder / "submissions" / str(number)

    def start(self, start: str) -> Path:
        """Everything about one start, `<job>.<restart>`."""
        return self.folder / start

    def next_submission(self) -> int:
        """The number of a submission that has not been made yet."""
        there = self.folder / "submissions"
        numbers = [int(path.name) for path in there.glob("*") if path.name.isdigit()] if there.is_dir() else []
        return max(numbers, default=0) + 1

    def stopped(self) -> dict[str, Any]:
        """What the run wrote when it stopped last; empty if it never did."""
        return read_json(self.run_dir / "STOPPED.json")

    def is_complete(self, total_steps: int) -> bool:
        """Whether the run has been trained and evaluated to this step, its last."""
        stopped = self.stopped()
        return stopped.get("reason") == "completed" and stopped.get("step", 0) >= total_steps

    def note(self, event: str, **facts: Any) -> None:
        """Append to the log of events. A disk that is full loses the line, and nothing else."""
        row = {"time": time.time(), "event": event, **facts}
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, (json.dumps(row, ensure_ascii=False) + "\n").encode())
            finally:
                os.close(handle)

    def events(self) -> list[Event]:
        """The log, the oldest first; torn lines are left out."""
        return read_lines(self.folder / "events.jsonl")

    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        there = list_checkpoints(self.run_dir / CHECKPOINTS)
        return (step_of(there[-1]) or 0) if there else 0


STOP = "STOP"
"""A file of this name in the run directory has the run save and stop."""

BY_SUPERVISOR, BY_CANCEL = "start ", "cancelled"
"""How the file begins when it is not a person's own."""


def forget_stop(run_dir: Path, *beginnings: str) -> None:
    """Remove a stop file that begins with one of these: nobody obeyed it, and it is no order to the next start."""
    with suppress(OSError):
        if (run_dir / STOP).read_text(encoding="utf-8").startswith(beginnings):
            (run_dir / STOP).unlink()


def submitted_jobs(places: Places) -> list[str]:
    """The jobs of Slurm's that a run was ever submitted as, the oldest first."""
    names = [str(event["job"]) for event in places.events() if event["event"] == "submitted"]
    return [name for name in names if not name.startswith(LOCAL)]


def tasks_of(places: Places) -> list[Places]:
    """The runs of a sweep's tasks, where a sweep was submitted last; else the run itself."""
    last = next((event for event in reversed(places.events()) if event["event"] in ("submitted", "swept")), None)
    return [Places(Path(folder)) for folder in last["tasks"]] if last and last["event"] == "swept" else [places]


def say(text: str) -> None:
    """A line for the job's log. A disk that is full loses the line, and nothing else."""
    with suppress(OSError):
        print(text, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; what is not a whole row is left out."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    found.append(row)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace a file whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def registry() -> Path:
    """This user's list of submissions, by which a job's id or a run's name leads to its directory."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hope" / "jobs.jsonl"


def register(run_dir: Path, name: str, jobs: list[str]) -> None:
    """Remember where a job's run lies. It is a convenience: a home that cannot be written costs nothing else."""
    with suppress(OSError):
        registry().parent.mkdir(parents=True, exist_ok=True)
        with registry().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"jobs": jobs, "name": name, "run_dir": str(run_dir)}) + "\n")


def find_run(text: str) -> Places:
    """The run that a directory, a run's name or a job's id names. Raises UserError."""
    for folder in (Path(text), Path("runs") / text):
        if (folder / "launch").is_dir() or (folder / "config.yaml").is_file():
            return Places(folder.resolve())
    rows = [row for row in reversed(read_lines(registry())) if Path(row["run_dir"]).is_dir()]
    for wanted in (text, text.partition("_")[0]):  # a task of an array, before the array
        for row in rows:
            if wanted == row.get("name") or wanted in row.get("jobs", ()):
                return Places(Path(row["run_dir"]))
    raise UserError(
        f"{text!r} is no run directory, no run in runs/ and no job that was submitted from here: name the run directory"
    )
