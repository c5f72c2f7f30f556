"""The run directory: whose it is, what is written into it at a start, and why the run stopped."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipelines.tokenizer import Tokenizer
from hope_train import __version__
from hope_train.checkpoint.fence import Fence, write_atomically
from hope_train.checkpoint.manifest import CHECKPOINTS
from hope_train.config.load import dump_yaml, validate
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.run_files import TOKENIZER_FILE
from hope_train.train.metrics import Row, cut_back

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "eval.jsonl"
STOPPED = "STOPPED.json"

Changes = dict[str, tuple[Any, Any]]
"""By dotted key: the value in the run directory, and the one asked for."""

# Keys that may change between two starts of a run: they change neither what is learnt nor on what.
# (The tokenizer's and the sources' contents are compared by their fingerprints, wherever the files lie.)
FREE = (
    *("name", "dir", "log", "checkpoint", "eval", "parallel", "data.tokenizer", "data.cache_dir", "data.hub_timeout"),
    *("data.retries", "data.retry_seconds", "data.stream.workers", "data.stream.prefetch_rows"),
    *("train.device", "train.threads", "train.log_every", "train.nan_patience", "optimizer.rest_from_period"),
)

_PACKAGES = ("torch", "numpy", "sentencepiece", "datasets", "pydantic", "triton")


def check_directory(run_dir: Path) -> None:
    """Raises UserError if the run directory cannot be made, or cannot be written."""
    place = run_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"run directory {run_dir}: {place} is a file; choose another dir= or name=")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"run directory {run_dir}: {place} is not writable; choose another dir=")


def check_owner(run_dir: Path, config: RunConfig, tokenizer: Tokenizer, force: bool) -> list[str]:
    """Refuse a run directory of another configuration. Returns the keys that differ; those that matter only by force.

    Raises UserError naming the first key that differs.
    """
    changed = differences_from(run_dir, config)
    matter = serious(changed)
    if matter and not force:
        key, (was, now) = next(iter(matter.items()))
        names = list(matter)
        more = f" (and {len(names) - 1} more: {', '.join(names[1:4])})" if len(names) > 1 else ""
        raise UserError(
            f"run directory {run_dir} belongs to another configuration: {key} is {short(was)} there and "
            f"{short(now)} here{more}; choose another name= or dir=, or say --force-config to go on with the new one"
        )
    own = run_dir / TOKENIZER_FILE
    if own.is_file() and not force and own.read_bytes() != tokenizer.proto:
        raise UserError(
            f"tokenizer {tokenizer.path} is not the one of run directory {run_dir} ({own}): use that one, or choose "
            "another name= or dir="
        )
    return list(changed)


def differences_from(run_dir: Path, config: RunConfig) -> Changes:
    """In what `config` differs from the configuration in the run directory; nothing where there is none."""
    try:
        tree = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        tree = None
    return differences_from_tree(tree, config)


def differences_from_tree(tree: Any, config: RunConfig) -> Changes:
    """In what `config` differs from the configuration in a plain tree, as an earlier run wrote it."""
    # Validated first, so that a key which did not exist yet when it was written has its default; what another version
    # wrote and this one refuses is compared as it stands.
    with contextlib.suppress(UserError):
        tree = validate(RunConfig, tree).model_dump(mode="json") if isinstance(tree, dict) else tree
    return differences(tree, config.model_dump(mode="json"))


def differences(one: Any, other: Any, prefix: str = "") -> Changes:
    """The leaves in which two plain trees differ: {dotted key: (value in one, value in the other)}."""
    if isinstance(one, dict) and isinstance(other, dict):
        found: Changes = {}
        for name in dict.fromkeys([*one, *other]):
            found |= differences(one.get(name), other.get(name), f"{prefix}{name}.")
        return found
    if _sections(one) and _sections(other) and len(one) == len(other):  # as the levels are: which of them, and in what
        return differences(dict(enumerate(one)), dict(enumerate(other)), prefix)
    return {} if one == other else {prefix.removesuffix(".") or "everything": (one, other)}


def _sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def serious(changed: Changes) -> Changes:
    """Those differences that make it another run."""
    return {
        key: values
        for key, values in changed.items()
        if not any(key == name or key.startswith(f"{name}.") for name in FREE)
    }


def short(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def open_directory(run_dir: Path, config: RunConfig, tokenizer: Tokenizer, step: int) -> Fence:
    """Take the directory over for a start at `step`: everything written here is about this start.

    Logs are cut back to `step`; what is cut, and a config.yaml or STOPPED.json that is replaced, stays under another
    name. Raises UserError where it cannot be written, or another process is training in it.
    """
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        fence = Fence.take(run_dir)
        for name in (METRICS, EVALUATIONS):
            cut_back(run_dir / name, step, suffix=f"beyond-{step}-{fence.id}")
        text = dump_yaml(config)
        file = run_dir / CONFIG
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            file.replace(run_dir / f"config.before-{fence.id}.yaml")
        write_atomically(file, text)
        own = run_dir / TOKENIZER_FILE
        if not own.is_file() or own.read_bytes() != tokenizer.proto:
            if own.is_file():
                own.replace(run_dir / f"tokenizer.before-{fence.id}.model")
            temporary = own.with_suffix(".tmp")
            temporary.write_bytes(tokenizer.proto)
            temporary.replace(own)
        file = run_dir / ENVIRONMENT
        starts = [environment(fence.id, step), *_starts(file)]
        write_atomically(file, json.dumps({**starts[0], "earlier_starts": starts[1:]}, indent=1) + "\n")
        if (run_dir / STOPPED).exists():
            (run_dir / STOPPED).replace(run_dir / "STOPPED.previous.json")
    except OSError as error:
        raise UserError(f"run directory {run_dir} cannot be written: {error.strerror or error}") from None
    return fence


def write_stopped(run_dir: Path, reason: str, step: int, tokens: int, **more: Any) -> None:
    """Say why the run stopped: `completed`, `signal`, `nan` or `error`. Raises OSError."""
    row: Row = {"reason": reason, "step": step, "tokens": tokens, "time": time.time(), **more}
    write_atomically(run_dir / STOPPED, json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def read_stopped(run_dir: Path) -> dict[str, Any]:
    """The marker, or an empty mapping."""
    try:
        tree = json.loads((run_dir / STOPPED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def environment(incarnation: str, step: int) -> dict[str, Any]:
    """Versions, commit, host and command of this start."""
    cuda = torch.cuda.is_available()
    return {
        "incarnation": incarnation,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": step,
        "hope_train": __version__,
        "git": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "pid": os.getpid(),
        "command": shlex.join(sys.argv),
    }


def _starts(file: Path) -> list[dict[str, Any]]:
    """The starts that are noted in an environment.json, the newest first."""
    try:
        newest = json.loads(file.read_text(encoding="utf-8"))
        return [newest, *newest.pop("earlier_starts", [])]
    except (OSError, ValueError, AttributeError):
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit that this code is at, with `-dirty` where files were changed; None where it is in no repository."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed copy below somebody else's repository is not of that repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
