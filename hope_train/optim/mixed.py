"""One optimizer of several rules: each kind of parameter is stepped by its own, in one state and one list of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hope_train.config.train import OptimizerConfig
from hope_train.optim.adamw import AdamWRule
from hope_train.optim.deep_momentum import DeepMomentum
from hope_train.optim.delta_momentum import DeltaMomentum
from hope_train.optim.dgd import DeltaLayer, SumRanks
from hope_train.optim.kinds import kind_of, rule_of
from hope_train.optim.m3 import M3
from hope_train.optim.matrices import MatrixOptimizer
from hope_train.optim.muon import Muon
from hope_train.optim.sgd import SGD, fresh_sgd, momentum_of
from hope_train.optim.wholes import Wholes

Groups = Sequence[dict[str, Any]]

MATRIX_RULES: dict[str, type[MatrixOptimizer]] = {
    "muon": Muon,
    "m3": M3,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
}

PER_PARAMETER = ("params", "param_names", "places")
"""Lists in a group that have an entry per parameter."""


class MixedOptimizer(torch.optim.Optimizer):
    """Optimizers side by side. State and groups are theirs and this one's at once."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[first:last]
            first = last

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` ends with: new groups and a new state, which the parts must learn of."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient, each by its rule, at `lr` times `lr_scale` of its group."""
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * group["lr_scale"]
            for part in self.parts:
                part.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class MixedRule:
    """Matrices by `optimizer.name`; vectors, embeddings and memory states each by the rule configured for them."""

    def __init__(self, config: OptimizerConfig, wholes: Wholes | None = None) -> None:
        """
        Args:
            wholes: how whole matrices are got at. None: they are whole here.
        """
        self.config, self.wholes = config, wholes or Wholes()
        self.adamw = AdamWRule(config)
        self._built: MixedOptimizer | None = None

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """See UpdateRule. Groups are divided by rule, which they get as `rule`."""
        by_rule: dict[str, list[dict[str, Any]]] = {}
        for group in groups:
            for part in self._divided(group):
                by_rule.setdefault(part["rule"], []).append(part)
        self._built = MixedOptimizer([self._optimizer(rule, members) for rule, members in by_rule.items()])
        return self._built

    def _divided(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """By rule and by kind; of an empty group one is left, as it carries its set's counters."""
        kinds = [kind_of(name, p.ndim) for name, p in zip(group["param_names"], group["params"], strict=True)]
        divided = []
        for kind in dict.fromkeys(kinds or ["vectors"]):
            keep = [number for number, other in enumerate(kinds) if other == kind]
            part = {**group, **{key: [group[key][number] for number in keep] for key in PER_PARAMETER if key in group}}
            scale = self.config.matrix_lr_scale if kind == "matrices" else 1.0
            divided.append({**part, "rule": rule_of(self.config, kind), "lr_scale": scale})  # type: ignore[arg-type]
        return divided

    def _optimizer(self, rule: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if rule == "adamw":
            return self.adamw.build(groups)
        decays = [self.config.weight_decay if group["decay"] else 0.0 for group in groups]
        if rule in MATRIX_RULES:
            decayed = [{**group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)]
            return MATRIX_RULES[rule](decayed, self.config, self.wholes)
        decayed = [{**group, "decoupled": decay} for group, decay in zip(groups, decays, strict=True)]
        return SGD(decayed, momentum_of(self.config, rule), rule == "sgd" and self.config.sgd.nesterov)

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """See UpdateRule; `group` is one of those that `build` made."""
        rule = group["rule"]
        if rule == "adamw":
            return self.adamw.initial_state(parameter, group)
        if rule in MATRIX_RULES:
            return MATRIX_RULES[rule].fresh(self.config, parameter, self.wholes)
        return fresh_sgd(parameter, momentum_of(self.config, rule))

    # Delta gradient descent

    def rate(self, name: str) -> float:
        """Of the next update of the parameter `name`."""
        assert self._built is not None
        for group in self._built.param_groups:
            if name in group["param_names"]:
                return float(group["lr"] * group["lr_scale"])
        raise KeyError(name)

    def watch(
        self,
        model: nn.Module,
        positions: Callable[[], int],
        over_ranks: Callable[[str], SumRanks | None] = lambda name: None,
    ) -> None:
        """With delta gradient descent: make the gradients of linear layers its own, see `optim.dgd`. Once per model.

        Args:
            model: its modules have the names of the unsharded model.
            positions: tokens of the step under way, over all micro-batches and ranks.
            over_ranks: by name of a module, see `DeltaLayer`.
        """
        if self.config.name != "dgd":
            return
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and kind_of(f"{name}.weight", 2) == "matrices":
                rate = _rate_of(self, f"{name}.weight")
                # Before the exchanges of other hooks: the output is this layer's own.
                module.register_forward_hook(DeltaLayer(rate, positions, over_ranks(name)), prepend=True)


def _rate_of(rule: MixedRule, name: str) -> Callable[[], float]:
    return lambda: rule.rate(name)
