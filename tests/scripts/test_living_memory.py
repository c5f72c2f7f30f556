"""The script on a run directory, and what it says about models that learned a text."""

from __future__ import annotations

import json
import statistics
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.batches import Batch
from hope_train.config.load import validate
from hope_train.config.tree import RunConfig
from hope_train.levels.build import build_optimizer
from hope_train.memory.activity import outside_band
from hope_train.model.activity import without_writes
from hope_train.model.hope import HopeModel, build_model
from scripts.living_memory import activity_rows, main, worth_of_writes
from tests.scripts.refusal import assert_refused
from tests.train.tiny import TRANSFORMER, Tiny, write_config, write_corpus

LENGTH = 128


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of 9 steps: `hope`, and `transformer_pp`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HOPE_WIKITEXT", raising=False)
        tiny = Tiny(folder, write_config(folder / "tiny.yaml", write_corpus(folder)))
        assert tiny.train("hope") == 0
        assert tiny.train("transformer_pp", *tiny.model("transformer_pp")) == 0
    assert TRANSFORMER["arch"] == "transformer_pp"
    return folder


def test_figures_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "hope"), "--windows", "6", "--horizons", "4", "32", "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["windows"] == 6
    assert found["text"] == "held-out training text"
    worth = {row["what"]: row for row in found["worth"]}
    assert set(worth) == {"no writes", "memory of 4 tokens", "memory of 32 tokens"}
    for row in worth.values():
        assert row["loss"] == pytest.approx(found["loss"] + row["difference"])
    # Resetting as often as a window begins takes nothing away.
    assert worth["memory of 32 tokens"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert worth["memory of 4 tokens"]["difference"] != 0.0
    assert {row["box"] for row in found["activity"]} == {"k", "v", "eta", "alpha", "mem"}
    assert all(0.0 < row["deviation"] < 3.0 and len(row["deviation_by_chunk"]) == 2 for row in found["activity"])
    assert found["outside_band"] == []


def test_tables_of_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "hope"), "--windows", "4", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "Activity on held-out training text",
        "mem",
        "Worth of the memory: 4 windows",
        "no writes",
        "all inside the band",
    ):
        assert word in shown


def test_wikitext_in_place_of_the_runs_own_text(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wiki.valid.raw").write_text(
        " \n = Stone = \n \n" + " green river under the lamp\n" * 60, encoding="utf-8"
    )
    place = ["--wikitext", str(tmp_path), "--windows", "3", "--device", "cpu"]
    assert main([str(runs / "hope"), *place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] == 3
    assert "wiki.valid.raw" in found["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is neither a run directory nor a checkpoint"),
        (["transformer_pp"], "arch=transformer_pp, which has no memories"),
        (["hope", "--windows", "1"], "--windows=1: a standard error needs at least 2"),
        (["hope", "--horizons", "0"], "tokens between resets are at least 1"),
        (["hope", "--wikitext", "nowhere"], "WikiText folder nowhere does not exist"),
    ],
)
def test_mistakes(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert_refused(main, [*arguments, "--device", "cpu"], message, capsys)


# A trained model


def library_text() -> np.ndarray:
    """Bytes of some modules of Python's library, int64."""
    names = ("argparse.py", "ast.py", "calendar.py", "csv.py", "datetime.py", "difflib.py", "gettext.py", "textwrap.py")
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = b"".join((folder / name).read_bytes() for name in names if (folder / name).is_file())
    assert len(joined) > 150_000
    return np.frombuffer(joined, dtype=np.uint8).astype(np.int64)


def rows(text: np.ndarray, starts: np.ndarray) -> Batch:
    windows = np.stack([text[start : start + LENGTH + 1] for start in starts])
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), None)


def train_on_bytes(text: np.ndarray, seed: int, steps: int, batch: int = 8) -> HopeModel:
    config = validate(
        RunConfig,
        {
            "model": {
                "d_model": 64,
                "n_layers": 2,
                "n_heads": 1,
                "vocab_size": 256,
                "memory": {"chunk_size": 32, "generator_chunk_size": 32},
                "cms": {"levels": [{"width": 64, "period": 1}, {"width": 64, "period": 4}]},
            },
            "optimizer": {"lr": 5e-3, "schedule": {"warmup_tokens": batch * LENGTH * steps // 10}},
            "train": {
                "context_length": LENGTH,
                "batch_tokens": batch * LENGTH,
                "micro_batch_size": batch,
                "tokens": batch * LENGTH * steps,
            },
        },
    )
    model = build_model(config.model, seed)
    optimizer = build_optimizer(model.named_parameters(), config)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = rows(text, generator.integers(0, len(text) - LENGTH - 1, batch))
        total, count = model.loss(torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.targets))
        (total / count).backward()
        optimizer.step(tokens=int(count))
        optimizer.zero_grad()
    return model


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes of training, on a machine that may be busy
def test_a_trained_model_needs_its_writes() -> None:
    """Switching them off costs more than seeds differ, on held-out text; cutting the memory to 8 bytes costs too. And
    its weights are in the band of trained models, layer by layer: those of one without writes are not."""
    text = library_text()
    cut = len(text) * 9 // 10
    held_out = [rows(text[cut:], np.arange(0, len(text) - cut - LENGTH - 1, LENGTH)[:96])]
    models = [train_on_bytes(text[:cut], seed, 120) for seed in range(3)]
    for model in models:
        rows_of = activity_rows(model, held_out[0])
        assert {row["layer"] for row in rows_of} == {0, 1}
        assert outside_band(rows_of) == []
        assert max(row["deviation_max"] for row in rows_of) <= 3.0
        assert (
            len(outside_band(activity_rows(without_writes(model), held_out[0]))) == 7
        )  # k, v, mem of two layers, and in all
    results = [worth_of_writes(model, held_out, horizons=[8]) for model in models]
    spread = statistics.stdev(loss for loss, _ in results)
    counts = np.bincount(text[:cut], minlength=256) + 1
    letters = -np.log(counts / counts.sum())[held_out[0].targets].mean()
    assert statistics.mean(loss for loss, _ in results) < letters - 0.3  # learned more than how frequent each byte is
    for _, (no_writes, short) in results:
        assert no_writes.difference > 10 * spread
        assert no_writes.difference > 10 * no_writes.standard_error
        assert short.difference > 5 * short.standard_error


def test_what_is_outside_the_band() -> None:
    row = {"layer": 1, "box": "mem", "deviation": 0.2, "held": 0.0}
    fine = [row, row | {"deviation": None, "held": None}, row | {"box": "eta", "deviation": 0.0001}]
    assert outside_band([*fine, row | {"layer": 0, "deviation": 0.002}]) == []
    assert outside_band([]) == []
    wrong = outside_band([*fine, row | {"deviation": 0.0009}, row | {"deviation": 0.6}, row | {"held": 0.01}])
    assert [line.partition(":")[0] for line in wrong] == ["layer 1, mem"] * 3
    assert "0.0009, outside 0.001 to 0.5" in wrong[0]
    assert "1.00% of cases, more than 0.5%" in wrong[2]
    assert outside_band([row | {"deviation": 0.01}, row | {"box": "k"}]) == [
        "mem: moved by 0.0100 at most, in no layer by 0.02"
    ]
