"""`hope launch local`: the same supervision without Slurm: one machine, torchrun, and a requeue in place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hope_train.checkpoint.fence import refuse_if_in_use
from hope_train.config.load import load_config
from hope_train.errors import UserError
from launch.checks import check_layout
from launch.places import BY_CANCEL, BY_SUPERVISOR, LOCAL, Places, forget_stop, write_json
from launch.request import Request
from launch.site import load_site
from launch.submit import absolute, ensure, write_config
from launch.supervise import Supervisor


class LocalBackend:
    """This machine. See `launch.supervise.Backend`."""

    def __init__(self, job: str) -> None:
        """`job`: a name for this call of `hope launch local`."""
        self.job, self.restart = job, 0
        self.start = f"{job}.0"
        self.again = False
        self.delay_s = 0

    def nodes(self) -> list[str]:
        """One: this host."""
        return [os.uname().nodename]

    def address(self, node: str) -> str:
        """All ranks are here."""
        return "127.0.0.1"

    def port(self, attempt: int) -> int:
        """One that is free."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    def run(
        self, nodes: Sequence[str], per_node: int, command: Sequence[str], name: str, log: Path
    ) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C reaches the supervisor alone."""
        # Inside an allocation Slurm's variables would tell each rank another place.
        environment = {key: text for key, text in os.environ.items() if not key.startswith("SLURM")}
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
            )

    def kill(self, step: subprocess.Popen[bytes], name: str) -> None:
        """The process and all that it started, torchrun's ranks too, which lead sessions of their own."""
        everyone = [*descendants(step.pid), step.pid]
        for process in everyone:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        step.wait()

    def state(self) -> tuple[str, bool]:
        """Nobody takes the machine away."""
        return "RUNNING", False

    def ends(self) -> float | None:
        """There is no time limit."""
        return None

    def requeue(self, exclude: Sequence[str], delay_s: int) -> None:
        """Start again, here."""
        self.again, self.delay_s = True, delay_s

    def wait_for_slurm(self) -> None:
        """Never needed here."""


def descendants(process: int) -> list[int]:
    """A process's children, theirs, and so on."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                found += [int(child), *descendants(int(child))]
    return found


def local_command(
    config: str, overrides: Sequence[str], ranks: int, site_file: str | None, options: Mapping[str, Any]
) -> int:
    """Train on `ranks` processes of this machine; a crash or a hang is started again as on a cluster.

    Ctrl-C, SIGTERM and SIGUSR1 save and stop. Returns the exit code. Raises UserError.
    """
    site = load_site(site_file, {**options, "nodes": "1", "launcher": "torchrun"})
    settings = load_config(config, overrides)
    check_layout(settings, 1, ranks, elastic=False)
    run_dir = absolute(settings)
    refuse_if_in_use(run_dir)
    ensure(run_dir)
    places = Places(run_dir)
    folder = places.submission(places.next_submission())
    health = site.health.model_copy(update={"all_reduce": False})
    request = Request(
        run_dir=str(run_dir),
        config=str(folder / f"{settings.name}.yaml"),
        site=site.model_copy(update={"health": health}),
        submission=str(folder),
        working_directory=str(Path.cwd()),
        gpus_per_node=site.gpus_per_node or 0,
        ranks_per_node=ranks,
        source={"config": config, "overrides": list(overrides), "local": True},
    )
    try:
        write_config(Path(request.config), settings)
        write_json(folder / "request.json", request.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    job = f"{LOCAL}{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    forget_stop(run_dir, BY_SUPERVISOR, BY_CANCEL)
    places.note("submitted", job=job, submission=str(folder))
    backend = LocalBackend(job)
    os.environ.pop("WORLD_SIZE", None)
    os.environ.pop("RANK", None)
    print(f"run directory {run_dir}; what the ranks say: hope launch logs -f {run_dir}", flush=True)
    while True:
        supervisor = StoppedByHand(request, backend)
        code = supervisor.run()
        if not backend.again or supervisor.asked is not None:
            return code
        backend.again = False
        backend.restart += 1
        backend.start = f"{job}.{backend.restart}"
        time.sleep(backend.delay_s)


class StoppedByHand(Supervisor):
    """A signal is a person's: it ends the run for now instead of having it start again."""

    def run(self) -> int:
        """As the supervisor does, with Ctrl-C too."""
        signal.signal(signal.SIGINT, lambda got, _: self.got.add("INT"))
        return super().run()

    def _answer_signals(self) -> None:
        if self.asked is None and self.got & {"INT", "TERM", "USR1"}:
            self._ask("stopped by hand")

    def _evidence(self, *positional: Any, **named: Any) -> Any:
        self.got.discard("TERM")
        asked, self.asked = self.asked, None  # a stop that was asked for by a person is no requeue
        evidence = super()._evidence(*positional, **named)
        self.asked = asked
        return evidence
