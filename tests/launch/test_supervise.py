"""The supervisor on this machine, with small programs in the place of ranks: what it does, in seconds."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from hope_train.checkpoint.fence import claim, claimed_by
from hope_train.config.load import validate
from launch.local import LocalBackend, descendants
from launch.places import Places, read_json
from launch.request import Request
from launch.supervise import Supervisor

COMMON = """
import json, os, sys, time
run, start = sys.argv[1], sys.argv[2]
def stopped(reason, step, detail=None):
    tree = {"reason": reason, "step": step, "time": time.time(), "detail": detail}
    open(run + "/STOPPED.json", "w").write(json.dumps(tree))
def beat(phase, step):
    open(start + "/heartbeat", "w").write(f"{phase} {step} 0.0\\n")
os.makedirs(start + "/ranks", exist_ok=True)
def mark(**more):
    tree = {"rank": 0, "node": os.uname().nodename, "pid": os.getpid(), **more}
    open(start + "/ranks/0.json", "w").write(json.dumps(tree))
mark()
"""
OBEYS = """
for _ in range(600):
    if os.path.exists(run + "/STOP"):
        os.unlink(run + "/STOP")
        stopped("signal", 3, "STOP file")
        break
    time.sleep(0.05)
"""


class Here(LocalBackend):
    """This machine, where the ranks are a program of the test's."""

    def __init__(self, program: str, run_dir: Path) -> None:
        super().__init__("7")
        self.program, self.run_dir = program, run_dir
        self.excluded: Sequence[str] = ()
        self.waited = False
        self.job_state, self.preempted, self.end = "RUNNING", False, None

    def run(
        self, nodes: Sequence[str], per_node: int, command: Sequence[str], name: str, log: Path
    ) -> subprocess.Popen[bytes]:
        if name != "hope-train":
            return super().run(nodes, per_node, command, name, log)
        start = self.run_dir / "launch" / self.start
        return subprocess.Popen([sys.executable, "-c", COMMON + self.program, str(self.run_dir), str(start)])

    def state(self) -> tuple[str, bool]:
        return self.job_state, self.preempted

    def ends(self) -> float | None:
        return self.end

    def requeue(self, exclude: Sequence[str], delay_s: int) -> None:
        super().requeue(exclude, delay_s)
        self.excluded = exclude

    def wait_for_slurm(self) -> None:
        self.waited = True


