"""Finding, refusing and loading checkpoints; a model from nothing but a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hope_train.checkpoint.manifest import MANIFEST, DamagedCheckpointError, verify
from hope_train.checkpoint.store import find_checkpoint, load_model, load_state, newest_whole, read_trainer
from hope_train.checkpoint.tensors import Staging, model_state, training_state
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.levels.build import build_optimizer
from hope_train.model.hope import HopeModel, build_model
from tests.checkpoint.toy import assert_equal, blank, facts, make_state, make_writer, save_steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HOPE = {"cms": {"levels": [{"width": 16}, {"width": 16, "period": 2}]}}


def run_config(**model: object) -> RunConfig:
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}
    return RunConfig.model_validate({"name": "small", "model": {**sizes, **HOPE, **model}})


def save_model(run_dir: Path, config: RunConfig, step: int = 5, seed: int = 1) -> HopeModel:
    """A run with one checkpoint, of a model and its optimizer."""
    model = build_model(config.model, seed)
    optimizer = build_optimizer(model.named_parameters(), config)
    writer, _ = make_writer(run_dir)
    writer.save(training_state(model, optimizer), facts(step, config=config.model_dump(mode="json")))
    return model


class TestFinding:
    """`newest_whole` and `find_checkpoint`."""

    def test_falls_back_past_damaged_ones_and_names_each(self, tmp_path: Path) -> None:
        save_steps(tmp_path, [1, 2, 3, 4])
        checkpoints = tmp_path / "checkpoints"
        (checkpoints / "step_00000004" / MANIFEST).unlink()
        spoilt = checkpoints / "step_00000003" / "core" / "__0_0.distcp"
        content = bytearray(spoilt.read_bytes())
        content[len(content) // 2] ^= 1
        spoilt.write_bytes(content)
        shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000005.tmp-x")
        said: list[str] = []
        found = newest_whole(tmp_path, said.append)
        assert found is not None
        assert found[0].name == "step_00000002"
        assert len(said) == 2
        assert "step_00000004 has no manifest.json" in said[0]
        assert "step_00000003: core/__0_0.distcp does not have the sha256" in said[1]
        said.clear()
        assert find_checkpoint(tmp_path, said.append)[0] == found[0]
        assert len(said) == 2

    def test_one_that_is_named_is_not_replaced_by_another(self, tmp_path: Path) -> None:
        save_steps(tmp_path, [1, 2])
        (tmp_path / "checkpoints" / "step_00000002" / "trainer.json").unlink()
        with pytest.raises(DamagedCheckpointError, match=r"step_00000002: trainer\.json is missing"):
            find_checkpoint(tmp_path / "checkpoints" / "step_00000002")
        assert find_checkpoint(tmp_path / "checkpoints")[1].step == 1

    def test_what_is_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            find_checkpoint(tmp_path / "nowhere")
        with pytest.raises(UserError, match="neither a run directory nor a checkpoint"):
            find_checkpoint(tmp_path)
        (tmp_path / "a-file").write_text("x")
        with pytest.raises(UserError, match="neither"):
            find_checkpoint(tmp_path / "a-file")
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        assert newest_whole(tmp_path / "run", print) is None
        with pytest.raises(UserError, match="has no whole checkpoint"):
            find_checkpoint(tmp_path / "run")
        (tmp_path / "run" / "checkpoints" / "step_00000007").mkdir()
        with pytest.raises(UserError, match=r"no whole checkpoint \(checkpoint .*step_00000007 has no manifest"):
            find_checkpoint(tmp_path / "run")

    def test_the_trainers_state_comes_back(self, tmp_path: Path) -> None:
        writer, _ = make_writer(tmp_path)
        writer.save(make_state(), facts(1, trainer={"random": {"torch": "abc"}, "refused": 2}))
        assert read_trainer(find_checkpoint(tmp_path)[0]) == {"random": {"torch": "abc"}, "refused": 2}


class TestRefusing:
    """A state that does not fit is refused before anything is changed."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("level_0"), "has the sets core, level_0, this model has core"),
            (lambda state: state["core"].update({"new": torch.zeros(1)}), "new is not in it"),
            (lambda state: state["core"].pop("norm.weight"), "this model has no norm.weight"),
            (
                lambda state: state["core"].update({"embed.weight": torch.zeros(7, 6)}),
                r"embed.weight has shape \[7, 5\] there and \[7, 6\] here",
            ),
            (lambda state: state["core"].update({"embed.weight": torch.zeros(1, 5)}), "has shape"),
            (
                lambda state: state["core"].update({"norm.weight": torch.zeros(5)}),
                "norm.weight is float64 there and float32 here",
            ),
        ],
    )
    def test_the_first_difference_is_named(self, tmp_path: Path, change: object, message: str) -> None:
        save_steps(tmp_path, [1])
        folder = tmp_path / "checkpoints" / "step_00000001"
        state = blank(make_state(1))
        change(state)  # type: ignore[operator]
        before = Staging().copy(state)
        with pytest.raises(UserError, match=f"is of another model: .*{message}"):
            load_state(folder, verify(folder), state)
        assert_equal(state, before)

    def test_the_optimizers_part_need_not_be_asked_for(self, tmp_path: Path) -> None:
        save_steps(tmp_path, [1])
        folder = tmp_path / "checkpoints" / "step_00000001"
        state = blank(make_state(1))
        for name in [name for name in state["core"] if name.startswith("optimizer.")]:
            del state["core"][name]
        load_state(folder, verify(folder), state)
        assert torch.equal(state["core"]["embed.weight"], make_state(1)["core"]["embed.weight"])


