"""The stacks of every rank of a node, read from outside: `python -m launch.stacks START`, one task per node.

py-spy reads another process's memory: the process is not asked, and need not be able to answer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.places import read_json
from launch.rank import node_name

TIMEOUT_S = 30.0


def main() -> int:
    """Write `stacks/<rank>.txt` for the ranks of this node."""
    start = Path(sys.argv[1])
    folder = start / "stacks"
    folder.mkdir(exist_ok=True)
    for mark in sorted((start / "ranks").glob("*.json")):
        facts = read_json(mark)
        if facts.get("node") == node_name() and "exit" not in facts:
            (folder / f"{facts['rank']}.txt").write_text(stacks_of(facts), encoding="utf-8")
    return 0


def stacks_of(facts: dict[str, Any]) -> str:
    """What py-spy says of a rank's process, under a line that names it."""
    head = f"rank {facts['rank']} on {facts['node']}, process {facts['pid']} ({process_state(facts['pid'])})\n"
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
    if program is None:
        return head + "py-spy is not installed on this node (pip install py-spy)\n"
    try:
        # Nonblocking: a process that is stopped cannot be stopped again, and one that hangs does not move anyway.
        command = [program, "dump", "--nonblocking", "--pid", str(facts["pid"])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return head + f"py-spy: {error}\n"
    return head + done.stdout + done.stderr


def process_state(pid: int) -> str:
    """`S (sleeping)`, `T (stopped)`, … or `gone`."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "gone"
    return next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
