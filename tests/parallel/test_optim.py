"""The rules for matrices on a mesh: the weights and states of one process, each matrix worked on once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.config.mesh import MeshSizes, check_supported
from hope_train.errors import UserError
from tests.parallel import cases
from tests.parallel.harness import Gang

OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "muon": {"name": "muon"},
    "m3": {"name": "m3", "m3": {"slow_period": 3}},
    "m3-literal": {"name": "m3", "m3": {"slow_period": 2, "accumulation": "literal", "rescale": False}, "lr": 1e-7},
    "delta_momentum": {"name": "delta_momentum"},
    "deep_momentum": {"name": "deep_momentum", "deep_momentum": {"width": 6}},
    "dgd": {"name": "dgd", "lr": 0.1, "dgd": {"momentum": 0.5}},
}
"""At rates at which rounding is not magnified, see `test_one_process_is_exact_enough_to_compare_with`: with sgd and dgd
at 0.3, and the literal sums of M3 at 3e-6, a Hope of one process is up to 2.6 from itself with other micro-batches."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp": (2, {"tp": 2}),
    "tp2": (2, {"tp": 2, "sequence_parallel": False}),
    "dp2": (2, {}),
    "tp2-sp-dp2": (4, {"tp": 2}),
    "tp4": (4, {"tp": 4, "sequence_parallel": False}),
    "fsdp2": (2, {"dp_shard": 2}),
    "fsdp4": (4, {"dp_shard": 4, "keep_gathered": "never"}),
    "hsdp": (4, {"dp_shard": 2}),
    "tp2-fsdp2": (4, {"tp": 2, "dp_shard": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-tp2": (4, {"pp": 2, "tp": 2}),
    "pp2-fsdp2": (4, {"pp": 2, "dp_shard": 2}),
}


@cache
def alone(arch: str, rule: str) -> dict[str, Any]:
    return cases.train(arch, "float64", optimizer=OPTIONS[rule])


def check(gang: Gang, arch: str, rule: str, layout: str) -> None:
    """Losses to 1e-9, weights and states to 1e-8 of their largest entry, in float64."""
    ranks, options = LAYOUTS[layout]
    expected = alone(arch, rule)
    everywhere = gang.run(cases.train, ranks, arch=arch, dtype="float64", optimizer=OPTIONS[rule], **options)
    for name, tensor in expected["final"].items():
        for found in everywhere[1:]:
            assert torch.equal(found["final"][name], everywhere[0]["final"][name]), f"{name} differs between ranks"
        mine = everywhere[0]["final"][name]
        size = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(mine, tensor, rtol=0, atol=1e-8 * size, msg=name)
    for mine, theirs in zip(everywhere[0]["reports"], expected["reports"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        for name, level in theirs["levels"].items():
            ratio = level["update_ratio"]
            wanted = None if ratio is None else pytest.approx(ratio, rel=1e-6)
            assert mine["levels"][name]["update_ratio"] == wanted, name


@pytest.mark.parametrize(
    ("arch", "rule", "layout"),
    [
        ("hope_attention", "m3", "tp2-sp-dp2"),
        ("hope_attention", "dgd", "tp2-sp-dp2"),
        ("transformer_pp", "deep_momentum", "tp2"),
        ("hope_attention", "delta_momentum", "dp2"),
        ("hope_attention", "muon", "tp4"),
        ("hope_attention", "dgd", "tp2-fsdp2"),
        ("hope_attention", "m3", "hsdp"),
        ("hope_attention", "deep_momentum", "fsdp4"),
        ("hope_attention", "muon", "pp2-tp2"),
    ],
)
def test_ten_steps_are_those_of_one_process(gang: Gang, arch: str, rule: str, layout: str) -> None:
    check(gang, arch, rule, layout)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["hope", "hope_attention"])
@pytest.mark.parametrize("rule", OPTIONS)
def test_one_process_is_exact_enough_to_compare_with(arch: str, rule: str) -> None:
    """A tenth of what a layout may differ by: else a difference would say nothing about the layout."""
    other = cases.train(arch, "float64", optimizer=OPTIONS[rule], micro=8)
    for name, tensor in alone(arch, rule)["final"].items():
        size = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(other["final"][name], tensor, rtol=0, atol=1e-9 * size, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "layout"),
    [
        *(("hope_attention", layout) for layout in LAYOUTS),
        *(("hope", layout) for layout in ("tp2-sp-dp2", "hsdp", "tp2-fsdp2")),
    ],
)
@pytest.mark.parametrize("rule", OPTIONS)
def test_every_layout_trains_as_one_process(gang: Gang, arch: str, rule: str, layout: str) -> None:
    check(gang, arch, rule, layout)


@pytest.mark.parametrize("rule", ["m3", "deep_momentum", "dgd"])
def test_states_of_any_layout_are_read_by_any_other(gang: Gang, tmp_path: Path, rule: str) -> None:
    # Step 5 is in mid-period of two levels and of the slow momentum.
    options = {"arch": "hope_attention", "optimizer": OPTIONS[rule]}
    written = gang.run(cases.save, 4, folder=str(tmp_path), steps=5, tp=2, **options)[0]
    for ranks, layout in ((1, {}), (2, {"tp": 2}), (4, {"tp": 4}), (2, {}), (4, {"tp": 2, "dp_shard": 2})):
        for read in gang.run(cases.load, ranks, folder=str(tmp_path), **options, **layout):
            read.pop("own")
            assert read.keys() == written.keys()
            for name, tensor in written.items():
                assert torch.equal(read[name], tensor), (name, ranks, layout)


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2", "tp2-sp-dp2", pytest.param("hsdp", marks=pytest.mark.slow)])
def test_no_matrix_is_worked_on_twice(gang: Gang, layout: str) -> None:
    ranks, options = LAYOUTS[layout]
    found = gang.run(cases.worked_on, ranks, arch="hope_attention", optimizer={"name": "muon"}, **options)
    assert sum(count for count, _ in found) == found[0][1]
    # Equal shares, but for the sizes of the matrices.
    assert max(count for count, _ in found) <= 2 * min(count for count, _ in found)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dgd", {"train": {"compile": "model"}}, "train.compile=memory"),
        ("dgd", {"parallel": {"pp": 2, "schedule": "zbv"}}, "parallel.schedule=zbv"),
        ("m3", {"parallel": {"dp_shard": 2}, "optimizer": {"rest_from_period": 2}}, "optimizer.rest_from_period=null"),
    ],
    ids=str,
)
def test_what_leaves_no_room_for_a_rule_is_refused(name: str, changes: dict[str, dict[str, Any]], said: str) -> None:
    config = cases.make_config("hope", optimizer={"name": name})
    for section, fields in changes.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})
    sizes = MeshSizes(pp=config.parallel.pp, dp_shard=config.parallel.dp_shard)
    with pytest.raises(UserError, match=f"optimizer.name={name} .* {said}"):
        check_supported(config, sizes)


def test_delta_gradient_descent_counts_the_tokens_of_a_growing_batch() -> None:
    rule = {**OPTIONS["dgd"], "schedule": {"kind": "constant"}}
    grown = cases.train("hope_attention", "float64", steps=1, optimizer=rule, ramp=(2, 2, 15))
    small = cases.train("hope_attention", "float64", steps=1, optimizer=rule, rows=2)
    for name, tensor in small["final"].items():
        assert torch.equal(grown["final"][name], tensor), name