class TestLoadModel:
    """`load_model`, for evaluation and sampling."""

    @pytest.mark.parametrize("arch", ["hope", "hope_attention", "transformer_pp"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_every_architecture(self, tmp_path: Path, arch: str, tied: bool) -> None:
        more = {"mlp_width": 24, "cms": {}} if arch == "transformer_pp" else {}
        config = run_config(arch=arch, tie_embeddings=tied, **more)
        model = save_model(tmp_path, config)
        loaded, found, manifest = load_model(tmp_path)
        assert found == config
        assert (manifest.step, manifest.tokens) == (5, 50)
        assert not loaded.training
        assert_equal(model_state(loaded), model_state(model))
        tokens_BT = torch.arange(20).reshape(1, 20)
        with torch.no_grad():
            assert torch.equal(loaded(tokens_BT), model.eval()(tokens_BT))

    def test_from_a_run_a_checkpoint_and_a_moved_copy(self, tmp_path: Path) -> None:
        model = save_model(tmp_path / "run", run_config())
        shutil.copytree(tmp_path / "run", tmp_path / "other machine" / "renamed")
        moved = tmp_path / "other machine" / "renamed"
        shutil.rmtree(tmp_path / "run")
        for place in (moved, moved / "checkpoints", moved / "checkpoints" / "step_00000005"):
            assert_equal(model_state(load_model(place)[0]), model_state(model))

    def test_overrides(self, tmp_path: Path) -> None:
        save_model(tmp_path, run_config())
        model, config, _ = load_model(tmp_path, overrides=["model.memory.eta_max=0"])
        assert config.model.memory.eta_max == 0.0
        assert model.config.memory.eta_max == 0.0
        with pytest.raises(UserError, match=r"embed\.weight has shape \[50, 32\] there and \[60, 32\] here"):
            load_model(tmp_path, overrides=["model.vocab_size=60"])
        with pytest.raises(UserError, match=r"another model: blocks\.2\..* is not in it"):
            load_model(tmp_path, overrides=["model.n_layers=3"])
        with pytest.raises(UserError, match=r"another model: this model has no blocks\.1\."):
            load_model(tmp_path, overrides=["model.n_layers=1"])
        with pytest.raises(UserError, match="the configuration in checkpoint step_00000005: unknown key"):
            load_model(tmp_path, overrides=["model.layers=1"])

    def test_names_are_those_of_the_unsharded_uncompiled_model(self, tmp_path: Path) -> None:
        config = run_config()
        model = build_model(config.model, 1)
        compiled = torch.compile(model, backend="eager")
        optimizer = build_optimizer(model.named_parameters(), config)
        writer, _ = make_writer(tmp_path)
        state = training_state(compiled, optimizer)  # type: ignore[arg-type]
        writer.save(state, facts(5, config=config.model_dump(mode="json")))
        assert_equal(model_state(load_model(tmp_path)[0]), model_state(model))
