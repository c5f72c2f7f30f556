"""A plain DeepSpeed engine, torch's AdamW in it, that goes on from a universal checkpoint and leaves one of its own."""

from __future__ import annotations

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


def held(model: HopeModel) -> Held:
    """Whole fp32 weights and moments, by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return {
        name: {
            "fp32": safe_get_full_fp32_param(parameter).clone(),
            **{key: safe_get_full_optimizer_state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")},
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


def convert(source: Path, target: Path) -> None:
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
