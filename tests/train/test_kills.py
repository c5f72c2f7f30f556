"""Processes that are really killed, and really signalled; the run goes on as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from hope_train.checkpoint.manifest import is_trimmed, verify
from tests.train.kill_driver import STAGES
from tests.train.tiny import STEPS, Tiny, assert_same_run, finish

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

DRIVER = str(Path(__file__).with_name("kill_driver.py"))
OPTIONS = ("checkpoint.every=1", "checkpoint.keep_last=2")


@pytest.mark.parametrize("async_save", ["true", "false"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_the_middle_of_things(tiny: Tiny, stage: str, async_save: str) -> None:
    # Step 5 is in the middle of the periods of 2 and 4. At step 6 levels 1 and 2 of step 4 outlive it.
    at = 6 if "trimm" in stage else 5
    options = (*OPTIONS, f"checkpoint.async_save={async_save}")
    assert tiny.train("whole", *options) == 0
    process = tiny.spawn("a", *options, program=[DRIVER, stage, str(at)])
    output = finish(process)
    assert process.returncode == -signal.SIGKILL, output
    assert not (tiny.dir("a") / "STOPPED.json").exists()
    there = sorted(path.name for path in (tiny.dir("a") / "checkpoints").iterdir())
    if stage not in ("step", "log"):
        unfinished = [name for name in there if ".tmp-" in name]
        in_a_save = stage in ("first file", "between sets", "sets", "manifest")
        assert bool(unfinished) == (in_a_save or stage == "pruning"), there
        newest = verify(tiny.checkpoint("a", at - 1 if in_a_save else at))
        if at == 6:
            assert newest.references() == {"step_00000004"}
            assert is_trimmed(tiny.checkpoint("a", 4))
            assert tiny.checkpoints("a") == ["step_00000005", "step_00000006"]
    else:  # a save of step 4 in the background may have been killed as well
        verify(tiny.checkpoint("a", 3 if async_save == "true" else 4))
    assert tiny.train("a", *options) == 0
    assert_same_run(tiny, "a", "whole")
    assert tiny.checkpoints("a") == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"]
    there = sorted(path.name for path in (tiny.dir("a") / "checkpoints").iterdir())
    assert there == tiny.checkpoints("a"), "step 8 is full: nothing that is left refers to what is older"


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_until_it_is_done(tiny: Tiny, seed: int) -> None:
    rng = random.Random(seed)
    options = (*OPTIONS, "checkpoint.async_save=true", "train.tokens=5120", "eval.every=7")  # 40 steps
    assert tiny.train("whole", *options) == 0
    kills = 0
    for _ in range(4):
        process = tiny.spawn("a", *options)
        assert process.stdout is not None
        for line in process.stdout:  # until it trains
            if line.startswith("step "):
                break
        time.sleep(rng.uniform(0.0, 0.8))
        process.kill()
        finish(process)
        kills += process.returncode == -signal.SIGKILL
    assert kills > 0
    assert tiny.train("a", *options) == 0
    assert_same_run(tiny, "a", "whole", step=40)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_signalled_from_outside(tiny: Tiny, number: signal.Signals) -> None:
    options = (*OPTIONS, "train.tokens=256000")  # far more than it will get to
    process = tiny.spawn("a", *options, "log.progress=true")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 0, output
    assert f"signal ({number.name}): step" in output
    marker = tiny.stopped("a")
    assert (marker["reason"], marker["detail"]) == ("signal", number.name)
    assert verify(tiny.checkpoint("a", marker["step"])).step == marker["step"]
    assert tiny.metrics("a")[-1]["step"] == marker["step"]


def test_exit_codes_and_one_line_of_error(tiny: Tiny) -> None:
    process = tiny.spawn("a", "train.tokns=5")
    output = finish(process)
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert output.startswith("error: ")
    process = tiny.spawn("a", "--json")
    output = finish(process)
    assert process.returncode == 0
    assert json.loads(output.splitlines()[-1])["reason"] == "completed"
