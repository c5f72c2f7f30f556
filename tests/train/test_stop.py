"""Stopping on request: the step is finished, the run saved, the reason written down, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hope_train.evaluate.loop import Evaluator
from hope_train.train import loop, session
from hope_train.train.signals import Interrupted, StopRequest
from tests.train.tiny import STEPS, Tiny, assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def during_step(monkeypatch: pytest.MonkeyPatch, index: int, action: Any) -> None:
    """Do something in the middle of the step on batch `index`."""
    step = loop.take_step

    def patched(run: Any, number: int, measure: bool) -> Any:
        if number == index:
            action(run)
        return step(run, number, measure)

    monkeypatch.setattr(loop, "take_step", patched)


@pytest.fixture(autouse=True)
def hangup_counts() -> Iterator[None]:
    """These tests may run under nohup, where SIGHUP is ignored, and a run then leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number: signal.Signals) -> Any:
    return lambda run: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name
)
@pytest.mark.parametrize("async_save", ["true", "false"])
def test_a_signal(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, async_save: str) -> None:
    options = ("checkpoint.every=2", f"checkpoint.async_save={async_save}", "checkpoint.keep_last=9")
    assert tiny.train("whole", *options) == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        during_step(patch, 4, send(number))
        assert tiny.train("a", *options) == 0
    assert signal.getsignal(number) is before
    marker = tiny.stopped("a")
    assert (marker["reason"], marker["detail"], marker["step"], marker["tokens"]) == ("signal", number.name, 5, 640)
    assert marker["checkpoint"] == "checkpoints/step_00000005"
    assert [row["step"] for row in tiny.metrics("a")] == [1, 2, 3, 4, 5]
    assert tiny.train("a", *options) == 0
    assert tiny.stopped("a")["reason"] == "completed"
    assert (tiny.dir("a") / "STOPPED.previous.json").is_file()
    assert_same_run(tiny, "a", "whole")


