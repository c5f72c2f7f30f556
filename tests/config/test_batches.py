"""Global batches of growing size: which samples each has, against a plain count and against Megatron's calculator."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_train.config.batches import BatchSizes
from hope_train.config.load import validate
from hope_train.config.mesh import micro_batches_of, resolve_mesh
from hope_train.config.train import TrainConfig
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.schedule import LevelPlan


@st.composite
def ramps(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(start, increment, full, over_tokens, context_length)."""
    start, increment, count = draw(st.integers(1, 40)), draw(st.integers(1, 20)), draw(st.integers(1, 12))
    return start, increment, start + count * increment, draw(st.integers(1, 30_000)), draw(st.integers(1, 48))


@given(ramps())
def test_batches_partition_the_samples_and_grow_as_the_rule_says(ramp: tuple[int, int, int, int, int]) -> None:
    start, increment, full, over, length = ramp
    sizes, count = BatchSizes.ramp(*ramp), (full - start) // increment
    sample, batch = 0, 0
    while sample * length <= over + 3 * full * length:
        first, rows = sizes.samples_of(batch)
        assert first == sample == sizes.first_sample(batch)
        assert rows == start + increment * min(count, int(Fraction(sample * length * count, over)))
        assert sizes.whole_batches(sample) == sizes.batches_for(sample) == batch
        assert sizes.whole_batches(sample + rows - 1) == batch
        assert sizes.batches_for(sample + 1) == sizes.batches_for(sample + rows) == batch + 1
        assert sum(each * many for each, many in sizes.counted(batch)) == sample
        sample, batch = sample + rows, batch + 1
    assert sizes.samples_of(batch)[1] == sizes.sizes[-1] == full
    assert sum(many for _, many in sizes.counted(batch)) == batch
    assert list(sizes.sizes) == sorted(set(sizes.sizes))


@settings(max_examples=40)
@given(start=st.integers(1, 64), increment=st.integers(1, 32), count=st.integers(1, 16), each=st.integers(1, 400))
def test_sizes_are_those_of_megatrons_calculator(start: int, increment: int, count: int, each: int) -> None:
    """Where its float division is exact: the samples of the ramp are a multiple of the increments."""
    calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
    full, over = start + count * increment, each * count
    theirs = calculators.RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, over)
    sizes, sample = BatchSizes.ramp(start, increment, full, over * 7, 7), 0
    for batch in range(min(over // start + 4, 200)):
        theirs.update(sample, True)
        assert sizes.samples_of(batch) == (sample, theirs.get_current_global_batch_size())
        sample += theirs.get_current_global_batch_size()


@given(rows=st.integers(1, 100), batch=st.integers(0, 10**12), tokens=st.integers(0, 10**12))
def test_without_a_ramp_all_batches_are_equal(rows: int, batch: int, tokens: int) -> None:
    train = TrainConfig(context_length=32, micro_batch_size=1, batch_tokens=32 * rows)
    assert train.batches.samples_of(batch) == (batch * rows, rows)
    assert train.steps_for(tokens) == -(-tokens // train.batch_tokens)
    assert train.tokens_after(batch) == batch * train.batch_tokens
    assert train.batches.whole_batches(batch) == batch // rows


def make(
    tokens: int = 1200,
    batch_tokens: int = 256,
    pp: int = 1,
    schedule: str = "1f1b",
    micro: int = 2,
    **ramp: int | None,
) -> RunConfig:
    """Batches of 2 rows of 32 tokens four times, of 4 twice, of 6 once, then of 8; levels of periods 1 and 2."""
    tree: dict[str, Any] = {
        "model": {"d_model": 32, "n_layers": 8, "n_heads": 4, "vocab_size": 300},
        "optimizer": {"schedule": {"warmup_tokens": 400}},
        "train": {
            "context_length": 32,
            "micro_batch_size": micro,
            "batch_tokens": batch_tokens,
            "tokens": tokens,
            "batch_ramp": {"start_tokens": 64, "increment_tokens": 64, "over_tokens": 600, **ramp},
        },
        "parallel": {"pp": pp, "schedule": schedule},
    }
    tree["model"]["cms"] = {"levels": [{"width": 32}, {"width": 32, "period": 2}]}
    return validate(RunConfig, tree)


def test_steps_warm_up_and_updates_follow_the_batches() -> None:
    train = make().train
    assert [train.tokens_in(step) for step in range(9)] == [64] * 4 + [128] * 2 + [192] + [256] * 2
    assert train.tokens_after(9) == 1216
    assert train.total_steps == 9
    assert make(tokens=1217).train.total_steps == 10
    assert make(tokens=65).train.total_steps == 2
    core, _, slow = LevelPlan.from_config(make()).sets
    assert core.warmup_updates == 6  # 4 x 64 + 128 tokens are 384, too few
    assert (core.total_updates, slow.total_updates, slow.warmup_updates) == (9, 4, 3)


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        ({"over_tokens": None}, "`train.batch_ramp`: set over_tokens too, or none of the three"),
        ({"start_tokens": 96}, "batch_ramp.start_tokens=96 is not a multiple of .*=64"),
        ({"increment_tokens": 32}, "batch_ramp.increment_tokens=32 is not a multiple of .*=64"),
        ({"start_tokens": 256}, "start_tokens=256 is not below batch_tokens=256"),
        ({"increment_tokens": 128}, "increment_tokens=128 does not divide batch_tokens-start_tokens=256-64=192"),
        ({"start_tokens": 0}, "start_tokens"),
    ],
)
def test_ramps_that_make_no_sense_are_refused(ramp: dict[str, int | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**ramp)


@pytest.mark.parametrize(
    ("config", "world", "said"),
    [
        (make(micro=1), 4, "train.batch_ramp.start_tokens=64 is 2 sequences, which 4 .*a multiple of 128"),
        (make(start_tokens=128), 2, "train.batch_ramp.increment_tokens=64 is 2 sequences.*a multiple of 128"),
        (make(pp=2), 2, "1f1b cannot run 1 micro-batches .*raise train.batch_ramp.start_tokens"),
        (
            make(batch_tokens=288, pp=4, schedule="interleaved_1f1b", micro=1, start_tokens=192, increment_tokens=32),
            4,
            "9 micro-batches .* in 2 rounds.*train.batch_ramp.start_tokens and train.batch_ramp.increment_tokens give",
        ),
    ],
)
def test_every_batch_must_fit_the_mesh(config: RunConfig, world: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_mesh(config, world)


def test_a_mesh_that_every_batch_fits() -> None:
    config = make(pp=2, schedule="interleaved_1f1b", start_tokens=192, micro=1)
    assert micro_batches_of(config, resolve_mesh(config, 2)) == (6, 8)
