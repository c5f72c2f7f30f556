"""Choosing an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hope_train.checkpoint.store import load_model
from hope_train.cli import run as hope
from hope_train.config.mesh import MeshSizes
from hope_train.errors import UserError
from hope_train.parallel import engines
from tests.parallel.cases import make_config
from tests.train.tiny import Tiny, finish

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).resolve().parents[2]


def without(*packages: str):  # type: ignore[no-untyped-def]
    return lambda name: None if name in packages else object()


def test_the_native_engine_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", without("deepspeed", "megatron"))
    engines.check_engine(make_config("hope"), MeshSizes())


@pytest.mark.parametrize(("missing", "named"), [("deepspeed", "package deepspeed,"), ("megatron", "megatron-core")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, named: str) -> None:
    monkeypatch.setattr(engines, "find_spec", without(missing))
    with pytest.raises(UserError, match=rf"{named}.*pip install -e '\.\[deepspeed\]'.*parallel.engine=native"):
        engines.check_engine(make_config("hope", engine="deepspeed", check_collectives=False), MeshSizes())


def test_nothing_is_begun_without_the_package(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny: Tiny
) -> None:
    monkeypatch.setattr(engines, "find_spec", without("deepspeed"))
    assert hope(["train", str(tiny.config), "name=none", "parallel.engine=deepspeed"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "needs the package deepspeed" in err
    assert not tiny.dir("none").exists()


def test_a_file_that_contradicts_the_run_is_refused_before_it_begins(
    capfd: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": 99}')
    options = ["parallel.engine=deepspeed", f"parallel.deepspeed.config={tmp_path}/ds.json"]
    assert hope(["train", str(tiny.config), "name=none", *options]) == 2
    assert "ds.json: train_batch_size is 99" in capfd.readouterr().err
    assert not tiny.dir("none").exists()


def alone(tiny: Tiny, name: str, *options: str) -> tuple[int, str]:
    """`hope train` under DeepSpeed in a process of its own, in which DeepSpeed makes a group of one."""
    process = tiny.spawn(name, "parallel.engine=deepspeed", "train.tokens=384", *options)
    output = finish(process)
    return process.returncode, output


@pytest.mark.slow
def test_what_deepspeed_does_not_take_is_said_in_a_line(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "overlap_com": true}}')
    code, output = alone(tiny, "none", f"parallel.deepspeed.config={tmp_path}/ds.json")
    assert code == 2
    assert "overlap_com" in output.splitlines()[-1]
    assert not tiny.dir("none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["0"], ["3", "parallel.deepspeed.offload_optimizer=true"]], ids=str)
def test_one_process_trains_under_deepspeed(tiny: Tiny, options: list[str]) -> None:
    stage, *more = options
    code, output = alone(tiny, "alone", f"parallel.deepspeed.stage={stage}", *more)
    assert code == 0, output
    assert "deepspeed" not in output.lower(), "DeepSpeed speaks of problems alone"
    assert tiny.train("native", "train.tokens=384") == 0
    for mine, theirs in zip(tiny.metrics("alone"), tiny.metrics("native"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    load_model(tiny.dir("alone"))


def test_the_packages_are_imported_only_by_the_engine_that_needs_them() -> None:
    program = (
        "import sys\n"
        "sys.modules['deepspeed'] = sys.modules['megatron'] = None\n"  # to import them now is an error
        "import hope_train.parallel.engines, hope_train.parallel.zero.engine, hope_train.train.run\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
