"""A disk that is full: training goes on, the previous checkpoint stays whole, and the end of the run says the truth."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from hope_train.checkpoint import writer as writer_module
from hope_train.checkpoint.manifest import verify
from hope_train.train.metrics import JsonLines
from tests.train.tiny import STEPS, Tiny, assert_same_run

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


def test_at_the_end(tiny: Tiny, full_at: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.train("whole", "checkpoint.every=4") == 0
    with pytest.MonkeyPatch.context():
        full_at({STEPS})
        assert tiny.train("a", "checkpoint.every=4") == 1
    assert "the newest whole checkpoint is checkpoints/step_00000008" in capsys.readouterr().out
    assert tiny.stopped("a")["reason"] == "error"
    assert "No space left" in tiny.stopped("a")["detail"]
    verify(tiny.checkpoint("a", 8))
    full_at(set())
    assert tiny.train("a", "checkpoint.every=4") == 0
    assert_same_run(tiny, "a", "whole")


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
