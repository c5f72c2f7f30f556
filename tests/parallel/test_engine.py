"""Ten training steps on a mesh against one process: periods 1, 2 and 4, clipping active, micro-batches accumulated."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.config.mesh import MeshSizes, check_supported
from hope_train.errors import UserError
from tests.parallel import cases, jobs
from tests.parallel.cases import MODELS, make_config
from tests.parallel.harness import Gang

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2, "sequence_parallel": False}),
    "tp2-sp": (2, {"tp": 2}),
    "dp2": (2, {}),
    "tp2-dp2": (4, {"tp": 2, "sequence_parallel": False}),
    "tp2-sp-dp2": (4, {"tp": 2}),
    "tp4-sp": (4, {"tp": 4}),
    "dp4": (4, {}),
    "fsdp2": (2, {"dp_shard": 2}),
    "fsdp2-not-kept": (2, {"dp_shard": 2, "keep_gathered": "never"}),
    "fsdp4": (4, {"dp_shard": 4}),
    "hsdp": (4, {"dp_shard": 2}),
    "hsdp-not-kept": (4, {"dp_shard": 2, "keep_gathered": "never"}),
    "tp2-sp-fsdp2": (4, {"tp": 2, "dp_shard": 2}),
    "tp2-fsdp2-not-kept": (4, {"tp": 2, "dp_shard": 2, "sequence_parallel": False, "keep_gathered": "never"}),
}


@cache
def alone(arch: str, dtype: str, tied: bool, **options: Any) -> dict[str, Any]:
    """What one process makes of it."""
    return cases.train(arch, dtype, tied=tied, **options)


def compare(found: dict[str, Any], expected: dict[str, Any], dtype: str, parts: int) -> None:
    assert found["initial"].keys() == expected["initial"].keys()
    for name, tensor in expected["initial"].items():
        assert torch.equal(found["initial"][name], tensor), name
    assert found["final"].keys() == expected["final"].keys()
    for name, tensor in expected["final"].items():
        mine = found["final"][name]
        assert mine.dtype == tensor.dtype
        if not tensor.is_floating_point():
            assert torch.equal(mine, tensor), name
        elif dtype == "float64":
            torch.testing.assert_close(mine, tensor, rtol=0, atol=1e-10, msg=name)
        elif "optimizer" not in name:
            torch.testing.assert_close(mine.norm(), tensor.norm(), rtol=1e-5, atol=0, msg=name)
    exact = 1e-11 if dtype == "float64" else 1e-5
    for mine, theirs in zip(found["reports"], expected["reports"], strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=exact), key
        assert mine["clip"].keys() == theirs["clip"].keys()
        for period, clip in theirs["clip"].items():
            assert clip["scale"] < 1, "clipping is active"
            assert mine["clip"][period]["norm"] == pytest.approx(clip["norm"], rel=exact)
        for name, level in theirs["levels"].items():
            if parts > 1 and level["period"] > 1:
                level = {**level, "grad_norm": None}
            assert mine["levels"][name].keys() == level.keys()
            for key, value in level.items():
                wanted = pytest.approx(value, rel=10 * exact) if isinstance(value, float) else value
                assert mine["levels"][name][key] == wanted, f"{name}: {key}"


def check(gang: Gang, arch: str, dtype: str, tied: bool, ranks: int, options: dict[str, Any], **shape: Any) -> None:
    """`options` are the mesh's, `shape` the model's and the batch's."""
    everywhere = gang.run(cases.train, ranks, arch=arch, dtype=dtype, tied=tied, **options, **shape)
    for found in everywhere:
        assert found["reports"] == everywhere[0]["reports"], "all ranks report the same"
        for name, tensor in everywhere[0]["final"].items():
            assert torch.equal(found["final"][name], tensor), f"{name} differs between ranks"
    data_ranks = ranks // (options.get("tp", 1) * options.get("pp", 1))
    compare(everywhere[0], alone(arch, dtype, tied, **shape), dtype, data_ranks)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arch", "dtype", "tied", "layout"),
    [
        ("hope", "float64", False, "tp2-sp-dp2"),
        ("hope_attention", "float32", True, "tp2-sp"),
        ("transformer_pp", "float64", True, "dp2"),
        ("hope", "float64", True, "hsdp"),
        ("hope_nested", "float32", False, "tp2-sp-fsdp2"),
        ("hope_attention", "float64", False, "fsdp2-not-kept"),
    ],
)
def test_ten_steps_are_those_of_one_process(gang: Gang, arch: str, dtype: str, tied: bool, layout: str) -> None:
    check(gang, arch, dtype, tied, *LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["dp2", "fsdp2-not-kept"])
