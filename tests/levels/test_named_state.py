"""Nothing is lost by a save: at every possible step, by every way of saving, bit for bit."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hope_train.errors import UserError
from hope_train.levels.build import build_optimizer
from tests.levels.toy import Toy, config, flatten

STEPS = 40
SPOILT = frozenset({6, 19}).__contains__


def run_of(variant: str, dtype: torch.dtype = torch.float64) -> Toy:
    return Toy(config([1, 2, 4, 8], steps=STEPS, variant=variant), dtype)


@functools.cache
def uninterrupted(variant: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    toy = run_of(variant, dtype)
    for batch in range(1, STEPS + 1):
        toy.step(batch, spoil=SPOILT)
    return everything(toy)


def everything(toy: Toy) -> dict[str, torch.Tensor]:
    return flatten(toy.optimizer.named_state()) | {f"w/{n}": p.detach().clone() for n, p in toy.parameters.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def resumed(toy: Toy, variant: str, dtype: torch.dtype, how: str) -> Toy:
    """A new process's model and optimizer, with the state of this one."""
    new = Toy(config([1, 2, 4, 8], steps=STEPS, variant=variant), dtype, seed=99)
    with torch.no_grad():
        for name, parameter in new.parameters.items():
            parameter.copy_(toy.parameters[name])
    if how == "state_dict":
        file = io.BytesIO()
        torch.save(toy.optimizer.state_dict(), file)
        file.seek(0)
        new.optimizer.load_state_dict(torch.load(file, weights_only=True))
    elif how == "copied":
        new.optimizer.load_named_state(copy.deepcopy(toy.optimizer.named_state()))
    else:
        saved, live = copy.deepcopy(toy.optimizer.named_state()), new.optimizer.named_state()
        for part, entries in live.items():
            for name, tensor in entries.items():
                tensor.copy_(saved[part][name])
        new.optimizer.load_named_state(live)
    return new


