"""Ten training steps over a pipeline against one process, by every schedule; and the ways to be silently wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import cases
from tests.parallel.cases import MODELS
from tests.parallel.harness import Gang
from tests.parallel.test_engine import alone, check, compare

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zbv")
SHAPE = {"layers": 4, "micro": 1}
"""Four layers, for two parts per rank; eight micro-batches of one row, shared by the data-parallel ranks."""

NESTED_FP32 = {"lr": 0.001}
"""The nested Hope of four layers magnifies rounding: at 0.003 one process in fp32 is 1.6e-5 from float64 in a gradient
norm, and 1.1e-5 from itself with other micro-batches (7.7e-7 and 6.8e-7 at 0.001). Layouts may differ by 1e-5."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {}),
    "pp2-tp2-sp": (4, {"tp": 2}),
    "pp2-tp2": (4, {"tp": 2, "sequence_parallel": False}),
    "pp2-dp2": (4, {}),
    "pp2-tp2-sp-dp2": (8, {"tp": 2}),
    "pp2-fsdp2": (4, {"dp_shard": 2}),
    "pp2-fsdp2-not-kept": (4, {"dp_shard": 2, "keep_gathered": "never"}),
    "pp2-tp2-sp-fsdp2": (8, {"tp": 2, "dp_shard": 2}),
    "pp2-hsdp": (8, {"dp_shard": 2}),
    "pp4": (4, {"pp": 4}),
}


def options_of(layout: str, schedule: str) -> tuple[int, dict[str, Any]]:
    ranks, options = LAYOUTS[layout]
    return ranks, {"pp": 2, "schedule": schedule, **options}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arch", "dtype", "tied", "layout", "schedule"),
    [
        pytest.param("hope", "float64", False, "pp2-tp2-sp", "1f1b", marks=pytest.mark.slow),
        ("hope_nested", "float64", False, "pp2-tp2-sp", "1f1b"),
        ("hope_attention", "float64", True, "pp2", "zbv"),
        ("hope_attention", "float32", True, "pp2", "interleaved_1f1b"),
        ("transformer_pp", "float64", True, "pp2-dp2", "gpipe"),
        ("hope_attention", "float64", True, "pp2-fsdp2", "1f1b"),
        ("transformer_pp", "float32", True, "pp4", "1f1b"),
    ],
)
def test_ten_steps_are_those_of_one_process(
    gang: Gang, arch: str, dtype: str, tied: bool, layout: str, schedule: str
) -> None:
    rows = 8 if layout in ("pp2-dp2", "pp2-fsdp2") else 4  # four micro-batches on every rank
    check(gang, arch, dtype, tied, *options_of(layout, schedule), **SHAPE, rows=rows)


def product() -> list[tuple[str, str, str, str]]:
    """Model, type, layout and schedule: in float64 every schedule on every layout; in float32 every schedule of a plain
    pipeline, and on the other layouts one, another for each model. The nested Hope, and 8 ranks of all models but
    Hope, have one schedule each too."""
    cases = []
    for number, (layout, (ranks, _)) in enumerate((name, found) for name, found in LAYOUTS.items() if name != "pp4"):
        for other, arch in enumerate(MODELS):
            one = (SCHEDULES[(number + other) % len(SCHEDULES)],)
            all_in_float64 = arch != "hope_nested" and (ranks < 8 or arch == "hope")
            all_in_float32 = arch != "hope_nested" and layout == "pp2"
            cases += [(arch, "float64", layout, schedule) for schedule in (SCHEDULES if all_in_float64 else one)]
            cases += [(arch, "float32", layout, schedule) for schedule in (SCHEDULES if all_in_float32 else one)]
    return cases


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("arch", "dtype", "layout", "schedule"), product())
def test_every_schedule_trains_as_one_process(
    request: pytest.FixtureRequest, arch: str, dtype: str, layout: str, schedule: str
) -> None:
    ranks, options = options_of(layout, schedule)
    gang = request.getfixturevalue("gang_of_8" if ranks == 8 else "gang")
    # Four micro-batches on every rank. Tied where there are float64 figures to see that its two gradients are one.
    rows = 4 * ranks // (options["pp"] * options.get("tp", 1))
    shape = SHAPE | {"rows": rows} | (NESTED_FP32 if (arch, dtype) == ("hope_nested", "float32") else {})
    check(gang, arch, dtype, dtype == "float64", ranks, options, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MODELS)
def test_one_process_in_fp32_is_exact_enough_to_compare_with(arch: str) -> None:
    """Half of what a layout may differ by: else a difference would say nothing about the layout."""
    shape = SHAPE | (NESTED_FP32 if arch == "hope_nested" else {})
    single, double = (alone(arch, dtype, False, **shape) for dtype in ("float32", "float64"))
    for mine, theirs in zip(single["reports"], double["reports"], strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=5e-6), key


@pytest.mark.parametrize(
    ("schedule", "rows"), [("gpipe", 1), ("gpipe", 3), ("1f1b", 5), ("interleaved_1f1b", 3), ("zbv", 1), ("zbv", 5)]
)
def test_odd_numbers_of_micro_batches(gang: Gang, schedule: str, rows: int) -> None:
    check(gang, "transformer_pp", "float64", True, 2, {"pp": 2, "schedule": schedule}, **SHAPE, rows=rows)


