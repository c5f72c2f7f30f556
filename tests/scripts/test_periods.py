"""Runs with and without periods: what is asked of `hope train`, initial weights put back, and a whole small set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.batches import Batch
from hope_train.config.load import load_config, validate
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.schedule import level_of
from hope_train.model.hope import HopeModel, build_model
from scripts.periods import initial_weights, learned, main, planned_runs, rise_by_level, with_periods
from tests.scripts.refusal import assert_refused
from tests.train.tiny import write_config, write_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 9 steps with levels of periods 1, 2 and 4, and a corpus."""
    folder = tmp_path_factory.mktemp("periods")
    return write_config(folder / "tiny.yaml", write_corpus(folder))


def test_only_periods_and_learning_rates_change(config: Path) -> None:
    before = load_config(config, ["model.cms.levels=[{width: 5, activation: gelu}, {width: 7, warmup_updates: 3}]"])
    levels = load_config(config, [with_periods(before, [1, 16], 0.25)]).model.cms.levels
    assert [(level.period, level.lr_scale) for level in levels] == [(1, 1.0), (16, 2.0)]
    restored = [level.model_copy(update={"period": 1, "lr_scale": 1.0}) for level in levels]
    assert restored == list(before.model.cms.levels)
    with pytest.raises(UserError, match="3 periods, the configuration has 2 CMS levels"):
        with_periods(before, [1, 2, 3], 0.25)


def test_the_runs_share_all_but_model_and_seed(config: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin.yaml"
    twin.write_text(f"base: {config}\nmodel: {{arch: transformer_pp, mlp_width: 48, cms: {{levels: []}}}}\n")
    runs = planned_runs(
        str(config),
        str(twin),
        [1, 2, 8],
        [0, 5],
        0.0,
        ["train.compile=memory", "optimizer.lr=0.02"],
        ["train.clip_norm=2"],
    )
    assert [run.name for run in runs] == [
        *("1-2-8-seed0", "1-1-1-seed0", "twin-seed0", "1-2-8-seed5", "1-1-1-seed5", "twin-seed5"),
    ]
    fewer = planned_runs(str(config), None, [1, 2, 8], [0, 5], 0.0, [], ones=False)
    assert [run.name for run in fewer] == ["1-2-8-seed0", "1-2-8-seed5"]
    configs = [load_config(arguments[0], arguments[1:]) for arguments in (run.arguments(tmp_path) for run in runs)]
    assert [each.seed for each in configs] == [0, 0, 0, 5, 5, 5]
    assert {each.train.tokens for each in configs} == {9 * 128}
    assert {each.optimizer.lr for each in configs} == {0.02}
    assert [each.train.clip_norm for each in configs[:3]] == [1.0, 1.0, 2.0]
    assert [each.train.compile for each in configs[:3]] == ["memory", "memory", "none"]
    assert [len(each.model.cms.levels) for each in configs[:3]] == [3, 3, 0]
    assert [level.period for level in configs[0].model.cms.levels] == [1, 2, 8]


def drifted(seed: int) -> HopeModel:
    """A model whose weights have all moved by noise."""
    config = validate(
        RunConfig,
        {
            "model": {
                "d_model": 16,
                "n_layers": 2,
                "n_heads": 1,
                "vocab_size": 32,
                "memory": {"chunk_size": 8, "generator_chunk_size": 8},
                "cms": {"levels": [{"width": 8}, {"width": 8, "period": 4}]},
            }
        },
    )
    model = build_model(config.model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.5 if level_of(name) is not None else 0.01
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def test_initial_weights_of_one_level_and_back() -> None:
    model, start = drifted(3), dict(build_model(drifted(3).config, 3).named_parameters())
    moved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with initial_weights(model, 1, 3):
        for name, parameter in model.named_parameters():
            expected = start[name] if level_of(name) == 1 else moved[name]
            assert torch.equal(parameter, expected), name
    assert all(torch.equal(parameter, moved[name]) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="no level 2"), initial_weights(model, 2, 3):
        pass


def test_a_level_that_never_moved_raises_nothing() -> None:
    """And one that learned the text at hand does."""
    model = drifted(0)
    with torch.no_grad():
        start = dict(build_model(model.config, 0).named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    rows = np.tile(np.arange(24), (4, 1))
    batch = Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), None)
    fast = [parameter for name, parameter in model.named_parameters() if level_of(name) != 1]
    optimizer = torch.optim.AdamW(fast, 0.01)
    for _ in range(30):
        total, count = model.loss(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    rises = rise_by_level(model.eval(), [batch], 0)
    assert rises[1] == 0.0
    assert rises[0] > 0.01


def test_what_counts_as_learned() -> None:
    assert learned([0.3, 0.2], 0.1, 8) is True
    assert learned([0.3, 0.05], 0.1, 8) is False
    assert learned([0.3, 0.2], 0.1, 7) is None


def test_a_small_set_and_the_same_command_again(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOPE_WIKITEXT", raising=False)
    out = tmp_path / "set"
    command = [str(config), "train.tokens=256", "--periods", "1", "1", "1", "--seeds", "4", "--out", str(out)]
    assert main(command) == 0
    lines = (out / "results.jsonl").read_text(encoding="utf-8")
    (row,) = map(json.loads, lines.splitlines())
    assert (row["variant"], row["seed"], row["step"], row["tokens"]) == ("1/1/1", 4, 2, 256)
    assert [(level["period"], level["updates"]) for level in row["levels"]] == [(1, 2)] * 3
    assert all(level["rise"] != 0.0 for level in row["levels"])
    evaluations = [json.loads(line) for line in (out / "1-1-1-seed4/eval.jsonl").read_text().splitlines()]
    assert row["validation_loss"] == evaluations[-1]["validation_loss"]
    assert "cannot say" in capfd.readouterr().out
    (out / "1-1-1-seed4/config.yaml").unlink()  # whoever started the run again would need it
    assert main(command) == 0
    assert (out / "results.jsonl").read_text(encoding="utf-8") == lines
    assert not (out / "1-1-1-seed4/config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--periods", "1", "4"], "--periods names 2 periods, the configuration has 3 CMS levels"),
        (["optimizer.lrr=1"], "lrr"),
    ],
)
def test_mistakes(
    config: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main, [str(config), "--out", str(tmp_path / "out"), *arguments], message, capsys)
    assert not (tmp_path / "out").exists()
