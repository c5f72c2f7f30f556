"""Ranks that decide together."""

from __future__ import annotations

import pytest

from hope_train.errors import UserError
from hope_train.parallel.team import Team
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
