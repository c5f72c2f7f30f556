"""Links, and which dimension of a mesh uses which."""

from __future__ import annotations

import pytest

from hope_train.config.mesh import MeshSizes
from hope_train.errors import UserError
from hope_train.plan.devices import DEVICES
from hope_train.plan.interconnect import LINKS, find_interconnect

H200 = DEVICES["h200"]


def test_a_device_comes_with_its_usual_links():
    assert find_interconnect(None, H200).name == "nvlink4+ib-ndr"
    assert find_interconnect(None, DEVICES["l4"]).name == "pcie4+ethernet-100"
    assert {find_interconnect(None, device).node for device in DEVICES.values()} <= {8, 64}


def test_one_half_can_be_named():
    assert find_interconnect("ib-xdr", H200).name == "nvlink4+ib-xdr"
    assert find_interconnect("NVL72", H200).name == "nvl72+ib-ndr"
    assert find_interconnect("ib_hdr+nvlink5", H200).name == "nvlink5+ib-hdr"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nvlink", "did you mean .*nvlink"),
        ("qqq", "known are nvlink3, "),
        ("", "known are"),
        ("ib-ndr+ib-hdr", "two links between nodes"),
        ("nvlink3+pcie4", "two links inside a node"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        find_interconnect(name, H200)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshSizes(tp=8), {"tp": "nvlink4"}),
        (MeshSizes(tp=16), {"tp": "ib-ndr"}),
        (MeshSizes(dp_replicate=4, tp=2), {"tp": "nvlink4", "dp_replicate": "nvlink4"}),
        (MeshSizes(dp_replicate=8, dp_shard=4, tp=2), {"dp_shard": "nvlink4", "dp_replicate": "ib-ndr"}),
        (MeshSizes(pp=2, tp=4), {"pp": "nvlink4"}),
        (MeshSizes(pp=2, tp=8), {"pp": "ib-ndr"}),
        (MeshSizes(dp_shard=5, dp_replicate=3), {"dp_shard": "ib-ndr"}),  # groups of 5 straddle nodes of 8
        (MeshSizes(dp_shard=6), {"dp_shard": "nvlink4"}),
    ],
    ids=str,
)
def test_a_group_uses_the_slowest_link_between_its_ranks(mesh, expected):
    links = find_interconnect(None, H200)
    assert {dim: links.link(mesh, dim).name for dim in expected} == expected


def test_figures_are_of_a_sane_order():
    for link in LINKS.values():
        assert 1e8 < link.bandwidth < 2e12
        assert 1e-6 <= link.latency <= 1e-3
