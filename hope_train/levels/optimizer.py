"""The level optimizer: every set of parameters steps at its own period, by whatever rule it is given.

Nested Learning (arXiv 2512.24695), Eqs. 70-74 over optimizer steps: a set of period P accumulates its gradient over P
steps, weighted by each step's number of tokens, and then takes one step of the rule with the mean over the period's
tokens. Sets of period 1 have no accumulator: with period 1 everywhere this is the plain rule, bit for bit.

All that a resume needs is in `state` (moments, accumulators, initial states) and `param_groups` (counters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope_train.levels import named_state
from hope_train.levels.ranks import Ranks
from hope_train.levels.report import ClipReport, SetReport, StepReport
from hope_train.levels.resting import Resting
from hope_train.levels.schedule import CORE, LevelPlan, SetPlan, canonical_name, level_of, set_name
from hope_train.optim.decay import is_decayed
from hope_train.optim.rule import UpdateRule

ACCUMULATOR = "accumulator"
"""Key in `state[parameter]`: the sum of tokens times gradient in this period; fp32, or the parameter's wider type."""

ANCHOR = "anchor"
"""Key in `state[parameter]` (nested variant): the level's initial state."""

COUNTERS = ("steps", "skipped", "updates", "tokens")
"""Integers in every parameter group: steps applied and refused (all groups alike), updates of the group's set, and
tokens in its accumulators."""


@dataclass(frozen=True)
class _Member:
    """A trainable parameter with its place."""

    name: str
    parameter: Tensor
    group: dict[str, Any]


