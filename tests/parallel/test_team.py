"""Ranks that decide together."""

from __future__ import annotations

import pytest

from hope_train.errors import UserError
from hope_train.parallel import team
from hope_train.parallel.team import SharedError, Team
from tests.parallel import jobs
from tests.parallel.harness import Gang


def test_a_mistake_on_one_rank_is_everybodys_and_the_first_reports_it(gang: Gang) -> None:
    assert gang.run(jobs.together, 3) == [
        ("UserError", "rank 1 has no disk", "RuntimeError", "rank 2 failed: boom"),
        ("SharedError", "rank 1 has no disk", "RuntimeError", "rank 2 failed: boom"),
        ("SharedError", "rank 1 has no disk", "ValueError", "boom"),
    ]


def test_what_the_first_finds_and_what_all_say(gang: Gang) -> None:
    assert gang.run(jobs.found_and_said, 3) == [({"from": 0}, [2, 0], 3)] * 3


def test_torchrun_does_not_end_the_first_before_it_has_spoken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(team.time, "sleep", waited.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert team.leave_to_first(SharedError("no file x")) == 2
    assert waited == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    # (node, rank there, whether it waits for the first rank's end, whether it speaks where that does not come)
    for node, place, waits, speaks in ((0, 1, 1, 1), (1, 0, 0, 1), (1, 1, 0, 0)):
        for name, value in (("GROUP_RANK", node), ("LOCAL_RANK", place), ("RANK", 8 * node + place)):
            monkeypatch.setenv(name, str(value))
        waited.clear()
        assert team.leave_to_first(SharedError("no file x")) == 2
        assert waited == [team.ENDING_S] * waits
        assert capsys.readouterr().err == f"error: rank {8 * node + place}: no file x\n" * speaks


def test_one_process_asks_nobody() -> None:
    team = Team()
    assert team.leads
    assert team.on_first(lambda: 5) == team.together(lambda: 5) == team.alike(lambda: 5) == 5
    assert team.largest([1, 2]) == [1, 2]
    assert team.total(7) == 7

    def wrong() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        team.alike(wrong)
