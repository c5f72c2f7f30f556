"""Arrays: many runs from one command, one line of a file or one point of a grid for each."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hope_train.errors import UserError


def sweep_overrides(file: str | None, grid: Sequence[str]) -> list[list[str]]:
    """The overrides of every task, in order.

    Args:
        file: a text file, a task a line: overrides between spaces, as on a command line. `#` begins a comment.
        grid: `key=a,b,c` each; their product is taken, the last varying fastest.

    Raises UserError for a file that cannot be read or is empty, and for what is no override.
    """
    tasks: list[list[str]] = [[]]
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"sweep file {file} cannot be read: {error.strerror or error}") from None
        tasks = []
        for number, line in enumerate(lines, 1):
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                raise UserError(f"sweep file {file}, line {number}: {str(error).lower()}") from None
            tasks += [words] if words else []
        if not tasks:
            raise UserError(f"sweep file {file} has no task: write the overrides of one run on each line")
    choices = []
    for text in grid:
        key, sign, values = text.partition("=")
        if not sign or not values:
            raise UserError(f"--grid {text!r}: write key=a,b,c")
        choices.append([f"{key}={value}" for value in _split(values)])
    found = [[*task, *point] for task in tasks for point in itertools.product(*choices)]
    for task in found:
        for text in task:
            if "=" not in text:
                raise UserError(f"{text!r} in the sweep is not an override: write key=value")
    return found


def _split(values: str) -> list[str]:
    """At commas, but not inside brackets or braces."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", values)]


def array_option(text: str | None, tasks: int) -> tuple[str, list[int]]:
    """Slurm's --array for so many tasks, and which of them it names.

    Raises UserError for one that is not Slurm's, or names tasks which are not there.
    """
    if text is None:
        return f"0-{tasks - 1}", list(range(tasks))
    chosen, _, at_a_time = text.partition("%")
    named: set[int] = set()
    for part in chosen.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1)) if match else ()
        if not numbers or ("%" in text and not re.fullmatch(r"[1-9]\d*", at_a_time)):
            raise UserError(f"--array {text!r}: write it as Slurm does: 0-5, 0-5%2 or 1,3")
        if numbers[-1] >= tasks:
            raise UserError(f"--array {text}: the sweep has tasks 0 to {tasks - 1}")
        named |= set(numbers)
    return text, sorted(named)