class LevelOptimizer(torch.optim.Optimizer):
    """Wraps an update rule (a torch optimizer) and decides which parameters it sees at each step.

    Usage: forward, backward (of the MEAN loss over the step's scored tokens), `step(tokens=n)`, `zero_grad()`.
    Gradients live in `.grad` for one step only; what a period collects lives in the state, so that `zero_grad` (the
    model's as well) never loses anything.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        plan: LevelPlan,
        rule: UpdateRule,
        clip_norm: float | None = 1.0,
        ranks: Ranks | None = None,
        rest_from_period: int | None = None,
    ) -> None:
        """Parameters that do not require a gradient are left out; names are those of the unsharded model.

        clip_norm: largest L2 norm of each group of equal period; None: no clipping. rest_from_period: what the rule
        keeps of sets with this period or a longer one is in host memory between their updates; None: of none.

        Raises ValueError when the levels in the names are not the levels of the plan, or nothing is trainable.
        """
        self.plan, self.rule, self.clip_norm, self.ranks = plan, rule, clip_norm, ranks or Ranks()
        self.rest_from_period = rest_from_period
        named = [(canonical_name(name), parameter) for name, parameter in named_parameters]
        found = {CORE} | {set_name(level_of(name)) for name, _ in named}
        planned = {part.name for part in plan.sets}
        if found != planned:
            raise ValueError(f"the plan has the sets {sorted(planned)}, the model has {sorted(found)}")
        trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        super().__init__([parameter for _, parameter in trainable], {})
        self.optimizer = rule.build(
            [self._group(part, decay, trainable) for part in plan.sets for decay in (True, False)]
        )
        self._share()

    def _group(self, part: SetPlan, decay: bool, named: list[tuple[str, Tensor]]) -> dict[str, Any]:
        """A parameter group of a set; made even when empty, since it carries the set's counters."""
        chosen = [
            (place, name, parameter)
            for place, (name, parameter) in enumerate(named)
            if set_name(level_of(name)) == part.name and is_decayed(name, self.ranks.dimensions(parameter)) == decay
        ]
        return {
            "params": [parameter for _, _, parameter in chosen],
            "param_names": [name for _, name, _ in chosen],
            "places": [place for place, _, _ in chosen],
            "set": part.name,
            "period": part.period,
            "decay": decay,
            **dict.fromkeys(COUNTERS, 0),
        }

    def _share(self) -> None:
        """Make the rule's state and groups ours: one state dict holds both, and neither can get out of step."""
        self.state, self.param_groups = self.optimizer.state, self.optimizer.param_groups
        self.defaults = self.optimizer.defaults
        self._resting = Resting(self.state, (ACCUMULATOR, ANCHOR))
        members = [
            (place, _Member(name, parameter, group))
            for group in self.param_groups
            for place, name, parameter in zip(group["places"], group["param_names"], group["params"], strict=True)
        ]
        # In the model's order, whatever the groups: the rounding of a norm depends on it.
        self._members = [member for _, member in sorted(members, key=lambda pair: pair[0])]
        self._slow = [member for member in self._members if member.group["period"] > 1]
        self._sets = {
            part.name: [member for member in self._members if member.group["set"] == part.name]
            for part in self.plan.sets
        }
        self._set_rates()

    def _set_rates(self) -> None:
        """`lr` of a group is the rate of its next update, also while its gradients are made and collected."""
        for group in self.param_groups:
            group["lr"] = self.plan.lr(self._plan_of(group["set"]), group["updates"] + 1)

    # Reading

    @property
    def steps(self) -> int:
        """Steps applied so far. The next step is number steps + 1."""
        return int(self.param_groups[0]["steps"])

    @property
    def skipped(self) -> int:
        """Steps refused so far. The batches consumed are steps + skipped."""
        return int(self.param_groups[0]["skipped"])

    def updates(self, name: str) -> int:
        """Updates that the set `name` has taken."""
        return int(next(group["updates"] for group in self.param_groups if group["set"] == name))

    def due_sets(self) -> tuple[str, ...]:
        """The sets that will update at the next applied step: known before its backward."""
        return self.plan.due_sets(self.steps + 1)

    # Finite or not

    def _grad_norms(self) -> dict[str, float]:
        """Norm of this step's gradient by set."""
        parameters = [[member.parameter for member in members] for members in self._sets.values()]
        return dict(zip(self._sets, _floats(self._norms_of_grads(parameters, self.ranks.gradient)), strict=True))

    def _norms_of_grads(self, groups: list[list[Tensor]], gradient: Callable[[Tensor], Tensor | None]) -> list[Tensor]:
        found = [[(p, grad) for p in group if (grad := gradient(p)) is not None] for group in groups]
        return self.ranks.norms([[g for _, g in pairs] for pairs in found], [[p for p, _ in pairs] for pairs in found])

    # Stepping

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        tokens: int,
        loss: float | Tensor | None = None,
        finite: bool | None = None,
        measure: bool = False,
    ) -> StepReport:
        """Take one step with the gradients in `.grad`, which are means over `tokens` scored tokens.

        loss: the step's loss, checked for being finite besides the gradients. finite: the decision, where the caller
        has already made it together with all ranks; None: decide here. measure: fill in the ratios of the report,
        which costs a copy of the weights that are due.

        A step whose loss or gradients are not finite, or that scored no token (its mean is 0/0), is not applied to any
        set and nothing is accumulated: only `skipped` counts it, and the next batch takes its place in every period.

        Raises ValueError for a closure or a negative number of tokens.
        """
        if closure is not None:
            raise ValueError("LevelOptimizer takes no closure: run backward first")
        if tokens < 0:
            raise ValueError(f"tokens={tokens}: the number of scored tokens cannot be negative")
        self.materialize_state()
        norms = self._grad_norms()
        if finite is None:
            finite = all(map(math.isfinite, norms.values())) and (loss is None or _is_finite(loss))
            finite = self.ranks.all_agree(finite and tokens > 0)
        if not finite or tokens == 0:
            self._count("skipped", lambda group: True)
            return self._report(self.steps + 1, norms, applied=False)
        number = self.steps + 1
        due = self.plan.due_sets(number)
        self._accumulate(tokens)
        clips, ratios = self._update(due, measure)
        resets = self._reset(self.plan.reset_sets(number), measure)
        self.ranks.changed(due)  # what is reset has been due
        self._count("steps", lambda group: True)
        self._count("updates", lambda group: group["set"] in due)
        self._set_rates()
        return self._report(number, norms, applied=True, clips=clips, ratios=ratios, resets=resets)

    def _count(self, counter: str, which: Callable[[dict[str, Any]], bool]) -> None:
        for group in self.param_groups:
            if which(group):
                group[counter] += 1

    def _accumulate(self, tokens: int) -> None:
        """Add tokens times gradient for all slow sets; a parameter without a gradient adds zero."""
        for member in self._slow:
            if (grad := self.ranks.gradient(member.parameter)) is not None:
                self.state[member.parameter][ACCUMULATOR].add_(grad, alpha=tokens)
        for group in self.param_groups:
            if group["period"] > 1:
                group["tokens"] += tokens

    def _update(self, due: tuple[str, ...], measure: bool) -> tuple[dict[int, ClipReport], dict[str, float | None]]:
        """Let the rule step the sets that are due, with their period's mean gradient, clipped."""
        stepping = [member for member in self._members if member.group["set"] in due]
        own_grads = [member.parameter.grad for member in self._slow]
        try:
            for member in self._slow:
                member.parameter.grad = None
            for name in due:
                self._close_period(name)
            clips = self._clip(stepping)
            before = self._weights(due) if measure else None
            self._resting.step(
                self.optimizer,
                awake=[member.parameter for member in stepping if not self._rests(member)],
                resting=[member.parameter for member in stepping if self._rests(member)],
            )
        finally:
            # The caller's gradients come back: an accumulator left in `.grad` would be added to by the next backward.
            for member, grad in zip(self._slow, own_grads, strict=True):
                member.parameter.grad = grad
        for member in stepping:
            if ACCUMULATOR in self.state[member.parameter]:
                self.state[member.parameter][ACCUMULATOR].zero_()
        for group in self.param_groups:
            if group["set"] in due:
                group["tokens"] = 0
        return clips, self._ratios(due, before) if before is not None else {}

    def _rests(self, member: _Member) -> bool:
        return self.rest_from_period is not None and member.group["period"] >= self.rest_from_period

    def _close_period(self, name: str) -> None:
        """Turn a slow set's accumulators into means and hand them to the rule as gradients."""
        members = [member for member in self._sets[name] if member.group["period"] > 1]
        if not members:
            return
        accumulators = [self.state[member.parameter][ACCUMULATOR] for member in members]
        for member, total in zip(members, self.ranks.close_period(name, accumulators), strict=True):
            mean = total.div_(member.group["tokens"])
            member.parameter.grad = mean.to(member.parameter.dtype)

    def fold(self) -> None:
        """Sum over the ranks what unfinished periods have collected: every rank then holds the whole, as a checkpoint
        needs it. To be followed by `unfold` before the next step. One process has nothing to sum."""
        for name, accumulators in self._unfinished():
            self.ranks.reduce_accumulators(name, accumulators)

    def unfold(self) -> None:
        """After `fold`, or after loading a checkpoint: leave the sums to one of the ranks that collect."""
        for _, accumulators in self._unfinished():
            self.ranks.keep_one_sum(accumulators)

    def unfinished_sets(self) -> tuple[str, ...]:
        """The slow sets that have collected something of a period."""
        return tuple(name for name, _ in self._unfinished())

    def _unfinished(self) -> Iterator[tuple[str, list[Tensor]]]:
        for name, members in self._sets.items():
            if members and members[0].group["period"] > 1 and members[0].group["tokens"] > 0:
                yield name, [self.state[member.parameter][ACCUMULATOR] for member in members]

    def _clip(self, stepping: list[_Member]) -> dict[int, ClipReport]:
        """One norm and one clip per group of equal period, on the gradients about to be applied."""
        periods = sorted({member.group["period"] for member in stepping})
        groups = [[m.parameter for m in stepping if m.group["period"] == period] for period in periods]
        norms = self._norms_of_grads(groups, lambda parameter: parameter.grad)
        if self.clip_norm is not None:
            for group, norm in zip(groups, norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(group, self.clip_norm, norm)
        limit = math.inf if self.clip_norm is None else self.clip_norm
        return {
            period: ClipReport(norm, min(1.0, limit / (norm + 1e-6)))
            for period, norm in zip(periods, _floats(norms), strict=True)
        }

    def _weights(self, names: tuple[str, ...]) -> dict[str, list[Tensor]]:
        return {name: [member.parameter.detach().clone() for member in self._sets[name]] for name in names}

    def _ratios(self, names: tuple[str, ...], before: Mapping[str, list[Tensor]]) -> dict[str, float | None]:
        """|change| / |weights before| by set; uses up `before`."""
        owners = [[member.parameter for member in self._sets[name]] for name in names]
        sizes = self.ranks.norms([before[name] for name in names], owners)
        for name in names:
            for old, member in zip(before[name], self._sets[name], strict=True):
                old.sub_(member.parameter)
        changes = self.ranks.norms([before[name] for name in names], owners)
        pairs = zip(_floats(changes), _floats(sizes), strict=True)
        return {name: change / size if size > 0 else None for name, (change, size) in zip(names, pairs, strict=True)}

    def _reset(self, names: tuple[str, ...], measure: bool) -> dict[str, float | None]:
        """Nested variant: move each level's initial state part of the way to its weights, then return to it."""
        rate = self.plan.nested_rate
        if not names or rate is None:
            return {}
        moves: list[list[Tensor]] = []
        sizes: list[Tensor] = []
        owners: list[list[Tensor]] = []
        for name in names:
            anchors = [self.state[member.parameter][ANCHOR] for member in self._sets[name]]
            old = [anchor.clone() for anchor in anchors] if measure else []
            for member, anchor in zip(self._sets[name], anchors, strict=True):
                anchor.lerp_(member.parameter, rate)
                member.parameter.copy_(anchor)
            if measure:
                owners.append([member.parameter for member in self._sets[name]])
                sizes += self.ranks.norms([old], owners[-1:])
                moves.append([before.sub_(anchor) for before, anchor in zip(old, anchors, strict=True)])
        if not measure:
            return {}
        pairs = zip(_floats(self.ranks.norms(moves, owners)), _floats(sizes), strict=True)
        return {name: move / size if size > 0 else None for name, (move, size) in zip(names, pairs, strict=True)}

    def _plan_of(self, name: str) -> SetPlan:
        return next(part for part in self.plan.sets if part.name == name)

    def _report(
        self,
        number: int,
        norms: dict[str, float],
        applied: bool,
        clips: dict[int, ClipReport] | None = None,
        ratios: Mapping[str, float | None] | None = None,
        resets: Mapping[str, float | None] | None = None,
    ) -> StepReport:
        due = self.plan.due_sets(number)
        sets = {}
        for part in self.plan.sets:
            updates, is_due = self.updates(part.name), part.name in due
            sets[part.name] = SetReport(
                period=part.period,
                due=is_due,
                updates=updates,
                lr=self.plan.lr(part, updates if applied and is_due else updates + 1),
                grad_norm=norms[part.name] if part.period == 1 or self.ranks.slow_gradients_are_whole else None,
                update_ratio=(ratios or {}).get(part.name),
                reset_ratio=(resets or {}).get(part.name),
            )
        return StepReport(
            step=self.steps,
            applied=applied,
            skipped=self.skipped,
            lr=sets[CORE].lr,
            grad_norm=math.hypot(*(norms[part.name] for part in self.plan.sets if part.period == 1 or not applied)),
            sets=sets,
            clips=clips or {},
        )

    # State

    @torch.no_grad()
    def materialize_state(self) -> None:
        """Create what is still missing of the state: the rule's own, accumulators, and (nested) the initial states,
        which are the weights of this moment. Changes nothing that exists, nor any later step. Called by the first step;
        call it earlier, after the weights are loaded, to read a checkpoint into the state in place.
        """
        anchored = self.plan.anchored_sets()
        for member in self._members:
            parameter, group, state = member.parameter, member.group, self.state[member.parameter]
            if not state:
                state.update(self.rule.initial_state(parameter, group))
                if self._rests(member):
                    self._resting.settle(parameter)
            if group["period"] > 1 and ACCUMULATOR not in state:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                like = self.ranks.collects(parameter)
                state[ACCUMULATOR] = torch.zeros_like(like, dtype=wide, memory_format=torch.preserve_format)
            if group["set"] in anchored and ANCHOR not in state:
                state[ANCHOR] = parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """torch's, complete from the beginning. As there, the tensors are the live ones: copy them to keep them."""
        self.materialize_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything. Raises UserError when it was written with other parameters, levels or periods."""
        named_state.check_groups(self.param_groups, state_dict["param_groups"])
        self.optimizer.load_state_dict(state_dict)
        self._share()
        saved = [state_dict["state"][index] for group in state_dict["param_groups"] for index in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, entries in zip(mine, saved, strict=True):
            # torch casts floating state to the parameter's type, which rounds an fp32 accumulator of bf16 weights.
            if ACCUMULATOR in entries:
                self.state[parameter][ACCUMULATOR] = entries[ACCUMULATOR].to(parameter.device, copy=True)
        for member in filter(self._rests, self._members):
            self._resting.settle(member.parameter)

    def named_state(self) -> dict[str, dict[str, Tensor]]:
        """The whole state by shard set (`core`, `level_<l>`) and name, for a checkpoint.

        `optimizer.<key>.<parameter>` (`optimizer.exp_avg.blocks.0.cms.levels.1.up.weight`, `optimizer.accumulator.…`)
        are the live tensors, not copies. The counters `optimizer.updates`, `optimizer.tokens`, `optimizer.period` of
        each set, and `optimizer.steps` and `optimizer.skipped` in `core`, are new int64 scalars: after reading a
        checkpoint into these tensors in place, hand them to `load_named_state`.
        """
        self.materialize_state()
        return named_state.export(self.param_groups, self.state)

    @torch.no_grad()
    def load_named_state(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `named_state` gave, from the same tensors loaded in place or from others.

        Raises UserError, before anything changes, when sets, names, shapes or periods are not this model's.
        """
        self.materialize_state()
        named_state.restore(self.param_groups, self.state, saved)
        self._set_rates()


def _is_finite(loss: float | Tensor) -> bool:
    return math.isfinite(loss.detach().item() if isinstance(loss, Tensor) else loss)


def _floats(scalars: list[Tensor]) -> list[float]:
    """Scalars as numbers, with one transfer from the device."""
    if not scalars:
        return []
    device = scalars[0].device
    return torch.stack([scalar.to(device, torch.float64) for scalar in scalars]).tolist()
