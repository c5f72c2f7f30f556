"""Whole runs on several ranks: one process's figures, one voice, one end; any layout goes on from any other."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hope_train.checkpoint.manifest import list_unfinished, verify
from hope_train.checkpoint.store import load_model
from tests.parallel import jobs
from tests.parallel.harness import Gang
from tests.train.tiny import STEPS, Tiny, assert_same_run, assert_same_tensors, finish, lines, read_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(300)]

ALL = ("checkpoint.every=1", "checkpoint.keep_last=99", "train.micro_batch_size=1", "parallel.check_collectives=true")


def train(gang: Gang, tiny: Tiny, ranks: int, name: str, *overrides: str) -> None:
    found = gang.run(jobs.train_run, ranks, config=str(tiny.config), overrides=[f"name={name}", *ALL, *overrides])
    assert found == [(0, "")] * ranks


def assert_same_steps(tiny: Tiny, found: str, expected: str, rel: float = 1e-5) -> None:
    """Losses and norms agree, and nothing is logged twice."""
    assert [row["step"] for row in tiny.metrics(found)] == list(range(1, STEPS + 1))
    for mine, theirs in zip(tiny.metrics(found), tiny.metrics(expected), strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert mine[key] == pytest.approx(theirs[key], rel=rel), key
        assert mine["clip"].keys() == theirs["clip"].keys()


def assert_same_figures(tiny: Tiny, found: str, expected: str) -> None:
    """Losses, norms and evaluations agree to 1e-5, and nothing is logged twice."""
    assert_same_steps(tiny, found, expected)
    for mine, theirs in zip(tiny.evaluations(found), tiny.evaluations(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


def continue_elsewhere(gang: Gang, tiny: Tiny, name: str, legs: list[tuple[int, list[str], int]]) -> None:
    """One run in legs of (ranks, overrides, step to stop before)."""
    for ranks, overrides, at in legs:
        arguments = {"config": str(tiny.config), "overrides": [f"name={name}", *ALL, *overrides]}
        if at:
            found = gang.run(jobs.interrupted_run, ranks, **arguments, rank=ranks - 1, at=at)
        else:
            found = gang.run(jobs.train_run, ranks, **arguments)
        assert found == [(0, "")] * ranks
        if at:
            # the rank that was not asked stops at the same step: after the one under way
            assert tiny.stopped(name)["reason"] == "signal"
            assert tiny.stopped(name)["step"] == at


def test_two_ranks_one_process_two_ranks(gang: Gang, tiny: Tiny) -> None:
    # Step 3 and 6 are in mid-period of the levels of period 2 and 4.
    assert tiny.train("one", *ALL) == 0
    train(gang, tiny, 2, "two")
    assert_same_figures(tiny, "two", "one")
    continue_elsewhere(gang, tiny, "moved", [(2, [], 3), (1, [], 6), (2, ["parallel.tp=2"], 0)])
    assert_same_figures(tiny, "moved", "one")
    mine = read_checkpoint(tiny.checkpoint("moved", STEPS))
    for name, tensor in read_checkpoint(tiny.checkpoint("one", STEPS)).items():
        assert mine[name].shape == tensor.shape
        assert float((mine[name].double() - tensor.double()).norm()) <= 1e-4 * float(tensor.double().norm()), name
    model, _, _ = load_model(tiny.dir("moved"))
    assert model.embed.weight.shape == (300, 32)


def test_a_resume_on_the_same_layout_is_exact_in_mid_period_too(gang: Gang, tiny: Tiny) -> None:
    # The run that is not interrupted saves, and so folds, at the same steps.
    train(gang, tiny, 2, "whole")
    continue_elsewhere(gang, tiny, "halves", [(2, [], 3), (2, [], 7), (2, [], 0)])
    assert_same_run(tiny, "halves", "whole")
    assert_same_tensors(tiny.checkpoint("halves", 3), tiny.checkpoint("whole", 3))


@pytest.mark.slow
@pytest.mark.parametrize("save", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
def test_layouts_follow_each_other(gang: Gang, tiny: Tiny, save: str) -> None:
    assert tiny.train("one", *ALL) == 0
    legs = [
        (4, ["parallel.tp=2"], 2),
        (2, ["parallel.tp=2", "parallel.sequence_parallel=false"], 5),
        (4, ["parallel.dp_shard=2"], 6),
        (1, [], 7),
        (4, ["parallel.tp=2"], 0),
    ]
    continue_elsewhere(gang, tiny, "moved", [(ranks, [*more, save], at) for ranks, more, at in legs])
    assert_same_figures(tiny, "moved", "one")


PIPELINE = ["model.n_layers=2", "parallel.pp=2"]
"""Four micro-batches of one row on two stages, with two rows per data-parallel rank on four."""


def test_a_pipeline_s_run_goes_on_anywhere(gang: Gang, tiny: Tiny) -> None:
    # Steps 3 and 6 are in mid-period; evaluations are at 0, 4 and 8.
    assert tiny.train("one", *ALL, "model.n_layers=2") == 0
    train(gang, tiny, 2, "two", *PIPELINE)
    assert_same_figures(tiny, "two", "one")
    legs = [(2, PIPELINE, 3), (2, ["model.n_layers=2", "parallel.tp=2"], 6), (4, PIPELINE, 0)]
    continue_elsewhere(gang, tiny, "moved", legs)
    assert_same_figures(tiny, "moved", "one")


@pytest.mark.parametrize(
    "data", [pytest.param("parallel.dp_replicate=2", marks=pytest.mark.slow), "parallel.dp_shard=2"]
)
def test_a_pipeline_s_resume_is_exact_in_mid_period_too(gang: Gang, tiny: Tiny, data: str) -> None:
    layout = [*PIPELINE, data]
    train(gang, tiny, 4, "whole", *layout)
    continue_elsewhere(gang, tiny, "halves", [(4, layout, 3), (4, layout, 7), (4, layout, 0)])
    assert_same_run(tiny, "halves", "whole")
    assert_same_tensors(tiny.checkpoint("halves", 3), tiny.checkpoint("whole", 3))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved_1f1b", "zbv"])
def test_pipelines_follow_each_other(gang: Gang, tiny: Tiny, schedule: str) -> None:
    # At 0.01 four layers magnify rounding: one process is 1e-4 from itself with other micro-batches.
    deep = ["model.n_layers=4", "model.tie_embeddings=true", "checkpoint.async_save=true", "optimizer.lr=0.003"]
    assert tiny.train("one", *ALL, *deep) == 0
    assert tiny.train("other", *ALL, *deep, "train.micro_batch_size=2") == 0
    assert_same_steps(tiny, "other", "one", rel=5e-6)  # its validation has other batches
    legs = [
        (2, ["parallel.pp=2", f"parallel.schedule={schedule}"], 2),
        (4, ["parallel.pp=2", "parallel.tp=2"], 5),
        (1, [], 6),
        (4, ["parallel.pp=2", f"parallel.schedule={schedule}"], 7),
        (2, [], 0),
    ]
    continue_elsewhere(gang, tiny, "moved", [(ranks, [*deep, *more], at) for ranks, more, at in legs])
    assert_same_figures(tiny, "moved", "one")


@pytest.mark.slow
def test_tensor_parallel_resume_is_exact(gang: Gang, tiny: Tiny) -> None:
    layout = ["parallel.tp=2", "checkpoint.async_save=true"]
    train(gang, tiny, 4, "whole", *layout)
    continue_elsewhere(gang, tiny, "halves", [(4, layout, 3), (4, layout, 6), (4, layout, 0)])
    assert_same_run(tiny, "halves", "whole")


def test_a_run_that_is_taken_over_stops_on_every_rank(gang: Gang, tiny: Tiny) -> None:
    arguments = {"config": str(tiny.config), "overrides": ["name=taken", *ALL[2:]]}
    assert gang.run(jobs.taken_over_run, 2, **arguments, at=4) == [(1, "")] * 2
    assert [row["step"] for row in tiny.metrics("taken")] == [1, 2, 3], "nothing is written into another's logs"


@pytest.mark.parametrize("save", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
@pytest.mark.parametrize(("stage", "left"), [("publish", [3]), ("prune", [3, 4])])
def test_a_run_that_is_taken_over_during_a_save_writes_and_deletes_nothing_more(
    gang: Gang, tiny: Tiny, stage: str, left: list[int], save: str
) -> None:
    options = ["name=taken", "checkpoint.every=1", "checkpoint.keep_last=1", "train.micro_batch_size=1", save]
    arguments = {"config": str(tiny.config), "overrides": options, "at": 4, "stage": stage}
    assert gang.run(jobs.taken_over_save, 2, **arguments) == [(1, "")] * 2, "both ranks stop, and say so"
    assert tiny.checkpoints("taken") == [f"step_{step:08d}" for step in left]
    assert list_unfinished(tiny.dir("taken") / "checkpoints") == []
    for step in left:
        verify(tiny.checkpoint("taken", step))


def test_mistakes_are_reported_once(gang: Gang, tiny: Tiny) -> None:
    for overrides, named in (
        (["parallel.tp=2", "model.n_heads=1"], "n_heads=1"),
        (["train.lr=3"], "lr"),
        (["parallel.dp_replicate=3"], "start 3 processes"),
        (["parallel.tp=2", "parallel.pp=2"], "cannot be divided"),
        (["parallel.dp_shard=3"], "cannot be divided by"),
        (["data.tokenizer=/nowhere"], "tokenizer"),
        ([f"dir={tiny.config}/below"], "run directory"),
    ):
        first, second = gang.run(jobs.train_run, 2, config=str(tiny.config), overrides=["name=wrong", *overrides])
        assert first[0] is None
        assert first[1].startswith("UserError"), first
        assert named in first[1], first
        assert second == (2, ""), second
    assert not tiny.dir("wrong").exists()


def test_windows_are_shared_and_everybody_has_all_scores(gang: Gang) -> None:
    several = (
        *((2, {}), (4, {}), (4, {"tp": 2}), (4, {"dp_shard": 2}), (4, {"dp_shard": 4, "keep_gathered": "never"})),
        *((4, {"pp": 2}), (4, {"pp": 2, "dp_shard": 2})),
    )
    for arch, layouts in (("hope", several[2:]), ("hope_attention", several)):
        expected = jobs.score(arch, 7)
        for ranks, options in layouts:
            for found in gang.run(jobs.score, ranks, arch=arch, windows=7, **options):
                for mine, theirs in zip(found, expected, strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-12)
                    assert all(map(math.isfinite, mine))


def test_under_torchrun(tiny: Tiny, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, *launcher, "-m", "hope_train.cli", "train", str(tiny.config), "name=launched"]
    process = subprocess.Popen(
        [*command, "train.tokens=384"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count("completed: step 3 of 3") == 1, output
    assert "2 processes: pp 1 x dp_replicate 2" in output
    assert tiny.train("one", "train.tokens=384") == 0
    for mine, theirs in zip(tiny.metrics("launched"), tiny.metrics("one"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert len(lines(tiny.dir("launched") / "eval.jsonl")) == len(lines(tiny.dir("one") / "eval.jsonl"))
