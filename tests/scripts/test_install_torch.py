"""Which torch `make setup` installs, on machines other than this one."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest

from scripts import install_torch
from scripts.install_torch import CPU_INDEX, choose, pinned_version

PLAIN = ["2.15.0", "2.13.0", "2.12.0"]


class Pip:
    """Stands for what the package indexes offer, and remembers what was asked."""

    def __init__(self, configured: list[str], cpu_index: list[str]) -> None:
        self.configured, self.cpu_index = configured, cpu_index
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, extra: Sequence[str] = ()) -> list[str]:
        self.asked.append(tuple(extra))
        return self.cpu_index if CPU_INDEX in extra else self.configured


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Pip:
    stand_in = Pip(*request.param)
    monkeypatch.setattr(install_torch, "offered_versions", stand_in)
    return stand_in


@pytest.mark.parametrize("pip", [(["2.13.0+cpu", *PLAIN], [])], indirect=True)
def test_a_cpu_build_among_the_configured_places_is_taken_directly(pip: Pip) -> None:
    arguments, _ = choose("2.13.0", "linux", gpu=False, index=None)
    assert arguments == ["torch==2.13.0+cpu"]
    assert len(pip.asked) == 1


@pytest.mark.parametrize("pip", [(PLAIN, ["2.13.0+cpu"])], indirect=True)
def test_pytorch_s_cpu_index_comes_next_and_is_not_waited_for(pip: Pip) -> None:
    arguments, _ = choose("2.13.0", "linux", gpu=False, index=None)
    assert arguments == ["torch==2.13.0+cpu", "--index-url", CPU_INDEX]
    assert {"--timeout", "--retries"} <= set(pip.asked[-1])


@pytest.mark.parametrize("pip", [(PLAIN, []), ([], []), (PLAIN, ["2.14.0+cpu"])], indirect=True)
def test_without_a_cpu_build_the_default_is_taken_and_said(pip: Pip) -> None:
    arguments, why = choose("2.13.0", "linux", gpu=False, index=None)
    assert arguments == ["torch==2.13.0"]
    assert "CUDA" in why
    assert "TORCH_INDEX" in why
    assert "\n" not in why


@pytest.mark.parametrize("pip", [(["2.13.0+cpu", *PLAIN], ["2.13.0+cpu"])], indirect=True)
def test_gpus_macs_and_a_chosen_index_are_not_second_guessed(pip: Pip) -> None:
    assert choose("2.13.0", "linux", gpu=True, index=None)[0] == ["torch==2.13.0"]
    assert choose("2.13.0", "darwin", gpu=False, index=None)[0] == ["torch==2.13.0"]
    index = "https://example.org/whl/rocm"
    assert choose("2.13.0", "linux", gpu=False, index=index)[0] == ["torch==2.13.0", "--index-url", index]
    assert pip.asked == []


def test_the_version_is_the_lock_s() -> None:
    assert pinned_version("numpy==2.0\ntorch==2.13.0\ntorchvision==0.1\n") == "2.13.0"
    assert pinned_version("torch==2.13.0+cpu\n") == "2.13.0"
    with pytest.raises(SystemExit, match="torch=="):
        pinned_version("pytorch==1\n")


def test_another_version_is_not_held_to_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """scripts/lock.sh chooses the other packages anew."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install_torch, "installed_version", lambda: None)
    monkeypatch.setattr(install_torch, "choose", lambda version, *_: ([f"torch=={version}"], ""))
    monkeypatch.setattr(install_torch.subprocess, "run", run)
    assert install_torch.main(["9.9.9"]) == install_torch.main() == 0
    other, pinned = commands
    assert other[-1] == "torch==9.9.9"
    assert "--constraint" not in other
    assert "--constraint" in pinned
