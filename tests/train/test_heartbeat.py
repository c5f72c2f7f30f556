"""What a launcher reads of a run's phases."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_train.train import heartbeat
from hope_train.train.heartbeat import HEARTBEAT, beat, phase
from tests.train.tiny import STEPS, Tiny


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(heartbeat, "_last", ("", 0.0))
    monkeypatch.setenv(HEARTBEAT, str(tmp_path / "heartbeat"))
    return tmp_path / "heartbeat"


def test_a_phase_is_written_when_it_begins(file: Path) -> None:
    beat("step", 3)
    with phase("save", 3):
        assert file.read_text().split()[:2] == ["save", "3"]
    assert file.read_text().split()[:2] == ["step", "3"]


def test_steps_are_written_once_a_second_at_most(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(heartbeat.time, "time", lambda: clock[0])
    beat("step", 1)
    clock[0] += 0.5
    beat("step", 2)
    assert file.read_text().split()[1] == "1"
    clock[0] += 0.6
    beat("step", 3)
    assert file.read_text().split()[1] == "3"


def test_nobody_asked_or_no_place_to_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEAT, str(file / "nowhere"))
    beat("step", 1)
    monkeypatch.delenv(HEARTBEAT)
    beat("save", 1)
    assert not file.exists()


def test_a_run_says_all_its_phases(tiny: Tiny, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = heartbeat.suppress

    def recorded(*errors: type[BaseException]) -> object:
        seen.append(heartbeat._last[0])
        return real(*errors)

    monkeypatch.setattr(heartbeat, "suppress", recorded)
    assert tiny.train("beats", "checkpoint.every=4") == 0
    assert list(dict.fromkeys(seen)) == ["opening", "evaluate", "step", "save", "closing"]
    assert file.read_text().split()[:2] == ["closing", str(STEPS)]