def test_growing_batches(gang: Gang, layout: str) -> None:
    # Batches of 2, 2, 2, 4, 6 and then 8 rows: slow levels collect batches of several sizes.
    check(gang, "hope_attention", "float64", True, *LAYOUTS[layout], micro=1, ramp=(2, 2, 15))


def test_a_rank_without_a_row_of_a_parameter(gang: Gang) -> None:
    # One head on two ranks, as under tp and sharding together: its memories are on the first of them.
    options = {"dp_shard": 2, "keep_gathered": "never"}
    shape = {"micro": 1, "rows": 4, "model": {"n_heads": 1, "d_model": 16}}
    expected = cases.train("hope", "float64", tied=True, **shape)
    for found in gang.run(cases.train, 2, arch="hope", dtype="float64", tied=True, **options, **shape):
        compare(found, expected, "float64", 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("arch", "tied"), [(arch, number % 2 == 0) for number, arch in enumerate(MODELS)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_copies_of_sharded_parts(gang_of_8: Gang, arch: str, dtype: str, tied: bool) -> None:
    check(gang_of_8, arch, dtype, tied, 8, {"tp": 2, "dp_shard": 2})


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arch", "layout", "tied"),
    # the embedding tied for every other model, so that each layout has both
    [(arch, layout, (i + j) % 2 == 0) for i, layout in enumerate(LAYOUTS) for j, arch in enumerate(MODELS)],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_layout_trains_as_one_process(gang: Gang, arch: str, dtype: str, tied: bool, layout: str) -> None:
    check(gang, arch, dtype, tied, *LAYOUTS[layout])


def test_folding_in_mid_period_changes_only_rounding(gang: Gang) -> None:
    # Step 3 of period 4: afterwards one rank holds the sum of both, and the others start from zero.
    plain = alone("hope_attention", "float64", False)
    for options in ({}, {"dp_shard": 2}):
        (found, _) = gang.run(cases.train, 2, arch="hope_attention", dtype="float64", fold_at=3, **options)
        for name, tensor in plain["final"].items():
            torch.testing.assert_close(found["final"][name], tensor, rtol=0, atol=1e-10, msg=name)


def test_recompute_repeats_the_exchanges(gang: Gang) -> None:
    for options, parts in (({"tp": 2}, 1), ({"dp_shard": 2}, 2), ({"dp_shard": 2, "keep_gathered": "never"}, 2)):
        (found, _) = gang.run(cases.train, 2, arch="hope_attention", dtype="float64", recompute=True, **options)
        compare(found, alone("hope_attention", "float64", False), "float64", parts)


def test_bf16_exchanges_follow_one_process_to_its_precision(gang: Gang) -> None:
    options = {"arch": "hope_attention", "dtype": "float32", "precision": "bf16"}
    expected = cases.train(**options)
    for ranks, layout in (
        (2, {"tp": 2}),
        (2, {}),
        (2, {"tp": 2, "sequence_parallel": False}),
        (2, {"dp_shard": 2}),
        (2, {"dp_shard": 2, "keep_gathered": "never"}),
    ):
        for found in gang.run(cases.train, ranks, **options, **layout):
            for mine, theirs in zip(found["reports"], expected["reports"], strict=True):
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)
    assert expected["reports"][0]["loss"] != alone("hope_attention", "float32", False)["reports"][0]["loss"]


@pytest.mark.parametrize("arch", [pytest.param("hope_nested", marks=pytest.mark.slow), "transformer_pp"])
def test_a_checkpoint_of_any_layout_is_read_by_any_other(gang: Gang, tmp_path: Path, arch: str) -> None:
    # 67 rows of vocabulary on 4, 2 and 1 ranks; step 3 is in mid-period of two levels.
    written = gang.run(cases.save, 4, folder=str(tmp_path), arch=arch, steps=3, tp=4, tied=True)[0]
    for ranks, layout in (
        (1, {}),
        (2, {"tp": 2}),
        (4, {"tp": 2}),
        (4, {"tp": 4}),
        (2, {"dp_shard": 2}),
        (4, {"dp_shard": 2, "keep_gathered": "never"}),
        (4, {"dp_shard": 2, "tp": 2}),
        (4, {"dp_shard": 4}),
    ):
        for read in gang.run(cases.load, ranks, folder=str(tmp_path), arch=arch, tied=True, **layout):
            assert read.keys() - {"own"} == written.keys()
            for name, tensor in written.items():
                assert torch.equal(read[name], tensor), (name, ranks, layout)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2, "tp": 2},
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ({"dp_shard": 4}, {"dp_shard": 2})),
    ],
    ids=str,
)
def test_a_checkpoint_of_shards_is_read_by_any_other_layout(gang: Gang, tmp_path: Path, layout: dict[str, Any]) -> None:
    arch = "hope_nested"
    written = gang.run(cases.save, 4, folder=str(tmp_path), arch=arch, steps=3, tied=True, **layout)[0]
    for ranks, other in ((1, {}), (2, {"tp": 2}), (2, {}), (4, layout), (4, {"dp_shard": 4})):
        for read in gang.run(cases.load, ranks, folder=str(tmp_path), arch=arch, tied=True, **other):
            assert read.keys() - {"own"} == written.keys()
            for name, tensor in written.items():
                assert torch.equal(read[name], tensor), (name, ranks, other)


