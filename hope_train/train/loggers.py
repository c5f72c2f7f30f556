"""Weights & Biases and TensorBoard: optional, imported only when asked for, and never a reason for a run to stop."""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hope_train.config.tree import RunConfig
from hope_train.errors import UserError

_WANDB_SECONDS = 15.0
_FINISH_SECONDS = 30.0

Tell = Callable[[str], None]


class Logger(Protocol):
    """Takes flat figures by name."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step."""

    def close(self) -> None:
        """The run ends."""


def check_loggers(config: RunConfig) -> None:
    """Raises UserError for a logger that is asked for and not installed."""
    for wanted, package in ((config.log.wandb, "wandb"), (config.log.tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"log.{package} needs the package {package}: pip install -e '.[{package}]'")


class Loggers:
    """All that are asked for. A logger that fails is named in one line and left out from then on."""

    def __init__(self, config: RunConfig, run_dir: Path, step: int, tell: Tell, silent: bool = False) -> None:
        """`step`: where the run goes on from. `silent`: another process logs."""
        self._tell = tell
        self._active: dict[str, Logger] = {}
        if silent:
            return
        if config.log.tensorboard:
            self._guard("TensorBoard", lambda: self._start("TensorBoard", TensorBoard(run_dir, step)))
        if config.log.wandb:
            self._guard("Weights & Biases", lambda: self._start("Weights & Biases", WandB(config, run_dir, tell)))

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl or eval.jsonl."""
        figures = flatten(row)
        for name, logger in list(self._active.items()):
            self._guard(name, partial(logger.log, row["step"], figures))

    def close(self) -> None:
        """End all of them, within a bounded time."""
        for name, logger in list(self._active.items()):
            self._guard(name, logger.close)
        self._active = {}

    def _start(self, name: str, logger: Logger) -> None:
        self._active[name] = logger

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a logger's trouble is, it is not the run's
            self._active.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._tell(f"warning: {name} is left out from here on: {reason}")


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote beyond the checkpoint is hidden by the purge.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """A run there; offline when there is no key, WANDB_MODE says so, or the service does not answer."""

    def __init__(self, config: RunConfig, run_dir: Path, tell: Tell) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        arguments: dict[str, Any] = {
            "project": config.log.wandb_project,
            "name": config.name,
            "id": _run_id(run_dir),
            "resume": "allow",
            "dir": str(run_dir),
            "config": config.model_dump(mode="json"),
        }
        settings = wandb.Settings(init_timeout=_WANDB_SECONDS, console="off", silent=True)
        try:
            self._run = wandb.init(mode=mode, settings=settings, **arguments)
        except Exception as error:
            if mode != "online":
                raise
            tell(f"warning: Weights & Biases cannot be reached, logging offline: {str(error).strip().splitlines()[0]}")
            self._run = wandb.init(mode="offline", settings=settings, **arguments)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step; handed to a background process."""
        self._run.log(figures, step=step)

    def close(self) -> None:
        """Finish, but wait only so long for an upload. What is not uploaded is in the run directory."""
        thread = threading.Thread(target=self._finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(_FINISH_SECONDS)

    def _finish(self) -> None:
        with suppress(Exception):
            self._run.finish()


def flatten(row: dict[str, Any]) -> dict[str, float]:
    """The numbers in a row under names such as `train/loss`, `levels/0/grad_norm`, `validation/word_ppl`."""
    evaluation = row.get("split")
    prefix = f"{evaluation}/" if evaluation else "train/"
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            for name, entries in value.items():
                if isinstance(entries, dict):
                    flat |= {f"{key}/{name}/{k}": float(v) for k, v in entries.items() if _is_number(v)}
        elif _is_number(value) and key not in ("step", "time"):
            flat[prefix + key] = float(value)
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """The same id at every start of a run, so that a resume goes on in the same curves."""
    file = run_dir / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="ascii")
    return file.read_text(encoding="ascii").strip()
