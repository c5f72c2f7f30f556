"""Delta gradient descent: the mean of one-sample updates, sample by sample in numpy, and its place in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hope_train.config.train import OptimizerConfig
from hope_train.optim.mixed import MixedRule
from tests.parallel import cases

RATE = 0.05


class Net(nn.Module):
    """Two linear layers and a vector, [S, 4] -> [S, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.mix = nn.Parameter(torch.ones(3))
        generator = torch.Generator().manual_seed(0)
        for layer in (self.up, self.down):
            layer.weight.data.normal_(generator=generator)

    def forward(self, x_SI: Tensor) -> Tensor:
        return self.mix * self.down(torch.tanh(self.up(x_SI)))


def loss_of(output_SO: Tensor, target_SO: Tensor) -> Tensor:
    return (output_SO - target_SO).square().sum() / (2 * len(output_SO))


def batch(number: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(samples, 4, generator=generator).double(), torch.randn(samples, 3, generator=generator).double()


def watched(net: Net, samples: int = 8, **dgd: Any) -> torch.optim.Optimizer:
    config = OptimizerConfig(name="dgd", vectors="sgd", sgd={"momentum": 0}, weight_decay=0.0, dgd=dgd)
    rule = MixedRule(config)
    named = dict(net.named_parameters())
    group = {"params": list(named.values()), "param_names": list(named), "decay": True}
    built = rule.build([group])
    for part in built.param_groups:
        part["lr"] = RATE
    rule.watch(net, lambda: samples)
    return built


def one_sample_updates(weight: np.ndarray, x_SI: np.ndarray, d_SO: np.ndarray, rate: float) -> np.ndarray:
    """Eqs. 56-57 for each sample from the same weights, and the mean of the results. d: of the samples' own losses."""
    results = []
    for x, d in zip(x_SI, d_SO, strict=True):
        eta = rate / (1 + rate * x @ x)
        results.append(weight @ (np.eye(len(x)) - eta * np.outer(x, x)) - eta * np.outer(d, x))
    return np.mean(results, axis=0)


@pytest.mark.parametrize("samples", [1, 8])
def test_fifty_steps_are_the_means_of_one_sample_updates(samples: int) -> None:
    net, plain = Net().double(), Net().double()
    optimizer = watched(net, samples)
    for step in range(50):
        x, target = batch(step, samples)
        loss_of(net(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

        before = plain.up(x)
        hidden = torch.tanh(before)
        after = plain.down(hidden)
        before.retain_grad()
        after.retain_grad()
        loss_of(plain.mix * after, target).backward()
        assert before.grad is not None
        assert after.grad is not None
        assert plain.mix.grad is not None
        with torch.no_grad():
            for layer, inputs, grads in ((plain.up, x, before.grad), (plain.down, hidden, after.grad)):
                mean = one_sample_updates(layer.weight.numpy(), inputs.numpy(), samples * grads.numpy(), RATE)
                layer.weight.copy_(torch.from_numpy(mean))
            plain.mix.sub_(RATE * plain.mix.grad)
        plain.zero_grad()
        for name, parameter in plain.named_parameters():
            found = net.get_parameter(name).detach().numpy()
            np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=0, atol=1e-6, err_msg=f"{name} {step}")


def test_micro_batches_add_up_and_evaluation_is_left_alone() -> None:
    net, cut = Net().double(), Net().double()
    watched(net)
    watched(cut)
    x, target = batch(0)
    loss_of(net(x), target).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (loss_of(cut(x[half]), target[half]) / 2).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(cut.get_parameter(name).grad, parameter.grad, rtol=0, atol=1e-14)
    cut.eval()
    (grad,) = torch.autograd.grad(loss_of(cut(x), target), cut.up.weight)
    plain = Net().double()
    (expected,) = torch.autograd.grad(loss_of(plain(x), target), plain.up.weight)
    assert torch.equal(grad, expected)
    assert not torch.allclose(net.up.weight.grad, expected)  # type: ignore[arg-type]


def test_other_gradients_are_autograds() -> None:
    net, plain = Net().double(), Net().double()
    watched(net)
    x, target = batch(0)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss_of(net(mine), target).backward()
    loss_of(plain(theirs), target).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(net.mix.grad, plain.mix.grad, rtol=0, atol=1e-14)


def test_the_rate_is_that_of_the_levels_next_update() -> None:
    # Rates differ between steps (warm-up) and levels: with the wrong one the weights would differ at the first step.
    expected = cases.train("hope_attention", "float64", optimizer={"name": "dgd", "lr": 0.5})
    rates = [[level["lr"] for level in report["levels"].values()] for report in expected["reports"]]
    assert len({rate for step in rates for rate in step}) > 5
    config = cases.make_config("hope_attention", optimizer={"name": "dgd", "lr": 0.5})
    engine = cases.open_engine(config, "float64")
    source: Any = cases.RandomBatches(config)
    rule = engine.optimizer.rule
    assert isinstance(rule, MixedRule)
    for index in range(8):
        named = {f"level_{level}": f"blocks.1.cms.levels.{level}.up.weight" for level in range(3)}
        before = {part: rule.rate(name) for part, name in named.items()}
        _, report, _ = cases.optimizer_step(engine, source, config.train, index, measure=False)
        for part, rate in before.items():
            assert rate == report.sets[part].lr


@pytest.mark.parametrize("options", [{"recompute": True}, {"precision": "bf16"}], ids=str)
def test_it_trains_with_what_changes_the_forward_pass(options: dict[str, Any]) -> None:
    plain = cases.train("hope_attention", "float32", optimizer={"name": "dgd", "lr": 0.05})
    found = cases.train("hope_attention", "float32", optimizer={"name": "dgd", "lr": 0.05}, **options)
    exact = 1e-6 if "recompute" in options else 2e-2
    for mine, theirs in zip(found["reports"], plain["reports"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=exact)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2 * exact)
