"""Optional loggers: they get the figures, and their trouble is never the run's."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hope_train.train import loggers as loggers_module
from hope_train.train.loggers import flatten
from tests.train.tiny import STEPS, Tiny, assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_names_of_figures() -> None:
    row = {"step": 3, "time": 1.0, "loss": 2.0, "lr": None, "levels": {"core": {"period": 1, "update_ratio": None}}}
    assert flatten(row) == {"train/loss": 2.0, "levels/core/period": 1.0}
    assert flatten({"step": 3, "split": "test", "source": "x", "word_ppl": 9}) == {"test/word_ppl": 9.0}


def test_tensorboard(tiny: Tiny) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tiny.train("a", "log.tensorboard=true") == 0
    events = EventAccumulator(str(tiny.dir("a") / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("validation/validation_loss")] == [0, 4, 8, STEPS]
    assert "levels/2/grad_norm" in events.Tags()["scalars"]


class FakeRun:
    """What wandb.init returns, as far as it is used."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, figures: dict[str, float], step: int) -> None:
        self.rows.append((step, figures))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the package: `inits` are its calls, `fail` the modes in which they fail."""
    fake = types.SimpleNamespace(inits=[], fail=set(), run=FakeRun(), Settings=lambda **more: more)

    def init(**arguments: Any) -> FakeRun:
        fake.inits.append(arguments)
        if arguments["mode"] in fake.fail:
            raise RuntimeError("no answer\nand a long story")
        return fake.run  # type: ignore[no-any-return]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(loggers_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setenv("HOME", "/nowhere")
    return fake


@pytest.mark.parametrize(
    ("env", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline")],
)
def test_wandb_is_offline_without_a_key(
    tiny: Tiny, wandb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], mode: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert tiny.train("a", "log.wandb=true") == 0
    (start,) = wandb.inits
    assert start["mode"] == mode
    assert start["settings"]["init_timeout"] <= 20
    assert [step for step, figures in wandb.run.rows if "train/loss" in figures] == list(range(1, STEPS + 1))
    assert wandb.run.finished


def test_wandb_goes_on_under_the_same_id(tiny: Tiny, wandb: types.SimpleNamespace) -> None:
    tiny.dir("a").mkdir()
    (tiny.dir("a") / "STOP").touch()
    assert tiny.train("a", "log.wandb=true") == 0
    assert tiny.train("a", "log.wandb=true") == 0
    assert len({start["id"] for start in wandb.inits}) == 1
    assert len(wandb.inits) == 2


def test_wandb_that_does_not_answer(
    tiny: Tiny, wandb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    wandb.fail = {"online"}
    assert tiny.train("a", "log.wandb=true") == 0
    assert [start["mode"] for start in wandb.inits] == ["online", "offline"]
    assert "cannot be reached, logging offline: no answer\n" in capsys.readouterr().out
    assert len(wandb.run.rows) > STEPS


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_wandb_that_fails_does_not_stop_the_run(
    tiny: Tiny,
    wandb: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("broken")

    assert tiny.train("plain") == 0
    monkeypatch.setattr(wandb if place == "init" else wandb.run, place, fail)
    capsys.readouterr()
    assert tiny.train("a", "log.wandb=true") == 0
    out = capsys.readouterr().out
    assert out.count("warning: Weights & Biases is left out from here on: broken") == (0 if place == "finish" else 1)
    assert_same_run(tiny, "a", "plain")


def test_wandb_that_hangs_at_the_end_is_left_behind(
    tiny: Tiny, wandb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    gate = threading.Event()
    monkeypatch.setattr(wandb.run, "finish", gate.wait)
    monkeypatch.setattr(loggers_module, "_FINISH_SECONDS", 0.05)
    assert tiny.train("a", "log.wandb=true") == 0
    gate.set()


def test_the_real_wandb_offline(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tiny.train("a", "log.wandb=true") == 0
    assert list(Path(tiny.dir("a"), "wandb").glob("offline-run-*"))
