"""The optimizer's state under the names of the unsharded model, split by shard set, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hope_train.errors import UserError
from hope_train.levels.schedule import CORE

PREFIX = "optimizer."
_OF_SET = ("period", "updates", "tokens")
_OF_RUN = ("steps", "skipped")

Groups = Sequence[dict[str, Any]]
State = Mapping[Tensor, Mapping[str, Tensor]]


def _scalars_of(set_name: str) -> tuple[str, ...]:
    """Which integers a set carries. The run's own are in the core alone: a level's files may be older than a step."""
    return _OF_SET + (_OF_RUN if set_name == CORE else ())


def export(groups: Groups, state: State) -> dict[str, dict[str, Tensor]]:
    """By set and name: the live state tensors, and the counters as new int64 scalars."""
    named: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        entries = named.setdefault(group["set"], {})
        for key in _scalars_of(group["set"]):
            entries[PREFIX + key] = torch.tensor(group[key], dtype=torch.int64)
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, tensor in state[parameter].items():
                entries[f"{PREFIX}{key}.{name}"] = tensor
    return named


def restore(groups: Groups, state: State, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy a saved state into the live one; everything is checked before anything is changed. Raises UserError."""
    live = export(groups, state)
    _same_names("the checkpoint's optimizer state has other sets", live, saved)
    for set_name, entries in live.items():
        _same_names(f"the checkpoint's optimizer state of {set_name} has other entries", entries, saved[set_name])
        for name, tensor in entries.items():
            if saved[set_name][name].shape != tensor.shape:
                raise UserError(
                    f"{name} has shape {list(saved[set_name][name].shape)} in the checkpoint and "
                    f"{list(tensor.shape)} in this model: use the configuration that the checkpoint was written with"
                )
        _same_period(set_name, int(entries[PREFIX + "period"]), int(saved[set_name][PREFIX + "period"]))
    for set_name, entries in live.items():
        for name, tensor in entries.items():
            if saved[set_name][name] is not tensor:
                tensor.copy_(saved[set_name][name])
    for group in groups:
        for key in _OF_SET + _OF_RUN:
            owner = CORE if key in _OF_RUN else group["set"]
            group[key] = int(saved[owner][PREFIX + key])


def check_groups(groups: Groups, saved: Groups) -> None:
    """Refuse a state_dict whose sets, parameters or periods are others. Raises UserError."""
    what = "the saved optimizer state has other parameters"
    mine = {name: group for group in groups for name in group["param_names"]}
    theirs = {name: group for group in saved for name in group.get("param_names", ())}
    _same_names(what, mine, theirs)
    # torch pairs saved and live entries by position, so the order counts as well.
    if list(mine) != list(theirs) or [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
        raise UserError(f"{what}: the same names in another order; use the model that it was written with")
    for name, group in mine.items():
        _same_period(group["set"], group["period"], theirs[name]["period"])


def _same_names(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    missing, unknown = [name for name in mine if name not in theirs], [name for name in theirs if name not in mine]
    if missing or unknown:
        detail = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not this model's"
        raise UserError(f"{what}: {detail}; use the configuration that the checkpoint was written with")


def _same_period(set_name: str, mine: int, theirs: int) -> None:
    if mine != theirs:
        raise UserError(
            f"{set_name} has period {theirs} in the checkpoint and {mine} in the configuration: "
            "a period cannot change in a run; restore it, or start a new run from the weights"
        )
