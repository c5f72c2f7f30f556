"""What a run prints is not worth the run: readers that go, disks that are full, characters that cannot be shown."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from hope_train.train.display import Display, Lasting
from tests.train.tiny import STEPS, TIMEOUT, Tiny


@pytest.fixture
def broken() -> Iterator[TextIO]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


class Raising(io.StringIO):
    """Fails each write with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


class TestLasting:
    """The stream."""

    def test_nobody_reads(self, broken: TextIO) -> None:
        stream = Lasting(broken)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
        # The descriptor leads nowhere now: not even C code that writes there is disturbed.
        assert os.write(broken.fileno(), b"x") == 1

    def test_no_space(self) -> None:
        with open("/dev/full", "w") as full:
            print("x", file=Lasting(full), flush=True)

    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("I/O operation on closed file")])
    def test_silent_from_then_on(self, error: Exception) -> None:
        below = Raising(error)
        stream = Lasting(below)
        stream.write("a")
        below.error = None
        stream.write("b")
        assert below.getvalue() == ""

    def test_a_slow_reader_costs_a_line(self) -> None:
        below = Raising(BlockingIOError(11, "Resource temporarily unavailable"))
        stream = Lasting(below)
        stream.write("a")
        below.error = None
        stream.write("b")
        assert below.getvalue() == "b"

    def test_no_stream_at_all(self) -> None:
        stream = Lasting(None)
        print("x", file=stream, flush=True)
        assert not stream.isatty()

    def test_characters_that_the_encoding_lacks(self) -> None:
        raw = io.BytesIO()
        below = io.TextIOWrapper(raw, encoding="ascii")
        print("caf\u00e9 \u2026", file=Lasting(below), flush=True)
        assert raw.getvalue() == b"caf? ?\n"


def test_display_and_result_outlive_their_readers(broken: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", broken)
    for to_stderr in (False, True):
        display = Display(bar=True, to_stderr=to_stderr)
        display.say("x" * 100_000)
        display.result("{}")
        display.say("x")
        display.stop()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_training_goes_on_and_saves_when_nobody_reads(tiny: Tiny, options: list[str]) -> None:
    # stderr is the same pipe.
    process = tiny.spawn("a", "checkpoint.every=0", "eval.every=1", *options)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    try:
        assert process.wait(TIMEOUT) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert tiny.stopped("a")["reason"] == "completed"
    assert tiny.checkpoints("a") == [f"step_{STEPS:08d}"]


def test_training_without_stdout(tiny: Tiny) -> None:
    command = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-m", "hope_train.cli", "train", str(tiny.config)]
    root = Path(__file__).resolve().parents[2]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "name=a"], cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert tiny.stopped("a")["reason"] == "completed"
