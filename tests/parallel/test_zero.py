"""DeepSpeed over megatron-core's layers against the native engine and one process: periods 1, 2, 4, clipping active."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import cases, jobs
from tests.parallel.harness import Gang
from tests.parallel.zero_jobs import run

pytestmark = pytest.mark.timeout(300)

SMALL: dict[str, Any] = {"layers": 1, "rows": 4, "micro": 1, "vocab": 68}
"""Of the fast tests. The vocabulary is even: megatron-core divides it evenly."""

LARGE: dict[str, Any] = {"vocab": 68}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    settings = {"stage": stage, **more}
    return {"engine": "deepspeed", "deepspeed": settings, "check_collectives": False}


@cache
def alone(arch: str, tied: bool, small: bool, precision: str = "fp32") -> dict[str, Any]:
    """What one process makes of it without DeepSpeed."""
    return cases.train(arch, "float32", tied=tied, precision=precision, **(SMALL if small else LARGE))


def compare(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """The initial state to the bit; weights to 1e-5, elementwise, and losses and norms to 1e-5 of themselves."""
    assert found["initial"].keys() == expected["initial"].keys()
    for key, tensor in expected["initial"].items():
        assert torch.equal(found["initial"][key], tensor), f"{name}: {key}"
    assert found["final"].keys() == expected["final"].keys()
    for key, tensor in expected["final"].items():
        mine = found["final"][key]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), key
        if not tensor.is_floating_point():
            assert torch.equal(mine, tensor), f"{name}: {key}"
        elif "optimizer" not in key:
            torch.testing.assert_close(
                mine, tensor, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{name} {key}: {text}"
            )
        else:  # accumulators are sums of a period's 300 tokens times gradient
            torch.testing.assert_close(mine.norm(), tensor.norm(), rtol=1e-4, atol=1e-9, msg=f"{name}: {key}")
    for mine, theirs in zip(found["reports"], expected["reports"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["clip"].keys() == theirs["clip"].keys()
        for period, clip in theirs["clip"].items():
            assert clip["scale"] < 1, "clipping is active"
            assert mine["clip"][period]["norm"] == pytest.approx(clip["norm"], rel=1e-5)
        for level, figures in theirs["levels"].items():
            for key, value in figures.items():
                if value is None:  # native data-parallel ranks do not know a slow level's norm at every step
                    continue
                wanted = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                assert mine["levels"][level][key] == wanted, f"{level}: {key}"


def check(gang: Gang, arch: str, tp: int, dp: int, stage: int, tied: bool = False, small: bool = False) -> None:
    shape = SMALL if small else LARGE
    arguments = {"arch": arch, "dtype": "float32", "tied": tied, "tp": tp, **shape}
    everywhere = run(gang, cases.train, tp * dp, **arguments, **zero(stage))
    for found in everywhere:
        assert found["reports"] == everywhere[0]["reports"], "all ranks report the same"
    compare(everywhere[0], alone(arch, tied, small), "one process")
    if tp * dp > 1 and not small:
        compare(everywhere[0], run(gang, cases.train, tp * dp, **arguments)[0], "the native engine")


def test_stage_3_trains_as_one_process(gang: Gang) -> None:
    check(gang, "hope", tp=1, dp=2, stage=3, small=True)


def test_tensor_parallel_layers_train_as_one_process(gang: Gang) -> None:
    check(gang, "hope_attention", tp=2, dp=1, stage=1, tied=True, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2])
def test_every_stage_and_layout_trains_as_the_native_engine(gang: Gang, tp: int, dp: int, stage: int) -> None:
    check(gang, "hope", tp, dp, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("arch", "tied"), [("hope_nested", True), ("hope_attention", True), ("transformer_pp", False)])
def test_other_models_train_as_the_native_engine(gang: Gang, arch: str, tied: bool, stage: int) -> None:
    check(gang, arch, tp=1 if stage == 1 else 2, dp=2 if stage == 1 else 1, stage=stage, tied=tied)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing(gang: Gang, stage: int) -> None:
    offload = {"offload_optimizer": True, "offload_parameters": stage == 3}
    arguments = {"arch": "hope", "dtype": "float32", **SMALL}
    (found, _) = run(gang, cases.train, 2, **arguments, **zero(stage, **offload))
    compare(found, alone("hope", False, True), "one process")


@pytest.mark.slow
def test_bf16_follows_the_native_engine_to_its_precision(gang: Gang) -> None:
    expected = alone("hope", False, True, "bf16")
    assert expected["reports"][0]["loss"] != alone("hope", False, True)["reports"][0]["loss"]
    for stage, tp in ((2, 1), (3, 1), (1, 2), (3, 2)):
        arguments = {"arch": "hope", "dtype": "float32", "precision": "bf16", "tp": tp, **SMALL, **zero(stage)}
        (found, _) = run(gang, cases.train, 2, **arguments)
        native = run(gang, cases.train, 2, **{**arguments, "engine": "native"})[0]["reports"]
        for mine, *others in zip(found["reports"], expected["reports"], native, strict=True):
            for theirs in others:
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_batches_that_grow(gang: Gang, stage: int) -> None:
    arguments = {"arch": "hope_attention", "dtype": "float32", "vocab": 68, "micro": 1, "ramp": (2, 2, 15)}
    (found, _) = run(gang, cases.train, 2, **arguments, **zero(stage))
    compare(found, cases.train(**arguments), "one process")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_recompute_repeats_the_exchanges(gang: Gang, stage: int) -> None:
    arguments = {"arch": "hope", "dtype": "float32", "recompute": True, "tp": 2 if stage == 1 else 1, **SMALL}
    (found, _) = run(gang, cases.train, 2, **arguments, **zero(stage))
    compare(found, alone("hope", False, True), "one process")


@pytest.mark.parametrize(
    ("stage", "options"), [*((stage, {}) for stage in range(4)), *((s, {"offload_optimizer": True}) for s in (1, 2, 3))]
)
@pytest.mark.parametrize(
    "name", [pytest.param("embed.weight", marks=pytest.mark.slow), "blocks.0.cms.levels.2.up.weight"]
)
def test_all_ranks_refuse_what_one_of_them_cannot_apply(
    gang: Gang, name: str, stage: int, options: dict[str, Any]
) -> None:
    # The second one is of a slow level, which is not due at that step.
    found = run(gang, jobs.zero_not_finite, 2, rank=1, name=name, **SMALL, **zero(stage, **options))
    assert found == [[(True, 1, 0, True), (False, 1, 1, False), (True, 2, 1, True)]] * 2


EXCHANGES = [
    (4, {"tp": 2, **zero(2)}),
    (4, {"tp": 2}),
    (2, zero(3)),
    (1, {}),
    (4, {"dp_shard": 4, "keep_gathered": "never"}),
    (2, {"tp": 2, **zero(3)}),
    (2, zero(0)),
    (1, zero(1)),
]
"""Writers and readers: ranks, and the section `parallel`."""


def exchange(gang: Gang, folder: Path, writer: int, readers: list[int]) -> None:
    """Step 3 is in mid-period of two levels of the nested Hope, whose faster levels have initial states besides."""
    arguments = {"arch": "hope_nested", "tied": True, "vocab": 68, "layers": 1}

    def do(job: Any, place: int, **more: Any) -> list[Any]:
        ranks, layout = EXCHANGES[place]
        return run(gang, job, ranks, folder=str(folder), **arguments, **layout, **more)

    written = do(cases.save, writer, steps=3)[0]
    for place in readers:
        for read in do(cases.load, place):
            assert read.keys() - {"own"} == written.keys()
            for name, tensor in written.items():
                assert torch.equal(read[name], tensor), (name, EXCHANGES[writer], EXCHANGES[place])


def test_either_engine_reads_the_other_one_s_checkpoint(gang: Gang, tmp_path: Path) -> None:
    for name, writer, readers in (("of_deepspeed", 2, [3, 7]), ("of_native", 3, [2])):
        (tmp_path / name).mkdir()
        exchange(gang, tmp_path / name, writer, readers)


@pytest.mark.slow
@pytest.mark.parametrize("writer", range(len(EXCHANGES)))
def test_a_checkpoint_of_any_engine_and_layout_is_read_by_any_other(gang: Gang, tmp_path: Path, writer: int) -> None:
    exchange(gang, tmp_path, writer, list(range(len(EXCHANGES))))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_native_ranks_have_collected_apart_is_summed(gang: Gang, tmp_path: Path, stage: int) -> None:
    arguments = {"folder": str(tmp_path), "arch": "hope_nested", "vocab": 68, "layers": 1}
    written = run(gang, cases.save, 4, steps=3, stack=True, **arguments)[0]
    for ranks, layout in ((4, {}), (4, {"tp": 2})):
        for read in run(gang, cases.load, ranks, **arguments, **layout, **zero(stage)):
            for name, tensor in written.items():
                if name != "own":
                    torch.testing.assert_close(read[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_scores_are_those_of_one_process(gang: Gang) -> None:
    # 7 windows and streams on 2 ranks: with stage 3 the rank that has none left runs along.
    expected = jobs.score("hope", 7, dtype="float32", **SMALL)
    for found in run(gang, jobs.score, 2, arch="hope", windows=7, dtype="float32", **SMALL, **zero(3)):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
