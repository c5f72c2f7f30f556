"""One shard set on disk, by torch.distributed.checkpoint; with or without an initialised process group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from hope_train.errors import UserError
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.schedule import canonical_name, level_of, set_name

State = dict[str, dict[str, Tensor]]
"""By shard set and name: parameters under the unsharded model's names, the optimizer's state as `optimizer.…`."""

OPTIMIZER = "optimizer."

# One process without a group is a normal case here, and the library remarks on it at every call.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def model_state(model: nn.Module) -> State:
    """The model's live tensors by shard set, under the unsharded model's names."""
    state: State = {}
    for name, tensor in model.state_dict().items():
        plain = canonical_name(name)
        state.setdefault(set_name(level_of(plain)), {})[plain] = tensor.detach()
    return state


def training_state(model: nn.Module, optimizer: LevelOptimizer) -> State:
    """`model_state` and the optimizer's state together: all tensors that a resume needs. Live, not copied."""
    state = model_state(model)
    for name, entries in optimizer.named_state().items():
        state.setdefault(name, {}).update(entries)
    return state


def snapshot(state: State) -> State:
    """A copy in host memory, which later steps do not touch."""
    copied: State = BlockingAsyncStager(cache_staged_state_dict=False).stage(dict(state))
    return copied


def save_set(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write a set into `folder` and flush its files. Collective over `group`. Raises dcp's CheckpointException."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not distributed())


def load_set(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Read a set into these tensors, in place. Entries of the set that are not asked for are left where they are."""
    wanted = {name: tensor.detach() for name, tensor in tensors.items()}
    reader = dcp.FileSystemReader(folder)
    with torch.no_grad():
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=not distributed())


def entries(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of everything in a set. Raises UserError if the library cannot read its own index."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # the index is a pickle: anything may come out of a file of another version
        raise UserError(f"{folder} is not a set of torch.distributed.checkpoint: {error}") from None
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()
