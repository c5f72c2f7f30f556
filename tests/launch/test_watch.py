"""A hang is told by files that no longer change, phase by phase, on a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.site import Survival
from launch.watch import Watch, read_heartbeat

LIMITS = Survival(opening_s=100, step_s=10, save_s=20, evaluate_s=50)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(tmp_path: Path, clock: Clock) -> Watch:
    (tmp_path / "checkpoints").mkdir()
    return Watch(tmp_path, tmp_path / "heartbeat", LIMITS, clock)


def say(watch: Watch, phase: str, step: int) -> None:
    watch.heartbeat.write_text(f"{phase} {step} 0.0\n", encoding="ascii")


def after(watch: Watch, clock: Clock, seconds: float) -> str | None:
    clock.now += seconds
    return watch.hang()


def test_opening_has_a_limit_of_its_own_up_to_the_end_of_the_first_step(watch: Watch, clock: Clock) -> None:
    assert after(watch, clock, 99) is None
    say(watch, "opening", 0)
    assert after(watch, clock, 1) is None
    say(watch, "step", 7)  # the first of this start: it may compile
    assert after(watch, clock, 1) is None
    assert after(watch, clock, 99) is None
    assert after(watch, clock, 2) == "opening"


def test_steps(watch: Watch, clock: Clock) -> None:
    say(watch, "step", 0)
    after(watch, clock, 1)
    for step in range(1, 20):
        say(watch, "step", step)
        assert after(watch, clock, 9) is None
    assert after(watch, clock, 10) is None
    assert after(watch, clock, 1) == "step"


def test_a_line_of_metrics_is_progress_too(watch: Watch, clock: Clock) -> None:
    say(watch, "step", 0)
    after(watch, clock, 1)
    say(watch, "step", 1)
    after(watch, clock, 1)
    for _ in range(5):
        with (watch.run_dir / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        assert after(watch, clock, 9) is None


def test_a_save_lives_while_its_files_grow(watch: Watch, clock: Clock) -> None:
    say(watch, "save", 5)
    after(watch, clock, 1)
    work = watch.run_dir / "checkpoints" / "step_00000005.tmp-x"
    work.mkdir()
    for _ in range(5):
        with (work / "data").open("ab") as file:
            file.write(b"x" * 10)
        assert after(watch, clock, 19) is None
    assert after(watch, clock, 21) == "save"


def test_an_evaluation_may_take_its_time(watch: Watch, clock: Clock) -> None:
    say(watch, "evaluate", 5)
    after(watch, clock, 1)
    assert after(watch, clock, 49) is None
    assert after(watch, clock, 2) == "evaluate"


@pytest.mark.parametrize("text", ["", "step", "step x 1.0", "\xff"])
def test_a_heartbeat_that_is_being_written_says_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "heartbeat"
    file.write_text(text, encoding="latin-1")
    assert read_heartbeat(file) == ("opening", 0)