def test_traffic_of_a_level_is_one_reduction_per_period(gang: Gang) -> None:
    for found in gang.run(cases.counted, 2, arch="hope_attention", steps=8):
        for level, period in (("core", 1), ("level_0", 1), ("level_1", 2), ("level_2", 4)):
            own = found["sizes"][level]
            assert found["traffic"][level] == own * 8 // period, level
        # Seen from outside: what all calls of all_reduce on tensors of the model's type carried, step by step.
        for step, carried in enumerate(found["carried"], start=1):
            due = [level for level, period in found["periods"].items() if step % period == 0]
            assert carried == sum(found["sizes"][level] for level in due), step


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_memories(gang: Gang) -> None:
    case: dict[str, Any] = {"arch": "hope", "dtype": "float32", "tied": True, "steps": 3}
    expected = cases.train(**case)
    for found in gang.run(cases.train, 2, timeout=500, compiled=True, tp=2, **case):
        compare(found, expected, "float32", 1)


def test_unexpected_traffic_stops_the_run(gang: Gang) -> None:
    for options, done in (({}, "reduced"), ({"gathered": True, "dp_shard": 2}, "gathered")):
        for message in gang.run(cases.unexpected, 2, **options):
            assert "level_1 (period 2)" in message
            assert f"bytes were {done} at this step, not 0" in message


@pytest.mark.parametrize("name", ["embed.weight", "blocks.1.cms.levels.2.up.weight"])
def test_all_ranks_refuse_what_one_of_them_cannot_apply(gang: Gang, name: str) -> None:
    # The second one is of a slow level: its gradient is nobody else's at that step.
    steps = [(True, 1, 0), (False, 1, 1), (True, 2, 1)]
    assert gang.run(jobs.not_finite, 2, rank=1, name=name) == [steps] * 2


def test_decoding_and_logits_are_those_of_one_process(gang: Gang) -> None:
    for arch in ("hope", "hope_attention"):
        expected = cases.decode(arch)
        for options in ({"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"dp_shard": 2, "keep_gathered": "never"}):
            for found in gang.run(cases.decode, 2, arch=arch, **options):
                for mine, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("sizes", "more", "named"),
    [
        (MeshSizes(tp=2), {"compile": "model"}, "train.compile=model"),
        (MeshSizes(dp_shard=2), {"compile": "model"}, "train.compile=model"),
        (MeshSizes(pp=2), {"compile": "model"}, "train.compile=model"),
    ],
)
def test_what_is_not_there_is_refused(sizes: MeshSizes, more: dict[str, Any], named: str) -> None:
    config = make_config("hope")
    config = config.model_copy(update={"train": config.train.model_copy(update=more)})
    with pytest.raises(UserError, match=named):
        check_supported(config, sizes)