@pytest.mark.parametrize(
    "schedule", ["1f1b", "zbv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpipe", "interleaved_1f1b"))]
)
def test_growing_batches(gang: Gang, schedule: str) -> None:
    # Batches of 2, 2, 2, 4, 6 and then 8 rows, a micro-batch each.
    options = {"pp": 2, "schedule": schedule}
    check(gang, "hope_attention", "float64", True, 2, options, **SHAPE, ramp=(2, 2, 15))


@pytest.mark.slow
def test_growing_batches_of_shards(gang: Gang) -> None:
    # Batches of 4, 4, 6, 6 and then 8 rows.
    check(gang, "hope_attention", "float64", True, *options_of("pp2-fsdp2", "1f1b"), **SHAPE, ramp=(4, 2, 15))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_recomputation(gang: Gang, schedule: str) -> None:
    options = {"arch": "hope_attention", "dtype": "float64", "tied": True}
    for found in gang.run(cases.train, 2, recompute=True, pp=2, schedule=schedule, **SHAPE, **options):
        compare(found, alone(**options, **SHAPE), "float64", 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_compiled_memories(gang: Gang, schedule: str) -> None:
    options = {"arch": "hope", "dtype": "float32", "tied": True, "steps": 3}
    expected = cases.train(**options, **SHAPE)
    for found in gang.run(cases.train, 2, timeout=500, compiled=True, pp=2, schedule=schedule, **SHAPE, **options):
        compare(found, expected, "float32", 1)


def test_given_layers_and_bf16(gang: Gang) -> None:
    options: dict[str, Any] = {"arch": "hope_attention", "dtype": "float32", "precision": "bf16"}
    expected = cases.train(**options, **SHAPE)
    for found in gang.run(cases.train, 2, **options, **SHAPE, pp=2, layers_per_stage=[1, 3]):
        assert found["held"] in (["0"], ["1", "2", "3"])
        for mine, theirs in zip(found["reports"], expected["reports"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_neither_scaled_nor_wiped(gang: Gang, schedule: str) -> None:
    """torch's default divides what has been accumulated by the micro-batches after every step, and its first step
    clears gradients that are there. Here backward adds to them, the first one as any other."""
    for found in gang.run(cases.backward_onto_ones, 2, pp=2, schedule=schedule, **SHAPE):
        for name, (first, second, plain) in found.items():
            # fp64: ones + g, ones + 2 g
            torch.testing.assert_close(first - 1, plain, rtol=0, atol=1e-12, msg=name)
            torch.testing.assert_close(second - 1, 2 * plain, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_a_level_is_reduced_once_per_period(gang: Gang, schedule: str) -> None:
    """Whatever a stage's backward would set for all of its levels alike."""
    for found in gang.run(cases.counted, 4, arch="hope_attention", steps=8, pp=2, schedule=schedule, **SHAPE):
        for level, period in (("core", 1), ("level_0", 1), ("level_1", 2), ("level_2", 4)):
            assert found["traffic"][level] == found["sizes"][level] * 8 // period, level
        for step, carried in enumerate(found["carried"], start=1):
            due = [level for level, period in found["periods"].items() if step % period == 0]
            assert carried == sum(found["sizes"][level] for level in due), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_send_what_the_plan_says(gang: Gang, schedule: str) -> None:
    for options in ({"tp": 2}, {"tp": 2, "sequence_parallel": False}):
        for rank in gang.run(cases.sent, 4, arch="hope_attention", pp=2, schedule=schedule, **SHAPE, **options):
            assert rank["found"] == rank["planned"]


READERS: list[tuple[int, dict[str, Any]]] = [
    (2, {"pp": 2}),
    (4, {"pp": 2, "tp": 2, "schedule": "zbv"}),
    (4, {"tp": 2}),
    (2, {"pp": 2, "schedule": "interleaved_1f1b"}),
    (1, {}),
]


@pytest.mark.parametrize("writer", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2))])
def test_a_checkpoint_of_any_layout_is_read_by_any_other(gang: Gang, tmp_path: Path, writer: int) -> None:
    # Step 3 is in mid-period of two levels; the tied matrix is on both ends.
    ranks, layout = READERS[writer]
    options = {"folder": str(tmp_path), "arch": "hope_nested", "tied": True, **SHAPE}
    written = gang.run(cases.save, ranks, steps=3, **options, **layout)[0]
    for readers, other in READERS:
        for read in gang.run(cases.load, readers, **options, **other):
            del read["own"]
            assert read.keys() == written.keys()
            for name, tensor in written.items():
                assert torch.equal(read[name], tensor), (name, layout, other)


def test_another_model_is_refused_on_every_rank(gang: Gang, tmp_path: Path) -> None:
    # What differs is on the last stage alone.
    gang.run(cases.save, 2, folder=str(tmp_path), arch="transformer_pp", steps=1, pp=2, layers=2)
    for layers, named in ((3, "blocks.2.mixer"), (1, "this model has no blocks.1")):
        ranks = min(2, layers)
        arguments = {"folder": str(tmp_path), "arch": "transformer_pp", "pp": ranks, "layers": layers}
        said = gang.run(cases.refusal, ranks, **arguments)
        assert all(named in line for line in said), said
        assert len(set(said)) == 1


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_decoding_and_logits_are_those_of_one_process(gang: Gang, schedule: str) -> None:
    for arch in ("hope", "hope_attention"):
        expected = cases.decode(arch, **SHAPE)
        for ranks, options in ((2, {}), (4, {"tp": 2})):
            for found in gang.run(cases.decode, ranks, arch=arch, pp=2, schedule=schedule, **SHAPE, **options):
                for mine, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
