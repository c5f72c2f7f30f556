"""The table of devices."""

from __future__ import annotations

import pytest

from hope_train.errors import UserError
from hope_train.plan.devices import DEVICES, GIB, find_device


def test_names_people_use():
    assert find_device("H200") is DEVICES["h200"]
    assert find_device("NVIDIA H100") is DEVICES["h100"]
    assert find_device("a100") is DEVICES["a100-80"]
    assert find_device("a100_40") is DEVICES["a100-40"]


@pytest.mark.parametrize(("wrong", "right"), [("h20", "h200"), ("h1000", "h100"), ("rtx-4090", "rtx4090")])
def test_unknown_device_names_the_nearest(wrong, right):
    with pytest.raises(UserError, match=f"did you mean .*{right}") as error:
        find_device(wrong)
    assert "\n" not in str(error.value)


def test_nothing_near_lists_all():
    with pytest.raises(UserError, match="known are b200, h200"):
        find_device("qqqq")


def test_a_cpu_is_of_this_machine(monkeypatch):
    monkeypatch.setattr("hope_train.plan.devices.memory_bytes", lambda: 48 * GIB)
    assert find_device("cpu").memory_gib == 48
    assert find_device("CPU", 4).memory_gib == 12


def test_figures_are_of_a_sane_order():
    for device in DEVICES.values():
        assert device.bf16_flops >= device.fp32_flops
        assert 1 <= device.memory_gib < 1000
        assert 1e9 < device.bandwidth < 2e13
