"""The study of update rules: its sweep, its noise, and that finished runs are not repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import optimizers
from scripts.optimizers import VARIANTS, Study, add_noise, curve, tables
from tests.parallel import cases


def study_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimum: float) -> tuple[Study, list[float]]:
    """A study whose runs' losses are a parabola in the logarithm of the factor."""
    tried: list[float] = []

    def train(config: Any, data: Any, noise: float, size: float) -> dict[str, Any]:
        factor = config.optimizer.matrix_lr_scale
        tried.append(factor)
        loss = None if factor > 100 * optimum else math.log(factor / optimum) ** 2 + noise
        return {"loss": loss, "word_ppl": 100.0 + noise, "curve": [5.0, 4.0], "seconds": 1.0, "refused": 0, "steps": 4}

    monkeypatch.setattr(optimizers, "train", train)
    monkeypatch.setattr(optimizers, "open_data", lambda *arguments: None)
    return Study("configs/hope_tiny.yaml", [], tmp_path, 0.5, 1.0), tried


@pytest.mark.parametrize(
    ("optimum", "factors"),
    [
        (1.0, [1 / 3, 1, 3]),
        (3.0, [1 / 3, 1, 3, 9]),
        (0.01, [1 / 3, 1, 3, 1 / 9, 1 / 27, 1 / 81, 1 / 243]),
        (1e5, [1 / 3, 1, 3, 9, 27, 81, 243]),
    ],
)
def test_the_sweep_goes_on_where_the_best_factor_is_at_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimum: float, factors: list[float]
) -> None:
    study, tried = study_of(tmp_path, monkeypatch, optimum)
    best = study.best_factor("muon", 0)
    assert tried == pytest.approx(factors)
    assert best == pytest.approx(min(factors, key=lambda factor: abs(math.log(factor / optimum))))


def test_what_is_there_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, tried = study_of(tmp_path, monkeypatch, 1.0)
    study.run(["adamw", "muon"], [0, 1])
    # Per rule three factors with the first seed, then the best with the second, then both with noise.
    assert len(tried) == 2 * (3 + 1 + 2)
    again, _ = study_of(tmp_path, monkeypatch, 1.0)
    again.run(["adamw", "muon"], [0, 1])
    assert len(again.results) == len(tried)
    lines = (tmp_path / optimizers.RESULTS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == study.results
    sweep, comparison = tables(study.results)
    assert sweep.row_count == 6
    assert comparison.row_count == 4
    optimizers.plot(study.results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_larger_study_takes_the_factors_of_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = study_of(tmp_path, monkeypatch, 3.0)
    study.run(["muon"], [0])
    _, tried = study_of(tmp_path, monkeypatch, 1.0)
    arguments = ["configs/hope_tiny.yaml", "--out", str(tmp_path / "larger"), "--factors-of", str(tmp_path)]
    assert optimizers.main([*arguments, "--rules", "muon", "--seeds", "0", "1"]) == 0
    assert tried == [3.0] * 4, "two seeds, without noise and with it"
    assert optimizers.main([*arguments, "--rules", "adamw"]) == 2
    assert "has no runs of adamw" in capsys.readouterr().err


def test_what_has_diverged_has_no_mean() -> None:
    assert optimizers.mean_and_spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert optimizers.mean_and_spread([1.0, None], 2) == "some diverged"
    assert optimizers.mean_and_spread([None], 2) == "-"


def test_noise_is_in_proportion_and_the_same_for_every_rule() -> None:
    found = []
    for rule in ("adamw", "muon"):
        engine = cases.open_engine(cases.make_config("hope_attention", optimizer={"name": rule}), "float32")
        for number, parameter in enumerate(engine.model.parameters()):
            parameter.grad = torch.full_like(parameter, 10.0 ** -(number % 4))
        before = [parameter.grad.clone() for parameter in engine.model.parameters() if parameter.grad is not None]
        add_noise(engine, seed=3, index=5, size=2.0)
        added = [p.grad - old for p, old in zip(engine.model.parameters(), before, strict=True) if p.grad is not None]
        for noise, old in zip(added, before, strict=True):
            if noise.numel() > 500:
                assert float(noise.std() / old.flatten()[0]) == pytest.approx(2.0, rel=0.1)
        found.append(torch.cat([noise.flatten() for noise in added]))
    assert torch.equal(found[0], found[1])


def test_the_variants_are_configurations() -> None:
    for overrides, factors in VARIANTS.values():
        for factor in factors:
            optimizers.load_config("configs/hope_tiny.yaml", [*overrides, f"optimizer.matrix_lr_scale={factor}"])
    assert curve(np.arange(40.0).tolist(), points=4) == [4.5, 14.5, 24.5, 34.5]