Start = Callable[..., tuple[int, Here, Places]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Supervise a program as a run; `during` is called in a thread of its own meanwhile."""
    monkeypatch.setattr("launch.supervise.POLL_S", 0.05)
    (tmp_path / "run").mkdir()
    tree = {
        "name": "x",
        "dir": str(tmp_path / "run"),
        "model": {"arch": "transformer_pp", "d_model": 32, "n_heads": 2, "mlp_width": 48, "vocab_size": 300},
        "train": {"context_length": 32, "batch_tokens": 128, "micro_batch_size": 2, "tokens": 1280, "device": "cpu"},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def supervise(
        program: str, during: Callable[[Here], None] | None = None, chain: bool = False, **more: Any
    ) -> tuple[int, Here, Places]:
        site = {"health": {"enabled": False}, **more.pop("site", {})}
        request = validate(
            Request,
            {
                "run_dir": str(tmp_path / "run"),
                "config": str(tmp_path / "x.yaml"),
                "site": site,
                "submission": str(tmp_path),
                "working_directory": str(tmp_path),
                "chain": chain,
            },
        )
        backend = Here(program, tmp_path / "run")
        vars(backend).update(more)
        thread = threading.Thread(target=during, args=(backend,)) if during else None
        supervisor = Supervisor(request, backend, tmp_path / "signals")
        if thread:
            thread.start()
        code = supervisor.run()
        if thread:
            thread.join()
        return code, backend, Places(tmp_path / "run")

    yield supervise
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ends(places: Places) -> list[dict[str, Any]]:
    return [event for event in places.events() if event["event"] == "ended"]


def test_a_run_that_is_done_is_done(start: Start) -> None:
    code, backend, places = start('stopped("completed", 10)')
    assert (code, backend.again) == (0, False)
    assert ends(places)[-1]["reason"] == "completed"
    assert claimed_by(places.run_dir) == "7.0"


def test_a_run_that_was_done_before_is_not_started(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "STOPPED.json").write_text('{"reason": "completed", "step": 10}')
    code, backend, places = start('raise SystemExit("started")')
    assert (code, backend.again) == (0, False)
    assert not [event for event in places.events() if event["event"] == "ranks"]


def test_a_signal_in_the_file_becomes_a_stop_and_a_requeue(start: Start, tmp_path: Path) -> None:
    (tmp_path / "signals").write_text("USR1\n")  # it came before anything was there to hear it
    _, backend, places = start(OBEYS)
    assert backend.again
    assert ends(places)[-1] | {"action": "requeue", "reason": "requeue asked for", "failure": False} == ends(places)[-1]


def test_a_signal_to_the_process_does_the_same(start: Start) -> None:
    def during(_: Here) -> None:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGUSR1)

    assert start(OBEYS, during)[1].again


def test_the_time_limit_needs_no_signal(start: Start) -> None:
    _, backend, places = start(OBEYS, end=time.time() + 5, site={"survive": {"lead_s": 4}})
    assert backend.again
    assert ends(places)[-1]["reason"] == "time limit"


def test_a_run_that_does_not_save_in_time_is_ended_and_requeued(start: Start, tmp_path: Path) -> None:
    (tmp_path / "signals").write_text("USR1\nTERM\n")
    _, backend, places = start("time.sleep(8)", job_state="TIMEOUT")
    assert backend.again
    assert ends(places)[-1]["failure"]
    assert "the save was not done in time" in ends(places)[-1]["reason"]


def test_a_chain_ends_instead(start: Start, tmp_path: Path) -> None:
    (tmp_path / "signals").write_text("USR1\n")
    code, backend, places = start(OBEYS, chain=True)
    assert (code, backend.again) == (0, False)
    assert "the next job of the chain" in ends(places)[-1]["reason"]


def test_a_stop_file_of_a_person_s_is_no_requeue(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "STOP").write_text("")
    _, backend, places = start(OBEYS)
    assert not backend.again
    assert "stopped on request" in ends(places)[-1]["reason"]


def test_a_stop_file_that_an_earlier_start_left_is_no_order(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "STOP").write_text("start 6.3: time limit\n")
    _, _, places = start('stopped("error" if os.path.exists(run + "/STOP") else "completed", 10)')
    assert ends(places)[-1]["reason"] == "completed"


def test_preemption_is_waited_for(start: Start, tmp_path: Path) -> None:
    (tmp_path / "signals").write_text("TERM\n")
    _, backend, _ = start(OBEYS, preempted=True)
    assert (backend.waited, backend.again) == (True, False)


def test_a_cancelled_job_stays_cancelled(start: Start, tmp_path: Path) -> None:
    (tmp_path / "signals").write_text("TERM\n")
    code, backend, places = start('stopped("signal", 3, "SIGTERM")', job_state="CANCELLED")
    assert (backend.again, backend.waited) == (False, False)
    assert code != 0
    assert ends(places)[-1]["action"] == "leave"


def test_a_cancellation_is_not_lost_to_a_time_limit(start: Start, tmp_path: Path) -> None:
    """Both stop the run by the same file: whoever wrote it last must not decide."""
    (tmp_path / "signals").write_text("USR1\n")

    def during(_: Here) -> None:
        places = Places(tmp_path / "run")
        while not any(event["event"] == "ranks" for event in places.events()):  # before, nothing would be started
            time.sleep(0.001)
        places.note("cancelled", job="7", saving=True)

    code, backend, places = start("time.sleep(0.5)" + OBEYS, during)
    assert (code, backend.again) == (0, False)
    assert ends(places)[-1]["reason"] == "stopped on request (cancelled)"
    _, backend, places = start("sys.exit(9)")  # it had gone back to the queue before it was cancelled
    assert not backend.again
    assert len([event for event in places.events() if event["event"] == "ranks"]) == 1
    places.note("submitted", job="8")
    assert start(OBEYS)[1].again


def test_crashes_are_requeued_once_without_progress(start: Start, tmp_path: Path) -> None:
    _, first, _ = start("os.kill(os.getpid(), 9)")
    assert first.again
    _, second, places = start("os.kill(os.getpid(), 9)")
    assert not second.again
    assert "nothing advanced" in ends(places)[-1]["reason"]


def test_wrong_input_is_not_tried_again(start: Start) -> None:
    code, backend, places = start("mark(exit=2, error='no file x'); sys.exit(1)")
    assert (code, backend.again) == (2, False)
    assert ends(places)[-1]["reason"] == "wrong input (no file x)"


def test_what_stopped_before_this_start_is_not_its_word(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run" / "STOPPED.json").write_text(json.dumps({"reason": "nan", "step": 1, "time": 1.0}))
    _, backend, places = start("sys.exit(1)")
    assert backend.again
    assert ends(places)[-1]["reason"].startswith("crash")


def test_a_full_disk_is_given_time(start: Start) -> None:
    program = 'mark(exit=2); stopped("error", 3, "step 3 could not be saved (No space left on device)"); sys.exit(1)'
    _, backend, _ = start(program, site={"survive": {"disk_full_delay_s": 7}})
    assert (backend.again, backend.delay_s) == (True, 7)


def full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_a_disk_that_stays_full_is_given_time_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started then, no node is blamed, and starts that could note nothing count all the same."""
    monkeypatch.setattr("launch.supervise.probe_space", full)
    program = 'open(run + "/started", "w")'
    _, backend, places = start(program, site={"survive": {"disk_full_delay_s": 7}, **SICK})
    assert (backend.again, backend.delay_s, list(backend.excluded)) == (True, 7, [])
    assert ends(places)[-1]["reason"] == "no space left in the run directory"
    _, backend, places = start(program, restart=3, start="7.3")  # of 7.1 and 7.2 there is no trace
    assert not backend.again
    assert ends(places)[-1]["reason"].endswith("failure 4 within a day: not requeued")
    assert not (places.run_dir / "started").exists()


def test_a_disk_that_fills_while_a_run_opens_is_no_wrong_input(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "launch.supervise.Supervisor._check_health",
        lambda self, nodes: monkeypatch.setattr("launch.supervise.probe_space", full),
    )
    _, backend, places = start("mark(exit=2, error='cannot be written'); sys.exit(1)")
    assert backend.again
    assert ends(places)[-1]["reason"] == "no space left in the run directory"


def test_a_hang_is_noticed_dumped_and_ended(start: Start) -> None:
    program = 'beat("step", 1); time.sleep(0.7); beat("step", 2)\nwhile True: time.sleep(0.1)'
    _, backend, places = start(program, site={"survive": {"step_s": 1.5}})
    assert backend.again
    (hang,) = [event for event in places.events() if event["event"] == "hang"]
    assert hang["phase"] == "step"
    dump = (places.start("7.0") / "stacks" / "0.txt").read_text()
    assert "rank 0 on" in dump
    assert "<module>" in dump
    assert not Path(f"/proc/{read_json(places.start('7.0') / 'ranks' / '0.json')['pid']}").exists()


def test_a_start_that_was_overtaken_decides_nothing(start: Start, tmp_path: Path) -> None:
    def during(_: Here) -> None:
        while claimed_by(tmp_path / "run") != "7.0":
            time.sleep(0.05)
        claim(tmp_path / "run", "7.1")

    _, backend, places = start("time.sleep(1.5); sys.exit(1)", during)
    assert not backend.again
    assert "another start" in ends(places)[-1]["reason"]


SICK = {"health": {"all_reduce": False, "command": "echo broken >&2; exit 3"}}


def test_a_sick_node_is_left_out_and_nothing_is_started(start: Start) -> None:
    _, backend, places = start("sys.exit(9)", site=SICK)
    (node,) = backend.nodes()
    assert backend.again
    assert list(backend.excluded) == [node]
    (event,) = [event for event in places.events() if event["event"] == "unhealthy"]
    assert "exit code 3: broken" in event["nodes"][node]
    assert not [event for event in places.events() if event["event"] == "ranks"]


def test_everything_below_a_process_is_found() -> None:
    program = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not descendants(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = descendants(process.pid)
    finally:
        LocalBackend("x").kill(process, "")
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
