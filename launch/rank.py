"""One rank of a job: says where it runs, trains, and leaves its exit code where the supervisor finds it.

`python -m launch.rank START CONFIG KEY=VALUE …`, started by torchrun or by srun.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from hope_train.checkpoint.fence import CLAIM
from hope_train.errors import UserError
from hope_train.parallel.slurm import adopt_step
from launch.places import read_json, write_json

HEARTBEAT = "HOPE_HEARTBEAT"
WRONG_INPUT = 2
PATIENCE_S = 10.0
"""How long a rank that failed waits for rank 0 to say why: the first to leave has the others killed."""

_PR_SET_PTRACER, _ANYBODY = 0x59616D61, -1


def main() -> int:
    """Run one rank. Returns its exit code."""
    start, arguments = Path(sys.argv[1]), sys.argv[2:]
    if "RANK" not in os.environ:
        log_to(start / f"{node_name()}.log")
    try:
        adopt_step(os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    rank = int(os.environ.get("RANK", "0"))
    os.environ[CLAIM] = start.name
    if rank == 0:
        os.environ[HEARTBEAT] = str(start / "heartbeat")
    allow_tracing()
    mark = start / "ranks" / f"{rank}.json"
    facts = {"rank": rank, "node": node_name(), "pid": os.getpid(), "local_rank": os.environ.get("LOCAL_RANK", "0")}
    with suppress(OSError):
        write_json(mark, facts)
    code, said = 1, ""
    try:
        from hope_train.train.run import train_command

        code = train_command(arguments[0], arguments[1:], "auto", False, False)
    except UserError as error:
        said = " ".join(str(error).split())
        print(f"error: {said}", file=sys.stderr)
        code = WRONG_INPUT
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        write_json(mark, facts | {"exit": code} | ({"error": said[:500]} if said else {}))
    if code != 0 and rank != 0:
        deadline = time.monotonic() + PATIENCE_S
        while "exit" not in read_json(start / "ranks" / "0.json") and time.monotonic() < deadline:
            time.sleep(0.2)
    return code


def node_name() -> str:
    """This node by Slurm's name, which need not be the host's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def log_to(file: Path) -> None:
    """Whatever this process and its children print goes to a file, at its end."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def allow_tracing() -> None:
    """Let a debugger of the same user look at this process, where the kernel forbids it by default."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
