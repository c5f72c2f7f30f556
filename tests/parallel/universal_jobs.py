"""A plain DeepSpeed engine, torch's AdamW in it, that goes on from a universal checkpoint and leaves one of its own."""

from __future__ import annotations

import errno
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from hope_train.config.mesh import MeshSizes
from hope_train.config.tree import RunConfig
from hope_train.model.hope import HopeModel, build_model
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.plan import split_of_parameter
from hope_train.parallel.zero.engine import open_deepspeed
from tests.parallel import jobs

Held = dict[str, dict[str, torch.Tensor]]


def go_on(folder: str, stage: int, steps: int, groups: bool, save: str | None = None) -> dict[str, Any]:
    """Load `folder` into an engine of other weights and take `steps` steps.

    groups: the optimizer has the parameter groups of the file; else a single one. save: where DeepSpeed saves then, and
    its converter makes that universal (`<save>/universal`).

    Returns what is in the engine after loading and at the end, and what DeepSpeed knows of steps.
    """
    deepspeed = open_deepspeed(Mesh(MeshSizes(), torch.device("cpu")))
    place = Path(folder)
    config = RunConfig.model_validate(json.loads((place / "hope_train" / "manifest.json").read_text())["config"])
    model = build_model(config.model, 99)
    named = dict(model.named_parameters())
    saved = torch.load(place / "zero" / "optimizer_state.pt", weights_only=True)["param_groups"]
    chosen = [{"params": [named[name] for name in group["param_names"]]} for group in saved]
    optimizer = torch.optim.AdamW(chosen if groups else list(named.values()), lr=1.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "checkpoint": {"load_universal": True},
        },
        dist_init_required=False,
    )
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    loaded = held(model)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        tokens_BT = torch.randint(config.model.vocab_size, (1, 33))
        logits_BTV = engine(tokens_BT[:, :-1])
        engine.backward(cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()))
        engine.step()
    found = {"loaded": loaded, "final": held(model), "client": client["hope_train"], "rates": rates}
    found["global_steps"] = engine.global_steps
    if save is not None:
        engine.save_checkpoint(save, tag="own")
        if dist.get_rank() == 0:
            convert(Path(save) / "own", Path(save) / "universal")
        dist.barrier()
    engine.destroy()
    return found


def whole_state(model: HopeModel, key: str) -> dict[str, torch.Tensor]:
    """An entry of the optimizer's state for every parameter, by DeepSpeed's own function."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return {name: safe_get_full_optimizer_state(each, key).clone() for name, each in model.named_parameters()}


def held(model: HopeModel) -> Held:
    """Whole fp32 weights and moments, by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param

    first, second = whole_state(model, "exp_avg"), whole_state(model, "exp_avg_sq")
    return {
        name: {
            "fp32": safe_get_full_fp32_param(parameter).clone(),
            "exp_avg": first[name],
            "exp_avg_sq": second[name],
        }
        for name, parameter in model.named_parameters()
    }


def tensor_parallel_parts(folder: str, parts: int) -> dict[str, list[list[torch.Tensor]]]:
    """What DeepSpeed's loader gives each tensor-parallel rank of every weight and of its first moment, flat."""
    from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
    from deepspeed.utils.tensor_fragment import fragment_address

    found = {}
    for place in sorted((Path(folder) / "zero").glob("*/")):
        whole = torch.load(place / "fp32.pt", weights_only=True)["param"]
        dim = split_of_parameter(place.name).dim
        weights, moments = [], []
        for rank in range(parts):
            part = torch.empty_like(whole if dim is None else whole.chunk(parts, dim)[rank]).contiguous()
            mapping = Mapping(part.flatten(), fragment_address(numel=part.numel(), start=0))
            part._hp_mapping = mapping  # type: ignore[attr-defined]
            load_hp_checkpoint_state(part, str(place), rank, parts)
            weights.append(mapping.weights)
            moments.append(mapping.optim_fragment["exp_avg"])
        found[place.name] = [weights, moments]
    return found


@dataclass
class Mapping:
    """Of a parameter that lies in one piece on its rank, as the loader sees it."""

    weights: torch.Tensor
    lp_fragment_address: Any
    optim_fragment: dict[str, torch.Tensor] = field(default_factory=dict)

    def get_hp_fragment(self) -> torch.Tensor:
        """Where the weights go."""
        return self.weights


def script_weights(folder: str) -> dict[str, torch.Tensor]:
    """What the script `zero_to_fp32.py`, which DeepSpeed puts beside its saves, makes of the newest."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(folder))


def run_on_a_full_disk(config: str, overrides: list[str], rank: int, what: str, step: int) -> Any:
    """`hope train` in which one rank cannot write what DeepSpeed saves at a step.

    what: `save` (its own file), or `copyfile` (the scripts that DeepSpeed puts beside them, rank 0 alone).
    """
    from deepspeed.runtime import engine
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    owner = {"save": TorchCheckpointEngine, "copyfile": engine}[what]
    plain = getattr(owner, what)

    def full(*arguments: Any, **named: Any) -> Any:
        place = next(str(each) for each in (*named.values(), *arguments[::-1]) if isinstance(each, str | Path))
        if dist.get_rank() == rank and f"step_{step:08d}.tmp-" in place:
            raise OSError(errno.ENOSPC, "No space left on device", place)
        return plain(*arguments, **named)

    setattr(owner, what, full)
    try:
        return jobs.train_run(config, overrides)
    finally:
        setattr(owner, what, plain)


def convert(source: Path | str, target: Path | str) -> None:
    """`ds_to_universal.py --inject_missing_state`, in this process."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def go_on_from_own(folder: str, checkpoint: str, stage: int) -> dict[str, Any]:
    """Load the newest of DeepSpeed's own saves in `folder` into a plain engine of other weights, and take a step.

    checkpoint: of the same run, which says what the model is.

    Returns what is in the engine after loading, what levels have collected, and what DeepSpeed hands its client.
    """
    deepspeed = open_deepspeed(Mesh(MeshSizes(), torch.device("cpu")))
    config = RunConfig.model_validate(json.loads((Path(checkpoint) / "manifest.json").read_text())["config"])
    model = build_model(config.model, 99)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
        dist_init_required=False,
    )
    path, client = engine.load_checkpoint(folder)
    found = {"path": path, "client": client["hope_train"], "global_steps": engine.global_steps}
    if stage < 3:  # what `safe_get_full_optimizer_state` reads is linked by DeepSpeed in its first step alone
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found["loaded"], found["collected"] = held(model), whole_state(model, "accumulator")
    tokens_BT = torch.randint(config.model.vocab_size, (1, 33))
    engine.backward(cross_entropy(engine(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten()))
    engine.step()
    found["final"] = held(model)
    engine.destroy()
    return found
