"""Log lines are whole or absent, whatever happened to the process or the disk."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path

import pytest
import torch

from hope_train.train.metrics import JsonLines, Stopwatch, cut_back, peak_memory_bytes, rows, strict


def row(step: int) -> str:
    return json.dumps({"step": step, "loss": 1.5}) + "\n"


class TestJsonLines:
    """Appending."""

    def test_numbers_that_json_does_not_know_become_null(self, tmp_path: Path) -> None:
        file = JsonLines(tmp_path / "m.jsonl")
        file.write({"step": 1, "loss": math.nan, "levels": {"0": {"norm": math.inf}}, "list": (1.0, -math.inf)})
        file.close()
        assert list(rows(tmp_path / "m.jsonl")) == [
            {"step": 1, "loss": None, "levels": {"0": {"norm": None}}, "list": [1.0, None]}
        ]
        assert strict({"a": True, "b": "é"}) == {"a": True, "b": "é"}

    def test_a_line_is_on_file_when_written(self, tmp_path: Path) -> None:
        file = JsonLines(tmp_path / "m.jsonl")
        file.write({"step": 1})
        assert list(rows(tmp_path / "m.jsonl")) == [{"step": 1}]
        file.close()

    def test_a_full_disk_tears_no_line_and_loses_none(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        file = JsonLines(path)
        file.write({"step": 1})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        try:
            for step in (2, 3):
                with pytest.raises(OSError):
                    file.write({"step": step})
                assert path.read_text(encoding="utf-8") == '{"step": 1}\n'
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        file.write({"step": 4})
        file.close()
        assert [line["step"] for line in rows(path)] == [1, 2, 3, 4]


class TestCutBack:
    """What a resume leaves of a log."""

    def test_later_lines_are_kept_beside(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(map(row, (1, 2, 3, 4))), encoding="utf-8")
        assert cut_back(path, 2, "beyond-2") == 2
        assert path.read_text(encoding="utf-8") == row(1) + row(2)
        assert (tmp_path / "metrics.beyond-2.jsonl").read_text(encoding="utf-8") == row(3) + row(4)
        assert cut_back(path, 2, "again") == 0
        assert sorted(os.listdir(tmp_path)) == ["metrics.beyond-2.jsonl", "metrics.jsonl"]

    @pytest.mark.parametrize(
        "torn", ['{"step": 3, "lo', '{"step": 2}\x00\x00', "\x00" * 50, "[]", '{"step": "2"}', '{"loss": 1}', "3"]
    )
    def test_torn_lines_are_taken_out(self, tmp_path: Path, torn: str) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(row(1) + torn, encoding="utf-8")
        cut_back(path, 5, "torn")
        assert path.read_text(encoding="utf-8") == row(1)

    def test_a_whole_last_line_gets_its_newline(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(row(1).rstrip("\n"), encoding="utf-8")
        assert cut_back(path, 5, "torn") == 0
        assert path.read_text(encoding="utf-8") == row(1)

    def test_a_whole_log_is_not_touched(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(row(1) + row(2), encoding="utf-8")
        before = path.stat()
        assert cut_back(path, 2, "x") == 0
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert path.stat().st_ino == before.st_ino
        assert cut_back(tmp_path / "nowhere.jsonl", 2, "x") == 0


def test_the_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hope_train.train.metrics.time.perf_counter", lambda: now[0])
    clock = Stopwatch()
    now[0] += 2
    with clock.paused():
        now[0] += 50
    now[0] += 3
    assert clock.lap() == 5
    now[0] += 7
    assert clock.lap() == 7


def test_memory_is_in_bytes() -> None:
    held = torch.ones(16, 1 << 20)
    assert peak_memory_bytes(torch.device("cpu")) > held.numel() * held.element_size()
