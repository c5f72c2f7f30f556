"""The code of a job: copied into the run directory when it is submitted, so that later edits do not reach it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_train import __version__
from hope_train.errors import UserError

PACKAGES = ("hope_train", "launch", "data_pipelines")
SOURCES = (".py", ".cpp", ".j2", ".json", ".yaml", ".typed")


@dataclass(frozen=True)
class Snapshot:
    """The code of a submission."""

    folder: Path | None
    """For PYTHONPATH; None: the installed version."""

    facts: dict[str, Any]
    """Version, commit, whether files were changed."""


def take_snapshot(places: Path, root: Path | None = None, dry: bool = False) -> Snapshot:
    """Copy the project's packages from their repository into `places`, beside what git says of them.

    An installed version (no repository around it) is only named: it does not change under a job. The copy's name is
    that of its content; one that is there already is used again. `dry`: only say where it would lie.

    Raises UserError where it cannot be written.
    """
    root = root or Path(__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not (root / "pyproject.toml").is_file():
        return Snapshot(None, {"hope_train": __version__, "commit": None})
    difference = _git(root, "diff", "HEAD", "--", *PACKAGES) or ""
    files = sorted(
        file
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.suffix in SOURCES and "__pycache__" not in file.parts
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    folder = places / f"{commit[:12]}-{digest.hexdigest()[:8]}"
    facts = {"hope_train": __version__, "commit": commit.strip(), "changed": bool(difference), "folder": str(folder)}
    if not folder.is_dir() and not dry:
        try:
            _copy(root, files, folder, difference)
        except OSError as error:
            raise UserError(f"the code cannot be copied to {folder}: {error.strerror or error}") from None
    return Snapshot(folder, facts)


def _copy(root: Path, files: list[Path], folder: Path, difference: str) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for file in files:
        target = temporary / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    (temporary / "changes.diff").write_text(difference, encoding="utf-8")
    temporary.replace(folder)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