@pytest.mark.parametrize("variant", ["sequential", "nested"])
@pytest.mark.parametrize("how", ["state_dict", "in place"])
@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_resume_at_every_step(variant: str, how: str, stop: int) -> None:
    toy = run_of(variant)
    for batch in range(1, stop + 1):
        toy.step(batch, spoil=SPOILT)
    new = resumed(toy, variant, torch.float64, how)
    assert_same(everything(new), everything(toy))
    for batch in range(stop + 1, STEPS + 1):
        new.step(batch, spoil=SPOILT)
    assert_same(everything(new), uninterrupted(variant, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["state_dict", "copied", "in place"])
@pytest.mark.parametrize("stop", [0, 5, 6, 15, 16])
def test_resume_of_other_types(dtype: torch.dtype, how: str, stop: int) -> None:
    toy = run_of("nested", dtype)
    for batch in range(1, stop + 1):
        toy.step(batch, spoil=SPOILT)
    new = resumed(toy, "nested", dtype, how)
    for batch in range(stop + 1, STEPS + 1):
        new.step(batch, spoil=SPOILT)
    assert_same(everything(new), uninterrupted("nested", dtype))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torch_distributed_checkpoint_loads_in_place(tmp_path: Path) -> None:
    toy = run_of("nested")
    for batch in range(1, 12):
        toy.step(batch, spoil=SPOILT)
    for part, entries in toy.optimizer.named_state().items():
        dcp.save(dict(entries), checkpoint_id=tmp_path / part, no_dist=True)
    new = run_of("nested")
    with torch.no_grad():
        for name, parameter in new.parameters.items():
            parameter.copy_(toy.parameters[name])
    live = new.optimizer.named_state()
    for part, entries in live.items():
        dcp.load(dict(entries), checkpoint_id=tmp_path / part, no_dist=True)
    new.optimizer.load_named_state(live)
    for batch in range(12, STEPS + 1):
        new.step(batch, spoil=SPOILT)
    assert_same(everything(new), uninterrupted("nested", torch.float64))


def test_names_and_sets() -> None:
    toy = run_of("nested")
    toy.step(1)
    named = toy.optimizer.named_state()
    assert list(named) == ["core", "level_0", "level_1", "level_2", "level_3"]
    weight = "blocks.0.cms.levels.1.up.weight"
    level = {name for name in named["level_1"] if weight in name}
    assert level == {f"optimizer.{key}.{weight}" for key in ("step", "exp_avg", "exp_avg_sq", "accumulator", "anchor")}
    scalars = {name: int(tensor) for name, tensor in named["level_1"].items() if name.count(".") == 1}
    assert scalars == {"optimizer.period": 2, "optimizer.updates": 0, "optimizer.tokens": 10}
    core = {name: int(tensor) for name, tensor in named["core"].items() if name.count(".") == 1}
    assert core == {
        "optimizer.period": 1,
        "optimizer.updates": 1,
        "optimizer.tokens": 0,
        "optimizer.steps": 1,
        "optimizer.skipped": 0,
    }
    assert named["core"]["optimizer.exp_avg.embed.weight"].shape == toy.parameters["embed.weight"].shape


def test_tensors_are_the_live_ones() -> None:
    toy = run_of("sequential")
    named = toy.optimizer.named_state()
    moment = named["core"]["optimizer.exp_avg.embed.weight"]
    toy.step(1)
    assert moment is toy.optimizer.state[toy.parameters["embed.weight"]]["exp_avg"]
    assert bool(moment.any())


def test_state_made_early_is_what_the_rule_would_make() -> None:
    """Guards the one place that repeats what torch does inside: the state before a parameter's first step."""
    for fused in (False, True):
        toy = Toy(config([1], fused=fused), torch.float32)
        toy.optimizer.materialize_state()
        parameter = toy.parameters["embed.weight"]
        mine = toy.optimizer.state[parameter]
        lazy = torch.optim.AdamW([parameter], lr=0.0, weight_decay=0.0, fused=fused)
        parameter.grad = torch.zeros_like(parameter)
        lazy.step()
        theirs = lazy.state[parameter]
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (tensor.dtype, tensor.shape, tensor.device) == (mine[key].dtype, mine[key].shape, mine[key].device)
            assert not bool(mine[key].any())


def test_another_period_is_refused_before_anything_changes() -> None:
    toy, other = Toy(config([1, 4])), Toy(config([1, 8]))
    toy.step(1)
    before = everything(other)
    with pytest.raises(UserError, match="level_1 has period 4 in the checkpoint and 8 in the configuration"):
        other.optimizer.load_named_state(toy.optimizer.named_state())
    with pytest.raises(UserError, match="level_1 has period 4 in the checkpoint and 8 in the configuration"):
        other.optimizer.load_state_dict(toy.optimizer.state_dict())
    assert_same(everything(other), before)


def test_other_models_are_refused_before_anything_changes() -> None:
    toy = Toy(config([1, 4]))
    before = everything(toy)
    fewer = Toy(config([1]))
    with pytest.raises(UserError, match="level_1 is missing"):
        toy.optimizer.load_named_state(fewer.optimizer.named_state())
    with pytest.raises(UserError, match="level_1 is not this model's"):
        fewer.optimizer.load_named_state(toy.optimizer.named_state())
    with pytest.raises(UserError, match="other parameters"):
        fewer.optimizer.load_state_dict(toy.optimizer.state_dict())
    nested = Toy(config([1, 4], variant="nested"))
    with pytest.raises(UserError, match=r"level_0 has other entries: optimizer\.anchor\..* is missing"):
        nested.optimizer.load_named_state(toy.optimizer.named_state())
    saved = copy.deepcopy(toy.optimizer.named_state())
    saved["core"]["optimizer.exp_avg.embed.weight"] = torch.zeros(7, 3)
    with pytest.raises(UserError, match=r"embed\.weight has shape \[7, 3\] in the checkpoint and \[5, 3\]"):
        toy.optimizer.load_named_state(saved)
    assert_same(everything(toy), before)


def test_another_order_of_parameters_is_refused() -> None:
    """torch pairs a state_dict by position: the same names in another order would swap moments silently."""
    run = config([1, 4])
    toy, other = Toy(run), Toy(run)
    turned = build_optimizer(reversed(other.parameters.items()), run)
    with pytest.raises(UserError, match="another order"):
        turned.load_state_dict(toy.optimizer.state_dict())
    toy.step(1)
    turned.load_named_state(toy.optimizer.named_state())
    assert_same(flatten(turned.named_state()), flatten(toy.optimizer.named_state()))