def test_a_signal_at_a_scheduled_save_and_evaluation(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # The evaluation of step 4 is dropped for the stop and made up for at the resume.
    options = ("checkpoint.every=4", "checkpoint.keep_last=9")
    assert tiny.train("whole", *options) == 0
    with monkeypatch.context() as patch:
        during_step(patch, 3, send(signal.SIGTERM))
        assert tiny.train("a", *options) == 0
    assert [row["step"] for row in tiny.evaluations("a")] == [0]
    assert tiny.train("a", *options) == 0
    assert_same_run(tiny, "a", "whole")


@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    assert tiny.train("whole") == 0
    calls = []
    measure = Evaluator.validation_row

    def slow(self: Evaluator, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                pass
            raise AssertionError("the evaluation went on")
        return measure(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "validation_row", slow)
        assert tiny.train("a") == 0
    assert tiny.stopped("a")["reason"] == "signal"
    assert tiny.stopped("a")["step"] == [0, 4, 8, STEPS][call]
    assert tiny.train("a") == 0
    assert_same_run(tiny, "a", "whole")


def test_the_stop_file(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.train("whole") == 0
    with monkeypatch.context() as patch:
        during_step(patch, 2, lambda run: (run.run_dir / "STOP").touch())
        assert tiny.train("a") == 0
    assert tiny.stopped("a")["detail"] == "STOP file"
    assert tiny.stopped("a")["step"] == 3
    assert not (tiny.dir("a") / "STOP").exists(), "obeyed once"
    assert tiny.train("a") == 0
    assert_same_run(tiny, "a", "whole")


def test_a_stop_file_that_waits_for_the_start(tiny: Tiny) -> None:
    assert tiny.train("whole") == 0
    tiny.dir("a").mkdir()
    (tiny.dir("a") / "STOP").touch()
    assert tiny.train("a") == 0
    assert tiny.stopped("a")["step"] == 0
    assert tiny.train("a") == 0
    assert_same_run(tiny, "a", "whole")


def test_a_second_interrupt_aborts_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert tiny.train("whole", "checkpoint.every=2") == 0
    with monkeypatch.context() as patch:
        during_step(patch, 4, twice)
        with pytest.raises(KeyboardInterrupt):
            tiny.train("a", "checkpoint.every=2")
    assert tiny.stopped("a")["reason"] == "signal"
    assert tiny.stopped("a")["checkpoint"] == "checkpoints/step_00000004"
    assert tiny.train("a", "checkpoint.every=2") == 0
    assert_same_run(tiny, "a", "whole")


def test_an_error_of_ours_is_noted_and_comes_through(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Any) -> None:
        raise ZeroDivisionError("as an example")

    assert tiny.train("whole", "checkpoint.every=2") == 0
    with monkeypatch.context() as patch:
        during_step(patch, 5, fail)
        with pytest.raises(ZeroDivisionError):
            tiny.train("a", "checkpoint.every=2", "checkpoint.async_save=true")
    marker = tiny.stopped("a")
    assert marker["reason"] == "error"
    assert marker["detail"] == "ZeroDivisionError: as an example"
    assert marker["checkpoint"] == "checkpoints/step_00000004"
    assert tiny.train("a", "checkpoint.every=2") == 0
    assert_same_run(tiny, "a", "whole")


def test_a_run_that_is_taken_over_writes_nothing_more(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take_over(run: Any) -> None:
        (run.run_dir / "incarnation.json").write_text('{"id": "the-next-one", "pid": 7, "host": "elsewhere"}')

    with monkeypatch.context() as patch:
        during_step(patch, 4, take_over)
        assert tiny.train("a", "checkpoint.every=2") == 1
    assert "was taken over by the-next-one (process 7 on elsewhere)" in capsys.readouterr().out
    assert [row["step"] for row in tiny.metrics("a")] == [1, 2, 3, 4]
    assert not (tiny.dir("a") / "STOPPED.json").exists()


class TestBeforeTraining:
    """A stop while text is tokenised and the model is built: nothing to save, nothing to wait for."""

    @staticmethod
    def in_the(monkeypatch: pytest.MonkeyPatch, place: str, *numbers: signal.Signals) -> None:
        """Send signals in the middle of a part of the opening."""
        plain = getattr(session, place)

        def patched(*arguments: Any, **more: Any) -> Any:
            for number in numbers:
                os.kill(os.getpid(), number)
            return plain(*arguments, **more)

        monkeypatch.setattr(session, place, patched)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
    @pytest.mark.parametrize("place", ["open_tokenizer", "open_data", "build_engine"])
    def test_of_a_new_run(
        self,
        tiny: Tiny,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        number: signal.Signals,
        place: str,
    ) -> None:
        before = signal.getsignal(number)
        self.in_the(monkeypatch, place, number)
        assert tiny.train("a") == 0
        assert signal.getsignal(number) is before
        assert not tiny.dir("a").exists()
        out = capsys.readouterr().out
        assert out == f"stopped ({number.name} before training began): nothing to save; the same command starts again\n"

    def test_of_a_run_that_was_killed(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tiny.train("whole", "checkpoint.every=4") == 0
        assert tiny.train("a", "checkpoint.every=4") == 0
        shutil.rmtree(tiny.checkpoint("a", STEPS))
        (tiny.dir("a") / "STOPPED.json").unlink()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            self.in_the(patch, "open_data", signal.SIGTERM)
            assert tiny.train("a", "checkpoint.every=4", json=True) == 0
        marker, summary = tiny.stopped("a"), json.loads(capsys.readouterr().out)
        assert marker.items() >= {"reason": "signal", "step": 8, "tokens": 8 * 128}.items()
        assert marker["detail"] == summary["detail"] == "SIGTERM before training began"
        assert marker["checkpoint"] == summary["checkpoint"] == "checkpoints/step_00000008"
        assert tiny.train("a", "checkpoint.every=4") == 0
        assert_same_run(tiny, "a", "whole")

    def test_what_is_marked_already_stays_so(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        assert tiny.train("a", "train.tokens=128") == 0
        marker = (tiny.dir("a") / "STOPPED.json").read_bytes()
        self.in_the(monkeypatch, "open_tokenizer", signal.SIGTERM)
        assert tiny.train("a", "train.tokens=128") == 0
        assert (tiny.dir("a") / "STOPPED.json").read_bytes() == marker
        (tiny.dir("a") / "STOPPED.json").unlink()
        assert tiny.train("a", "train.tokens=128", "optimizer.lr=1") == 0  # not this run's directory
        assert not (tiny.dir("a") / "STOPPED.json").exists()

    def test_once_the_directory_is_taken_over_the_loop_stops(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            self.in_the(patch, "CheckpointWriter", signal.SIGHUP)
            assert tiny.train("a") == 0
        assert tiny.stopped("a").items() >= {"reason": "signal", "detail": "SIGHUP", "step": 0}.items()
        assert tiny.checkpoints("a") == ["step_00000000"]

    def test_a_second_interrupt_after_that(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_the(monkeypatch, "CheckpointWriter", signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            tiny.train("a")


class TestStopRequest:
    """The piece by itself."""

    def test_a_hangup_that_was_ignored_stays_ignored(self, tmp_path: Path) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest(tmp_path) as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.asked() is None
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_what_takes_errors_for_its_own_does_not_take_a_stop_for_one(self, tmp_path: Path) -> None:
        def work() -> None:
            with suppress(Exception):
                os.kill(os.getpid(), signal.SIGTERM)

        with StopRequest(tmp_path) as stop, pytest.raises(Interrupted), stop.opening():
            work()

    def test_the_first_signal_is_the_reason(self, tmp_path: Path) -> None:
        with StopRequest(tmp_path) as stop:
            assert stop.asked() is None
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked() == "SIGUSR1"

    def test_a_droppable_block_is_not_entered_after_a_signal(self, tmp_path: Path) -> None:
        with StopRequest(tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted), stop.droppable():
                raise AssertionError("entered")

    def test_and_interrupted_once(self, tmp_path: Path) -> None:
        with StopRequest(tmp_path) as stop:
            with pytest.raises(Interrupted), stop.droppable():
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked() == "SIGTERM"
