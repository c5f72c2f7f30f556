"""DeepSpeed's universal format and back, without DeepSpeed: to the bit, in mid-period, or a line that says why not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_train.checkpoint.manifest import read_manifest, verify
from hope_train.checkpoint.store import find_checkpoint
from hope_train.checkpoint.universal.export import to_universal
from hope_train.checkpoint.universal.load import from_universal
from hope_train.cli import run
from tests.train.tiny import Tiny, assert_same_tensors, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAME = "blocks.0.cms.levels.1.down.weight"


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture
def checkpoint(tiny: Tiny) -> Path:
    """Of step 3: levels 1 and 2 are in mid-period, level 1 has taken an update."""
    assert tiny.train("run", "checkpoint.every=3", "checkpoint.keep_last=9", "train.tokens=384") == 0
    return tiny.checkpoint("run", 3)


def test_a_run_goes_on_from_it_as_from_the_checkpoint(tiny: Tiny) -> None:
    assert tiny.train("run", "checkpoint.every=1", "checkpoint.keep_last=99") == 0
    checkpoint = tiny.checkpoint("run", 3)
    assert run(["checkpoint", "to-universal", str(checkpoint), "--out", str(tiny.folder / "universal")]) == 0
    moved = tiny.folder / "elsewhere"
    (tiny.folder / "universal").rename(moved)  # nothing in it depends on where it lies
    back = tiny.folder / "back"
    assert run(["checkpoint", "from-universal", str(moved), "--out", str(back)]) == 0
    assert_same_tensors(back, checkpoint)
    mine, theirs = verify(back), read_manifest(checkpoint)
    for field in ("step", "tokens", "config", "tokenizer", "data", "losses", "stacked"):
        assert getattr(mine, field) == getattr(theirs, field), field
    assert {name: part.updates for name, part in mine.sets.items()} == {
        name: part.updates for name, part in theirs.sets.items()
    }
    assert mine.references() == set()
    assert (back / "trainer.json").read_bytes() == (checkpoint / "trainer.json").read_bytes()
    # Exactly as the run that was not interrupted, which the tests of resuming hold the original to as well.
    assert tiny.train("converted", "checkpoint.every=1", "checkpoint.keep_last=99", resume=str(back)) == 0
    whole = [row for row in tiny.metrics("run") if row["step"] > 3]
    assert [row for row in tiny.metrics("converted") if row["step"] > 3] == whole
    for step in (4, 9):
        assert_same_tensors(tiny.checkpoint("converted", step), tiny.checkpoint("run", step))


def test_files_are_those_of_the_format(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = to_universal(*find_checkpoint(checkpoint), out)
    tensors = {name.partition("/")[2]: tensor for name, tensor in read_checkpoint(checkpoint).items()}
    names = {name for name in tensors if not name.startswith("optimizer.")}
    assert {path.name for path in (out / "zero").iterdir() if path.is_dir()} == names
    assert written["parameters"] == len(names)
    for name in names:
        place = out / "zero" / name
        assert sorted(path.name for path in place.iterdir()) == ["exp_avg.pt", "exp_avg_sq.pt", "fp32.pt", "step.pt"]
        for key, prefix in (("fp32", ""), ("exp_avg", "optimizer.exp_avg."), ("exp_avg_sq", "optimizer.exp_avg_sq.")):
            assert torch.equal(torch.load(place / f"{key}.pt")["param"], tensors[prefix + name])
        assert torch.equal(torch.load(place / "step.pt"), tensors[f"optimizer.step.{name}"])
    assert torch.load(out / "zero" / NAME / "fp32.pt")["cat_dim"] == 1
    assert torch.load(out / "zero" / "embed.weight" / "fp32.pt")["vocab_tensor"]
    groups = torch.load(out / "zero" / "optimizer_state.pt")["param_groups"]
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(names)
    for group in groups:  # DeepSpeed keeps one count of updates for each of its groups
        assert len({int(tensors[f"optimizer.step.{name}"]) for name in group["param_names"]}) == 1


def change_step(folder: Path) -> None:
    torch.save(torch.tensor(9.0), folder / "zero" / "head.weight" / "step.pt")


def change_shape(folder: Path) -> None:
    torch.save({"param": torch.zeros(16, 32)}, folder / "zero" / NAME / "exp_avg.pt")


def change_type(folder: Path) -> None:
    torch.save({"param": torch.zeros(32, 16, dtype=torch.bfloat16)}, folder / "zero" / NAME / "fp32.pt")


def run_something(folder: Path) -> None:
    torch.save({"param": print}, folder / "zero" / NAME / "fp32.pt")


def damage(folder: Path) -> None:
    file = folder / "hope_train" / "level_2_accumulator" / "optimizer.tokens.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file less": (lambda f: (f / "zero" / NAME / "exp_avg.pt").unlink(), f"zero/{NAME}/exp_avg.pt is missing"),
    "a parameter less": (lambda f: shutil.rmtree(f / "zero" / NAME), f"another model: {NAME} is not in it"),
    "a parameter more": (lambda f: (f / "zero" / "x.weight").mkdir(), "x.weight is not a parameter of this model"),
    "a shape": (change_shape, "exp_avg.pt has shape [16, 32], and this model has [32, 16]"),
    "a type": (change_type, "fp32.pt is bfloat16, and this model has float32"),
    "no tensor": (run_something, "fp32.pt cannot be read"),
    "a step": (change_step, "head.weight 9; what is updated at every step has to have taken as many"),
    "nothing of ours": (lambda f: shutil.rmtree(f / "hope_train"), "--like"),
    "a bit of ours": (damage, "optimizer.tokens.pt is missing or not as it was written"),
    "no format": (lambda f: shutil.rmtree(f / "zero"), "it has no folder zero"),
}


def test_what_does_not_fit_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole"
    to_universal(*find_checkpoint(checkpoint), whole)
    for name, (spoil, message) in WRONG.items():
        folder, out = tmp_path / name, tmp_path / f"{name} out"
        shutil.copytree(whole, folder)
        spoil(folder)
        capsys.readouterr()
        assert run(["checkpoint", "from-universal", str(folder), "--out", str(out)]) == 2, name
        error = capsys.readouterr().err
        assert message in error, name
        assert error.count("\n") == 1, f"{name}: {error}"
        assert not out.exists(), name
        assert not list(tmp_path.glob(".*.tmp")), name
    for command in (["to-universal", str(checkpoint)], ["from-universal", str(whole)]):
        assert run(["checkpoint", *command, "--out", str(whole)]) == 2
        assert "is there already" in capsys.readouterr().err


def test_what_another_run_has_made_of_it_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "universal", tmp_path / "back"
    to_universal(*find_checkpoint(checkpoint), folder)
    moved = torch.full((32, 16), 0.5)
    torch.save({"param": moved, "cat_dim": 1}, folder / "zero" / NAME / "fp32.pt")
    capsys.readouterr()
    assert run(["checkpoint", "from-universal", str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"from {folder}: weights" in said
    assert f"from {folder / 'hope_train'}: configuration" in said
    assert "anew: what slow levels collect" in said
    state, before = read_checkpoint(out), read_checkpoint(checkpoint)
    assert torch.equal(state[f"level_1/{NAME}"], moved)
    rest = [name for name in before if "_accumulator/" not in name and name != f"level_1/{NAME}"]
    assert sorted(state) == sorted([*rest, f"level_1/{NAME}"])
    assert all(torch.equal(state[name], before[name]) for name in rest)
    assert json.loads((out / "trainer.json").read_text())["refused"] == 0


def test_counters_that_a_run_left_in_deepspeed_s_save_hold_until_deepspeed_steps(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "universal"
    to_universal(*find_checkpoint(checkpoint), folder)
    shutil.rmtree(folder / "hope_train")
    before = read_checkpoint(checkpoint)
    names = [path.name for path in (folder / "zero").iterdir() if path.is_dir()]
    file = folder / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    counts = {"step": 7, "tokens": 896, "global_steps": content["global_steps"], "steps": 6, "skipped": 1}
    periods = {name.partition("/")[0]: int(tensor) for name, tensor in before.items() if name.endswith("period")}
    counts["sets"] = {name: {"period": period, "updates": 5, "tokens": 0} for name, period in periods.items()}
    counts["adam_steps"] = dict.fromkeys(names, 4)

    def read(out: str, **changed: Any) -> tuple[int, dict[str, Any]]:
        torch.save({**content, "hope_train": counts, **changed}, file)
        arguments = [str(folder), "--out", str(tmp_path / out), "--like", str(checkpoint), "--json"]
        code = run(["checkpoint", "from-universal", *arguments])
        said = capsys.readouterr()
        return code, json.loads(said.out) if code == 0 else {"error": said.err}

    capsys.readouterr()
    code, made = read("counted")
    assert (code, made["counted"], made["exact"], made["step"], made["tokens"]) == (0, True, False, 7, 896)
    state, manifest = read_checkpoint(tmp_path / "counted"), verify(tmp_path / "counted")
    assert (manifest.step, manifest.tokens) == (7, 896)
    assert [int(state[f"core/optimizer.{key}"]) for key in ("steps", "skipped", "updates")] == [6, 1, 5]
    assert int(state[f"level_1/optimizer.step.{NAME}"]) == 4
    assert torch.equal(state[f"level_1/{NAME}"], before[f"level_1/{NAME}"])

    code, made = read("stepped", global_steps=content["global_steps"] + 1)
    assert (code, made["counted"], made["step"]) == (0, False, 3)
    assert int(read_checkpoint(tmp_path / "stepped")[f"level_1/optimizer.step.{NAME}"]) == 1

    counts["sets"]["level_1"]["period"] = 8
    code, made = read("other")
    assert code == 2
    assert "of a run with other levels or periods" in made["error"]
    assert made["error"].count("\n") == 1


def test_other_rules_are_refused(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.train("muon", "optimizer.name=muon", "train.tokens=128") == 0
    capsys.readouterr()
    assert run(["checkpoint", "to-universal", str(tiny.dir("muon")), "--out", str(tiny.folder / "out")]) == 2
    assert "it takes runs of optimizer.name=adamw" in capsys.readouterr().err


def test_the_nested_variant_comes_back_unchanged_or_not_at_all(tiny: Tiny) -> None:
    assert tiny.train("nested", "model.cms.variant=nested", "checkpoint.every=3", "checkpoint.keep_last=9") == 0
    checkpoint, folder = tiny.checkpoint("nested", 3), tiny.folder / "universal"
    to_universal(*find_checkpoint(checkpoint), folder)
    assert from_universal(folder, tiny.folder / "back")["exact"]
    assert_same_tensors(tiny.folder / "back", checkpoint)
    torch.save({"param": torch.zeros(32, 16)}, folder / "zero" / NAME / "fp32.pt")
    assert run(["checkpoint", "from-universal", str(folder), "--out", str(tiny.folder / "other")]) == 2
