"""What this machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hope_train import machine


def test_memory_is_the_machine_s_or_its_container_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "gone"), str(limit)))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory_bytes() == whole
    for text, found in (("max\n", whole), (f"{2 * whole}\n", whole), ("1048576\n", 2**20)):
        limit.write_text(text, encoding="ascii")
        assert machine.memory_bytes() == found
