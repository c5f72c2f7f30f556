"""What a run survives, end to end on a real controller with real training: the scenarios of scripts/reliability.py."""

from __future__ import annotations

import pytest

from scripts.reliability import SCENARIOS, run_scenario
from scripts.slurm_bench import Bench


def test_a_stopped_and_requeued_run_ends_in_the_bits_of_an_uninterrupted_one(bench: Bench) -> None:
    measured = run_scenario(bench, "signal", seed=0, starts=2)
    assert measured.same
    assert measured.steps_lost == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "signal"])
def test_a_run_ends_in_the_bits_of_one_to_which_nothing_happened(bench: Bench, scenario: str) -> None:
    # How many starts a time limit takes depends on how fast the machine is.
    starts = {"chain": 3, "time limit": None}.get(scenario, 2)
    assert run_scenario(bench, scenario, seed=1, starts=starts).same
