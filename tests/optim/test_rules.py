"""Every update rule against its numpy reference over 50 steps, alone and under levels with periods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hope_train.config.load import validate
from hope_train.config.train import OptimizerConfig
from hope_train.errors import UserError
from hope_train.optim.deep_momentum import DeepMomentum
from hope_train.optim.kinds import kind_of, rule_of, state_numbers
from hope_train.optim.m3 import M3
from hope_train.optim.mixed import MATRIX_RULES
from hope_train.optim.newton_schulz import newton_schulz
from hope_train.optim.rule import make_rule
from hope_train.optim.wholes import Wholes
from tests.levels.toy import Toy, config, flatten, initial_weights, problem, tokens_of
from tests.optim import reference
from tests.optim.reference import Update

RULES: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"matrix_lr_scale": 0.5}),
    ("sgd", {}),
    ("sgd", {"sgd": {"momentum": 0.8, "nesterov": True}, "vectors": "sgd", "embeddings": "sgd", "memories": "sgd"}),
    ("sgd", {"sgd": {"momentum": 0.0}}),
    ("muon", {}),
    ("muon", {"muon": {"momentum": 0.9, "nesterov": False}, "newton_schulz": {"scale": "original", "steps": 3}}),
    ("m3", {"m3": {"slow_period": 4}}),
    ("m3", {"m3": {"slow_period": 1, "rescale": False}, "newton_schulz": {"coefficients": [2.0, -1.5, 0.5]}}),
    ("m3", {"m3": {"slow_period": 7, "accumulation": "literal", "alpha": 1.5}}),
    ("m3", {"m3": {"slow_period": 3, "accumulation": "literal", "rescale": False, "betas": [1e-3, 0.5, 0.9]}}),
    ("delta_momentum", {"matrix_lr_scale": 0.3}),
    ("delta_momentum", {"delta_momentum": {"output": "linear", "alpha": 0.8}}),
    ("deep_momentum", {"deep_momentum": {"width": 5}}),
    ("deep_momentum", {"deep_momentum": {"width": 3, "output": "linear", "rate": 0.3, "alpha": 0.9}}),
    ("dgd", {}),
    ("dgd", {"dgd": {"momentum": 0.5}}),
]


def rule_id(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{key}={entry}" for key, entry in value.items()) or "default"


def reference_of(optimizer: OptimizerConfig, name: str, shape: tuple[int, ...]) -> Update:
    """The reference for a parameter; where the name has no decay the configuration is one without."""
    if not reference_decays(name):
        optimizer = optimizer.model_copy(update={"weight_decay": 0.0})
    rule = rule_of(optimizer, kind_of(name, len(shape)))
    if rule == "deep_momentum":
        parameter = torch.empty(shape, dtype=torch.float64)
        second = DeepMomentum.fresh(optimizer, parameter, Wholes())["whole_second"]
        return reference.deep_momentum(optimizer, second.numpy())
    made: dict[str, Any] = {
        "adamw": reference.adamw,
        "muon": reference.muon,
        "m3": reference.m3,
        "delta_momentum": reference.delta_momentum,
        "sgd": lambda c: reference.descent(c.sgd.momentum, c.sgd.nesterov, c),
        "dgd": lambda c: reference.descent(c.dgd.momentum, False, c),
    }
    update: Update = made[rule](optimizer)
    return update


def reference_decays(name: str) -> bool:
    return name.split(".")[-2] in ("proj", "up", "head")


@pytest.mark.parametrize(("name", "options"), RULES, ids=rule_id)
@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (5, 5)], ids=str)
def test_fifty_steps_are_those_of_the_reference(name: str, options: dict[str, Any], shape: tuple[int, int]) -> None:
    optimizer = OptimizerConfig(name=name, lr=0.03, weight_decay=0.2, **options)
    rng = np.random.default_rng(0)
    weights, full = rng.normal(size=shape), rng.normal(size=(50, *shape))
    parameter = torch.nn.Parameter(torch.tensor(weights))
    rule = make_rule(optimizer)
    built = rule.build([{"params": [parameter], "param_names": ["proj.weight"], "decay": True}])
    update = reference_of(optimizer, "proj.weight", shape)
    moved = 0.0
    for number, noise in enumerate(full):
        lr = 0.03 * (1 + number % 3)
        gradient = 0.3 * noise + parameter.detach().numpy() - full[0]
        parameter.grad = torch.tensor(gradient)
        built.param_groups[0]["lr"] = lr
        built.step()
        before, weights = weights, update(weights, gradient, lr * optimizer.matrix_lr_scale)
        moved += float(np.abs(weights - before).max())
        np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=0, atol=1e-6, err_msg=f"step {number}")
    assert moved > 0.1


@pytest.mark.parametrize(("name", "options"), RULES, ids=rule_id)
def test_levels_step_each_parameter_by_its_rule_at_its_period(name: str, options: dict[str, Any]) -> None:
    # Periods 1, 2 and 3: gradients are means over the period's tokens, rates those of the level's own updates.
    run = config([1, 2, 3], steps=24, clip_norm=None, name=name, **options)
    toy = Toy(run)
    names = initial_weights(3)
    updates = {key: reference_of(run.optimizer, key, value.shape) for key, value in names.items()}
    sums = {key: np.zeros_like(value) for key, value in names.items()}
    for step in range(1, 25):
        for key, value in names.items():
            curvature, target = problem(step, key, value.shape)
            sums[key] += tokens_of(step) * curvature * (value - target)
        report = toy.step(step)
        for key, value in names.items():
            level = key.split(".levels.")[1][0] if ".levels." in key else None
            period = 1 if level is None else int(level) + 1
            if step % period == 0:
                tokens = sum(tokens_of(each) for each in range(step - period + 1, step + 1))
                lr = report.sets["core" if level is None else f"level_{level}"].lr
                scale = run.optimizer.matrix_lr_scale if kind_of(key, value.ndim) == "matrices" else 1.0
                names[key] = updates[key](value, sums[key] / tokens, lr * scale)
                sums[key][...] = 0
        for key, value in names.items():
            np.testing.assert_allclose(toy.weights()[key], value, rtol=0, atol=1e-6, err_msg=f"{key} {step}")


@pytest.mark.parametrize(("name", "options"), RULES, ids=rule_id)
@pytest.mark.parametrize("through", ["named_state", "state_dict"])
@pytest.mark.parametrize("stop", [0, 5, 7])
def test_a_resume_is_exact(name: str, options: dict[str, Any], through: str, stop: int) -> None:
    # Steps 5 and 7 are in mid-period of levels and of slow momenta alike.
    run = config([1, 2, 4], steps=20, name=name, **options)
    straight, first, second = Toy(run), Toy(run), Toy(run, seed=3)
    for step in range(1, 21):
        straight.step(step)
    for step in range(1, stop + 1):
        first.step(step)
    with torch.no_grad():
        for key, parameter in second.parameters.items():
            parameter.copy_(first.parameters[key])
    if through == "named_state":
        saved = {
            part: {key: value.clone() for key, value in entries.items()}
            for part, entries in first.optimizer.named_state().items()
        }
        second.optimizer.load_named_state(saved)
    else:
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    for step in range(stop + 1, 21):
        second.step(step)
    for key, value in straight.weights().items():
        assert np.array_equal(second.weights()[key], value), key
    expected = flatten(straight.optimizer.named_state())
    for key, tensor in flatten(second.optimizer.named_state()).items():
        assert torch.equal(tensor, expected[key]), key


def test_the_slow_period_counts_updates_of_the_level() -> None:
    run = config([1, 4], steps=40, name="m3", m3={"slow_period": 3})
    toy = Toy(run)
    changed: dict[str, list[int]] = {"0": [], "1": []}
    for step in range(1, 37):
        slow = {level: toy_state(toy, level).clone() for level in changed}
        toy.step(step)
        for level, before in slow.items():
            if not torch.equal(toy_state(toy, level), before):
                changed[level].append(step)
    assert changed == {"0": list(range(3, 37, 3)), "1": [12, 24, 36]}


def toy_state(toy: Toy, level: str) -> torch.Tensor:
    toy.optimizer.materialize_state()
    parameter = toy.parameters[f"blocks.0.cms.levels.{level}.up.weight"]
    entry: torch.Tensor = toy.optimizer.state[parameter]["slow_direction"]
    return entry


@pytest.mark.parametrize(("name", "options"), RULES, ids=rule_id)
def test_the_state_is_of_the_size_that_is_planned(name: str, options: dict[str, Any]) -> None:
    run = config([1, 2], name=name, **options)
    toy = Toy(run, torch.float32)
    for step in range(1, 3):
        toy.step(step)
    for key, parameter in toy.parameters.items():
        shape = tuple(parameter.shape)
        found = {k: v for k, v in toy.optimizer.state[parameter].items() if k != "accumulator" and v.ndim}
        rule = rule_of(run.optimizer, kind_of(key, parameter.ndim))
        expected = state_numbers(run.optimizer, rule, parameter.numel(), shape)
        assert sum(entry.numel() for entry in found.values()) == expected, key
        assert all(entry.dtype == torch.float32 for entry in found.values())


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torchs(shape: tuple[int, int], nesterov: bool) -> None:
    # In bf16, which is all that torch's knows: the same products in the same order.
    schulz = {"dtype": "bf16", "scale": "original"}
    optimizer = OptimizerConfig(name="muon", newton_schulz=schulz, muon={"nesterov": nesterov}, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    built = make_rule(optimizer).build([{"params": [mine], "param_names": ["up.weight"], "decay": True}])
    plain = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov)
    built.param_groups[0]["lr"] = 0.02
    for _ in range(20):
        mine.grad = torch.randn(shape, generator=generator)
        theirs.grad = mine.grad.clone()
        built.step()
        plain.step()
    assert (mine - start).abs().max() > 0.05
    # Seen: 3e-8. One rounding of bf16 in an iteration would be 1e-4.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-4)


def test_newton_schulz_of_many_is_that_of_each() -> None:
    optimizer = OptimizerConfig()
    stack = torch.randn(4, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack[2] = 0
    found = newton_schulz(stack, optimizer.newton_schulz)
    for number, matrix in enumerate(stack):
        expected = reference.orthogonal(matrix.numpy(), optimizer)
        np.testing.assert_allclose(found[number].numpy(), expected, rtol=0, atol=1e-12)
    assert not found[2].any()
    values = torch.linalg.svdvals(found[0])
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("kind", list(MATRIX_RULES))
@pytest.mark.parametrize("shape", [(4,), (2, 3, 3)], ids=str)
def test_rules_for_matrices_take_nothing_else(kind: str, shape: tuple[int, ...]) -> None:
    optimizer = OptimizerConfig(name=kind)
    with pytest.raises(ValueError, match=f"{kind} takes matrices, not a parameter of shape"):
        MATRIX_RULES[kind]([{"params": [torch.nn.Parameter(torch.zeros(shape))]}], optimizer, Wholes())


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"name": "lion"}, "optimizer.name"),
        ({"betas": [0.9, 1.0]}, r"betas=\[0.9, 1.0\]"),
        ({"m3": {"betas": [0.9, 1.0, 0.5]}}, r"betas=\[0.9, 1.0, 0.5\]: each must be in \[0, 1\)"),
        ({"m3": {"betas": [0.9, 0.0, 0.5], "accumulation": "literal"}}, "none is 0"),
        ({"m3": {"slow_period": 0}}, "optimizer.m3.slow_period"),
        ({"m3": {"alpha": -1}}, "optimizer.m3.alpha"),
        ({"muon": {"momentum": 1.0}}, "optimizer.muon.momentum"),
        ({"sgd": {"momentum": 0, "nesterov": True}}, "nesterov needs a momentum above 0"),
        ({"delta_momentum": {"alpha": 1.5}}, "optimizer.delta_momentum.alpha"),
        ({"deep_momentum": {"width": 0}}, "optimizer.deep_momentum.width"),
        ({"newton_schulz": {"steps": 0}}, "optimizer.newton_schulz.steps"),
        ({"vectors": "m3"}, "vectors=m3: m3 is for the weights of linear layers; vectors take adamw or sgd"),
        ({"memories": "muon"}, "memories=muon"),
        ({"embeddings": "dgd"}, "embeddings=dgd"),
        ({"matrix_lr_scale": 0}, "optimizer.matrix_lr_scale"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_a_line(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        validate(type(config([1])), {"model": config([1]).model.model_dump(), "optimizer": tree})
    assert "\n" not in str(caught.value)


def test_kinds() -> None:
    found = {
        name: kind_of(name, ndim)
        for name, ndim in (
            ("embed.weight", 2),
            ("head.weight", 2),
            ("norm.weight", 1),
            ("blocks.0.mixer.in_proj.weight", 2),
            ("blocks.0.mixer.conv.weight", 3),
            ("blocks.0.mixer.memory.k_w1", 3),
            ("blocks.0.mixer.memory.theta_logit", 1),
            ("blocks.0.mixer.out_norm", 1),
            ("blocks.3.cms.levels.1.gate.weight", 2),
            ("blocks.3.cms.mix", 1),
        )
    }
    assert list(found.values()) == [
        "embeddings", "embeddings", "vectors", "matrices", "vectors", "memories", "memories", "vectors", "matrices",
        "vectors",
    ]  # fmt: skip


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    for name in MATRIX_RULES:
        parameters = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
        groups = [{"params": parameters, "param_names": ["a.weight", "b.weight"], "decay": True}]
        built = make_rule(OptimizerConfig(name=name)).build(groups)
        parameters[0].grad = torch.full((3, 2), 0.5)
        built.step()
        assert torch.equal(parameters[1], torch.ones(3, 2))
        assert not torch.equal(parameters[0], torch.ones(3, 2))
        assert not built.state[parameters[1]]


def test_a_gradient_of_zeros_changes_nothing_but_decay() -> None:
    for name in MATRIX_RULES:
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        groups = [{"params": [parameter], "param_names": ["a.weight"], "decay": True}]
        built = make_rule(OptimizerConfig(name=name, lr=0.5, weight_decay=0.1)).build(groups)
        parameter.grad = torch.zeros(3, 2)
        built.step()
        torch.testing.assert_close(parameter.detach(), torch.full((3, 2), 0.95))


def test_the_slow_direction_waits_for_its_period() -> None:
    assert not M3.fresh(OptimizerConfig(), torch.ones(2, 2), Wholes())["slow_direction"].any()


@pytest.mark.parametrize(("name", "options"), RULES, ids=rule_id)
def test_states_may_rest_between_updates(name: str, options: dict[str, Any]) -> None:
    plain = Toy(config([1, 2, 4], steps=12, name=name, **options))
    resting = Toy(config([1, 2, 4], steps=12, name=name, rest_from_period=2, **options))
    for step in range(1, 13):
        plain.step(step)
        resting.step(step)
    # Stepped in other portions, so that products over stacks of matrices are rounded otherwise.
    for key, value in plain.weights().items():
        np.testing.assert_allclose(resting.weights()[key], value, rtol=0, atol=1e-10, err_msg=key)
