"""`hope launch logs`: what a run prints, node by node and start by start."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hope_train.errors import UserError
from launch.places import Places, find_run, read_json, tasks_of

POLL_S = 0.5


def logs_command(run: str, follow: bool, node: str | None, start: str | None, lines: int) -> int:
    """Print the end of a log, and with `follow` what is added, going on with the next start. Raises UserError."""
    places, *others = tasks_of(find_run(run))
    if others:
        names = ", ".join(task.run_dir.name for task in (places, *others))
        raise UserError(f"{run} is a sweep: name one of its runs ({names})")
    shown = start or newest_start(places)
    if shown is None and follow:
        print(f"{places.run_dir} has not been started yet: hope launch status says where its job is", flush=True)
        for text in follow_file(lambda: job_output(places), from_end=False, until=lambda: bool(newest_start(places))):
            print(text, end="", flush=True)
        shown = newest_start(places)
    if shown is None:
        said = job_output(places)
        if not said.is_file():
            raise UserError(f"{places.run_dir} has not been started yet: hope launch status says where its job is")
        print("\n".join(tail(said, lines)))
        return 0
    if not follow:
        file = log_file(places, shown, node)
        if not file.is_file():
            raise UserError(f"there is no {file}: this start has {', '.join(log_names(places, shown)) or 'no log yet'}")
        print("\n".join(tail(file, lines)))
        return 0
    begun = False
    while True:
        for text in tail(log_file(places, shown, node), lines) if not begun else ():
            print(text, flush=True)
        find = functools.partial(log_file, places, shown, node)
        for text in follow_file(find, from_end=not begun, until=functools.partial(ended, places, shown)):
            print(text, end="", flush=True)
        begun, lines = True, 0
        following = None if start else newest_start(places)
        if following == shown:
            if finished(places, shown):
                return 0
            time.sleep(POLL_S)
            continue
        if following is None:
            return 0
        shown = following
        print(f"== start {shown}", flush=True)


def newest_start(places: Places) -> str | None:
    """The start that was noted last."""
    starts = [str(event["start"]) for event in places.events() if event["event"] == "started"]
    return starts[-1] if starts else None


def job_output(places: Places) -> Path:
    """Where the newest job script has said something by itself: all there is while the supervisor has not started."""
    files = [file for file in places.folder.glob("submissions/*/job-*.out") if file.stat().st_size]
    return max(files, key=lambda file: file.stat().st_mtime, default=places.folder / "job.out")


def log_names(places: Places, start: str) -> list[str]:
    """The logs of a start."""
    return sorted(file.name for file in places.start(start).glob("*.log"))


def log_file(places: Places, start: str, node: str | None) -> Path:
    """A node's log; None: rank 0's node, or before that is known srun's own."""
    folder = places.start(start)
    if node is None:
        nodes = [event["nodes"] for event in places.events() if event["event"] == "ranks" and event["start"] == start]
        node = str(read_json(folder / "ranks" / "0.json").get("node") or (nodes[-1][0] if nodes else "srun"))
    return folder / f"{node}.log"


def ended(places: Places, start: str) -> bool:
    """Whether the start has noted its end, or a later one has begun."""
    return newest_start(places) != start or finished(places, start)


def finished(places: Places, start: str) -> bool:
    """Whether nothing comes after this start."""
    ends = [e for e in places.events() if e["event"] == "ended" and e.get("start") == start]
    return bool(ends) and ends[-1]["action"] in ("finish", "leave")


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:] if lines else []


def follow_file(find: Callable[[], Path], from_end: bool, until: Callable[[], bool]) -> Iterator[str]:
    """What is added to a file, until `until()` and its end. Where rank 0 is, and so which file, shows only later."""
    file = find()
    position = file.stat().st_size if from_end and file.is_file() else 0
    while True:
        done = until()
        if (now := find()) != file:
            file, position = now, 0
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as stream:
                stream.seek(position)
                text = stream.read()
                position = stream.tell()
            if text:
                yield text
        if done:
            return
        time.sleep(POLL_S)
