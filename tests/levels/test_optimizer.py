"""The level optimizer against the plain rule, against the slow reference, and against bad steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hope_train.config.tree import RunConfig
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.ranks import Ranks
from hope_train.levels.schedule import LevelPlan, lr_at
from hope_train.optim.rule import make_rule
from tests.levels import reference
from tests.levels.toy import Toy, config, flatten, tokens_of

VARIANTS = ["sequential", "nested", "independent"]
SCHEDULES: list[dict[str, Any]] = [
    {"kind": "cosine", "warmup_tokens": 40},
    {"kind": "wsd", "warmup_tokens": 20, "decay_fraction": 0.5, "min_ratio": 0.05},
    {"kind": "constant", "warmup_tokens": 0},
]


def plain_adamw(toy: Toy, run: RunConfig, steps: int, fused: bool | None, clip_norm: float | None) -> list[float]:
    """What a plain training loop does with these weights. Returns the gradient norms."""
    matrices = [p for n, p in toy.parameters.items() if n.split(".")[-2] in ("proj", "up", "head")]
    others = [p for n, p in toy.parameters.items() if n.split(".")[-2] not in ("proj", "up", "head")]
    cfg = run.optimizer
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)
    norms = []
    for step in range(1, steps + 1):
        toy.backward(step)
        limit = math.inf if clip_norm is None else clip_norm
        if clip_norm is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(toy.parameters.values(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_at(step, run.train.total_steps, 5, cfg.schedule)
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("periods", [[], [1, 1, 1]])
@pytest.mark.parametrize("early", [False, True])
def test_period_one_is_plain_adamw_bit_for_bit(
    dtype: torch.dtype, clip_norm: float | None, fused: bool, periods: list[int], early: bool
) -> None:
    run = config(periods, steps=50, clip_norm=clip_norm, fused=fused)
    ours, plain = Toy(run, dtype), Toy(run, dtype)
    if early:
        ours.optimizer.materialize_state()
    reports = [ours.step(step, measure=step % 2 == 0) for step in range(1, 51)]
    norms = plain_adamw(plain, run, 50, fused, clip_norm)
    for name, expected in plain.weights().items():
        assert np.array_equal(ours.weights()[name], expected), name
    if clip_norm is not None:
        assert [report.clips[1].norm for report in reports] == norms
        assert any(norm > 1.0 for norm in norms), "clipping was never active"
        assert any(norm < 1.0 for norm in norms), "clipping was always active"
    assert not any("accumulator" in name for name in flatten(ours.optimizer.named_state()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_period_one_is_plain_adamw_on_gpu(fused: bool) -> None:
    run = config([1, 1], steps=50, fused=fused)
    ours, plain = Toy(run, torch.float32, device="cuda"), Toy(run, torch.float32, device="cuda")
    for step in range(1, 51):
        ours.step(step)
    plain_adamw(plain, run, 50, True if fused else None, 1.0)
    for name, expected in plain.weights().items():
        assert np.array_equal(ours.weights()[name], expected), name


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], where: str) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=f"{name} {where}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("spoilt", [frozenset(), frozenset({1, 7, 8, 9, 24})], ids=["clean", "nan"])
def test_agrees_with_the_reference(
    variant: str, schedule: dict[str, Any], clip_norm: float | None, spoilt: frozenset[int]
) -> None:
    levels = [{}, {"lr_scale": 2.0}, {"lr_scale": 0.5, "warmup_updates": 3}, {}]
    run = config([1, 2, 4, 8], variant=variant, clip_norm=clip_norm, levels=levels, schedule=schedule)
    expected, updates = reference.train(run, 40, spoil=spoilt.__contains__)
    toy = Toy(run)
    clipped = 0
    for batch in range(1, 41):
        report = toy.step(batch, measure=batch % 3 == 0, spoil=spoilt.__contains__)
        assert report.applied == (batch not in spoilt)
        assert_close(toy.weights(), expected[batch - 1], f"after batch {batch}")
        clipped += any(clip.scale < 1.0 for period, clip in report.clips.items() if period > 1)
    assert toy.optimizer.steps + toy.optimizer.skipped == 40
    assert toy.optimizer.skipped == len(spoilt)
    for level, count in updates.items():
        assert toy.optimizer.updates("core" if level is None else f"level_{level}") == count
    assert (clipped > 0) == (clip_norm is not None), "the slow groups were clipped at some steps"


def test_equal_periods_share_one_norm_and_others_do_not() -> None:
    toy = Toy(config([1, 4, 4, 2]))
    for step in range(1, 4):
        toy.step(step)
    named = toy.optimizer.named_state()
    toy.backward(4)
    sums: dict[int, float] = {}
    tokens = sum(tokens_of(step) for step in (1, 2, 3, 4))
    recent = tokens_of(3) + tokens_of(4)
    for name in toy.parameters:
        level = reference.level(name)
        period = 1 if level is None else [1, 4, 4, 2][level]
        gradient = toy.grad(name)
        if period > 1:
            accumulated = named[f"level_{level}"][f"optimizer.accumulator.{name}"]
            gradient = (accumulated + tokens_of(4) * gradient) / (tokens if period == 4 else recent)
        sums[period] = sums.get(period, 0.0) + float((gradient**2).sum())
    report = toy.optimizer.step(tokens=tokens_of(4))
    assert set(report.clips) == {1, 2, 4}
    for period, total in sums.items():
        assert report.clips[period].norm == pytest.approx(math.sqrt(total), rel=1e-12)


def state_of(toy: Toy) -> dict[str, torch.Tensor]:
    return flatten(toy.optimizer.named_state()) | {f"w/{n}": p.detach().clone() for n, p in toy.parameters.items()}


@pytest.mark.parametrize("how", ["nan gradient", "inf gradient", "nan loss", "inf loss", "decided", "no tokens"])
@pytest.mark.parametrize("step", [3, 4, 8])
def test_a_bad_step_changes_nothing_but_the_count(how: str, step: int) -> None:
    toy = Toy(config([1, 4], variant="nested"))
    for earlier in range(1, step):
        toy.step(earlier)
    before = state_of(toy)
    toy.backward(step)
    gradient = toy.parameters["blocks.1.cms.levels.1.up.weight"].grad
    assert gradient is not None
    loss, finite, tokens = 1.0, None, 5
    if how.endswith("gradient"):
        gradient[0, 0] = math.nan if "nan" in how else -math.inf
    if how.endswith("loss"):
        loss = math.nan if "nan" in how else math.inf
    if how == "decided":
        finite = False
    if how == "no tokens":
        tokens = 0
    report = toy.optimizer.step(tokens=tokens, loss=torch.tensor(loss), finite=finite)
    assert not report.applied
    assert report.step == step - 1
    assert report.skipped == 1
    after = state_of(toy)
    assert after.pop("core/optimizer.skipped") == before.pop("core/optimizer.skipped") + 1
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    toy.optimizer.zero_grad()
    report = toy.step(step + 1)
    assert report.applied
    assert report.step == step
    assert report.sets["level_1"].due == (step % 4 == 0), "the next batch takes the refused one's place"


def test_all_ranks_decide_together() -> None:
    class Pessimist(Ranks):
        def all_agree(self, finite: bool) -> bool:
            assert finite
            return False

    toy = Toy(config([1, 2]), ranks=Pessimist())
    assert not toy.step(1).applied
    assert toy.optimizer.steps == 0


def test_a_period_boundary_reduces_each_due_slow_level_once() -> None:
    calls: list[tuple[str, int]] = []

    class Watch(Ranks):
        def reduce_accumulators(self, name: str, accumulators: Any) -> None:
            calls.append((name, len(accumulators)))

    toy = Toy(config([1, 2, 4]), ranks=Watch())
    for step in range(1, 9):
        toy.step(step)
    assert calls == [("level_1", 4), *[("level_1", 4), ("level_2", 4)]] * 2


@pytest.mark.parametrize("to_none", [True, False])
def test_clearing_gradients_loses_nothing(to_none: bool) -> None:
    run = config([2, 4])
    one, two = Toy(run), Toy(run)
    for step in range(1, 9):
        one.step(step)
        two.backward(step)
        two.optimizer.step(tokens=tokens_of(step))
        for _ in range(2):
            two.optimizer.zero_grad(set_to_none=to_none)
        for parameter in two.parameters.values():
            parameter.grad = None if to_none else parameter.grad
    for name, value in one.weights().items():
        assert np.array_equal(two.weights()[name], value), name


def test_gradients_stay_the_callers() -> None:
    toy = Toy(config([2]))
    for step in (1, 2):
        toy.backward(step)
        slow = "blocks.0.cms.levels.0.up.weight"
        gradient, value = toy.grad(slow), toy.grad(slow).clone()
        toy.optimizer.step(tokens=3)
        assert toy.grad(slow) is gradient
        assert torch.equal(gradient, value)
        toy.optimizer.zero_grad()


def test_between_updates_a_level_does_not_change() -> None:
    toy = Toy(config([1, 8], variant="sequential"))
    slow = "blocks.0.cms.levels.1.up.weight"
    before = toy.weights()[slow]
    for step in range(1, 8):
        toy.step(step)
        assert np.array_equal(toy.weights()[slow], before)
    toy.step(8)
    assert not np.array_equal(toy.weights()[slow], before)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_nested_extremes(rate: float) -> None:
    toy = Toy(config([1, 4], variant="nested", nested_rate=rate))
    plain = Toy(config([1, 4]))
    fast = "blocks.0.cms.levels.0.up.weight"
    start = toy.weights()[fast]
    for step in range(1, 9):
        toy.step(step)
        plain.step(step)
        if rate == 0.0 and step % 4 == 0:
            assert np.array_equal(toy.weights()[fast], start), "the fast level is back where it began"
        if rate == 1.0:
            assert np.array_equal(toy.weights()[fast], plain.weights()[fast]), "moving all the way is no reset"


def test_nested_starts_from_the_weights_at_the_first_step() -> None:
    toy = Toy(config([1, 2], variant="nested"))
    with torch.no_grad():
        for parameter in toy.parameters.values():
            parameter.fill_(0.5)
    toy.backward(1)
    toy.optimizer.materialize_state()
    anchors = {n: t for n, t in toy.optimizer.named_state()["level_0"].items() if ".anchor." in n}
    assert len(anchors) == 4
    assert all(bool((anchor == 0.5).all()) for anchor in anchors.values())
    assert not any(".anchor." in name for name in toy.optimizer.named_state()["level_1"])


def test_bf16_weights_accumulate_in_fp32() -> None:
    run = config([8], clip_norm=None)
    toy = Toy(run, torch.bfloat16)
    name = "blocks.0.cms.levels.0.up.weight"
    total = torch.zeros(toy.parameters[name].shape)
    for step in range(1, 8):
        toy.backward(step)
        total += tokens_of(step) * toy.grad(name).float()
        toy.optimizer.step(tokens=tokens_of(step))
        toy.optimizer.zero_grad()
    accumulator = toy.optimizer.named_state()["level_0"][f"optimizer.accumulator.{name}"]
    assert accumulator.dtype == torch.float32
    torch.testing.assert_close(accumulator, total, rtol=1e-6, atol=0.0)
    assert toy.step(8).sets["level_0"].updates == 1


def test_frozen_and_untouched_parameters() -> None:
    run = config([1, 2])
    toy = Toy(run)
    plan, rule = LevelPlan.from_config(run), make_rule(run.optimizer)
    frozen = "blocks.0.mixer.proj.weight"
    toy.parameters[frozen].requires_grad_(False)
    optimizer = LevelOptimizer(toy.parameters.items(), plan, rule)
    assert frozen not in [name for group in optimizer.param_groups for name in group["param_names"]]
    before = toy.weights()
    toy.parameters["norm.weight"].grad = torch.ones(3, dtype=torch.float64)
    optimizer.step(tokens=1)
    changed = [name for name, value in toy.weights().items() if not np.array_equal(before[name], value)]
    assert changed == ["norm.weight"], "a parameter without a gradient is left alone"


def test_a_wholly_frozen_level_is_scheduled_without_effect() -> None:
    run = config([1, 2])
    toy = Toy(run)
    for name, parameter in toy.parameters.items():
        parameter.requires_grad_(reference.level(name) != 1)
    optimizer = LevelOptimizer(toy.parameters.items(), LevelPlan.from_config(run), make_rule(run.optimizer))
    before = toy.weights()
    for step in (1, 2):
        toy.backward(step)
        report = optimizer.step(tokens=3, measure=True)
        optimizer.zero_grad()
    assert report.sets["level_1"].update_ratio is None
    assert np.array_equal(toy.weights()["blocks.0.cms.levels.1.up.weight"], before["blocks.0.cms.levels.1.up.weight"])


def test_plan_and_model_must_have_the_same_levels() -> None:
    toy = Toy(config([1, 2]))
    rule = make_rule(config([1]).optimizer)
    with pytest.raises(ValueError, match="level_1"):
        LevelOptimizer(toy.parameters.items(), LevelPlan.from_config(config([1])), rule)
    with pytest.raises(ValueError, match="level_2"):
        LevelOptimizer(toy.parameters.items(), LevelPlan.from_config(config([1, 2, 4])), rule)


def test_refuses_a_closure_and_negative_tokens() -> None:
    toy = Toy(config([1]))
    with pytest.raises(ValueError, match="closure"):
        toy.optimizer.step(lambda: 1.0, tokens=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        toy.optimizer.step(tokens=-1)


def test_any_rule_can_be_scheduled() -> None:
    """Plain gradient descent with a momentum buffer, given as a rule: scheduling knows nothing of AdamW."""

    class Momentum:
        def build(self, groups: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(list(groups), lr=1.0, momentum=0.9)

        def initial_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {"momentum_buffer": torch.zeros_like(parameter)}

    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    core = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    plan = LevelPlan.from_config(config([2], lr=0.5, schedule={"kind": "constant", "warmup_tokens": 0}))
    optimizer = LevelOptimizer({"a.cms.levels.0.w": weight, "b": core}.items(), plan, Momentum(), clip_norm=None)
    for value, tokens in ((1.0, 1), (5.0, 3)):
        weight.grad = torch.full_like(weight, value)
        optimizer.step(tokens=tokens)
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5 * 4.0, dtype=torch.float64))
