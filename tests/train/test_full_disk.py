"""A disk that is full: training goes on, the previous checkpoint stays whole, and the end of the run says the truth."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from hope_train.checkpoint import writer as writer_module
from hope_train.checkpoint.manifest import verify
from hope_train.errors import UserError
from hope_train.train.metrics import JsonLines
from tests.train.tiny import STEPS, Tiny, assert_same_run, finish

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Fails the saves of these steps, after some of their files have been written."""
    write = writer_module.write_manifest

    def patch(steps: set[int]) -> None:
        def failing(work: Any, facts: Any, *more: Any) -> Any:
            if facts.step in steps:
                raise OSError(errno.ENOSPC, "No space left on device", str(work))
            return write(work, facts, *more)

        monkeypatch.setattr(writer_module, "write_manifest", failing)

    return patch


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_in_mid_run(
    tiny: Tiny, full_at: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str], async_save: str
) -> None:
    options = ("checkpoint.every=2", f"checkpoint.async_save={async_save}", "checkpoint.keep_last=1")
    assert tiny.train("whole", *options) == 0
    full_at({4, 6})
    capsys.readouterr()
    assert tiny.train("a", *options) == 0
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 2
    assert "step 4 could not be saved" in out
    assert "training goes on (newest whole checkpoint: step_00000002)" in out
    assert tiny.checkpoints("a") == [f"step_{STEPS:08d}"]
    assert not list((tiny.dir("a") / "checkpoints").glob("*.tmp-*"))
    assert_same_run(tiny, "a", "whole")


def test_at_the_end(tiny: Tiny, full_at: Callable[[set[int]], None]) -> None:
    assert tiny.train("whole", "checkpoint.every=4") == 0
    with pytest.MonkeyPatch.context():
        full_at({STEPS})
        with pytest.raises(UserError, match=r"the newest whole checkpoint is checkpoints/step_00000008$"):
            tiny.train("a", "checkpoint.every=4")
    assert tiny.stopped("a")["reason"] == "error"
    assert "No space left" in tiny.stopped("a")["detail"]
    verify(tiny.checkpoint("a", 8))
    full_at(set())
    assert tiny.train("a", "checkpoint.every=4") == 0
    assert_same_run(tiny, "a", "whole")


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_for_good(
    tiny: Tiny, full_at: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str], async_save: str
) -> None:
    options = ("checkpoint.every=1", f"checkpoint.async_save={async_save}", "checkpoint.keep_last=1")
    assert tiny.train("whole", *options) == 0
    with pytest.MonkeyPatch.context():
        full_at({2, 4, 5, 6})  # once, then three in a row
        capsys.readouterr()
        with pytest.raises(UserError) as caught:
            tiny.train("a", *options)
    message = str(caught.value)
    assert message.startswith("stopped: step 6 could not be saved (No space left on device")
    assert message.endswith("3 saves in a row have failed; the newest whole checkpoint is checkpoints/step_00000003")
    assert capsys.readouterr().out.count("training goes on") == 3
    assert tiny.stopped("a").items() >= {"reason": "error", "step": 6}.items()
    assert "3 saves in a row have failed" in tiny.stopped("a")["detail"]
    assert tiny.checkpoints("a") == ["step_00000003"]
    verify(tiny.checkpoint("a", 3))
    full_at(set())
    assert tiny.train("a", *options) == 0
    assert_same_run(tiny, "a", "whole")


def test_patience_is_a_field(tiny: Tiny, full_at: Callable[[set[int]], None]) -> None:
    full_at(set(range(1, STEPS)))
    assert tiny.train("a", "checkpoint.every=1", "checkpoint.patience=9") == 0
    with pytest.raises(UserError, match=r"step 1 could not be saved .*; there is no checkpoint"):
        tiny.train("b", "checkpoint.every=1", "checkpoint.patience=1")


def test_a_disk_that_is_really_full(tiny: Tiny) -> None:
    # No file may grow beyond 20 kB in that process, and none of the checkpoint's tensors fits.
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    program += "; from hope_train.cli import run; sys.exit(run(['train', *sys.argv[1:]]))"
    process = tiny.spawn("a", "checkpoint.every=2", program=["-c", program])
    out = finish(process)
    assert process.returncode == 2, out
    assert out.count("training goes on") == 2
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "step 6 could not be saved (File too large" in line
    assert "free some space; 3 saves in a row have failed" in line
    assert "Traceback" not in out
    assert tiny.checkpoints("a") == []
    assert tiny.stopped("a")["reason"] == "error"
    assert tiny.train("a", "checkpoint.every=2") == 0


def test_log_lines_wait_for_space(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.train("whole") == 0
    flush, calls = JsonLines.flush, []

    def full_for_a_while(self: JsonLines) -> None:
        calls.append(1)
        if 3 <= len(calls) <= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(self)

    monkeypatch.setattr(JsonLines, "flush", full_for_a_while)
    assert tiny.train("a") == 0
    assert "metrics.jsonl: No space left on device; its lines are kept" in capsys.readouterr().out
    assert_same_run(tiny, "a", "whole")


def test_log_lines_that_find_no_space_at_all_are_named(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: JsonLines) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLines, "flush", full)
    assert tiny.train("a") == 0
    assert "metrics.jsonl: the last lines are lost: No space left on device" in capsys.readouterr().out
    verify(tiny.checkpoint("a", STEPS))
