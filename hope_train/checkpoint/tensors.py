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
from torch.distributed.tensor import DTensor

from hope_train.checkpoint.sets import CORE, Contents, accumulator_set, contents
from hope_train.errors import UserError
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.levels.schedule import canonical_name, level_of, set_name
from hope_train.parallel.fragments import Fragment

State = dict[str, dict[str, Tensor]]
"""By shard set and name: parameters under the unsharded model's names, the optimizer's state as `optimizer.…`."""

OPTIMIZER = "optimizer."
UPDATES, TOKENS = "optimizer.updates", "optimizer.tokens"
_COLLECTED = ("optimizer.accumulator.", TOKENS)

# One process without a group is a normal case here, and the library remarks on it at every call.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def model_state(model: nn.Module) -> State:
    """The model's live tensors by shard set, under the unsharded model's names."""
    return by_set(model.state_dict())


def by_set(tensors: Mapping[str, Tensor]) -> State:
    """A model's tensors by shard set."""
    state: State = {}
    for name, tensor in tensors.items():
        plain = canonical_name(name)
        state.setdefault(set_name(level_of(plain)), {})[plain] = tensor.detach()
    return state


def training_state(model: nn.Module, optimizer: LevelOptimizer) -> State:
    """`model_state` and the optimizer's state together: all tensors that a resume needs. Live, not copied."""
    return with_optimizer(model_state(model), optimizer)


def with_optimizer(state: State, optimizer: LevelOptimizer) -> State:
    """Tensors of a model together with its optimizer's."""
    for name, entries in optimizer.named_state().items():
        state.setdefault(name, {}).update(entries)
    return state


def split_accumulators(state: State) -> State:
    """The same tensors by the sets that are written: what a level collects (`level_1_accumulator`) apart from the
    rest of it. The core keeps its own.
    """
    parts: State = {}
    for name, tensors in state.items():
        collected = {key: tensor for key, tensor in tensors.items() if name != CORE and key.startswith(_COLLECTED)}
        parts[name] = {key: tensor for key, tensor in tensors.items() if key not in collected}
        if collected:
            parts[accumulator_set(name)] = collected
    return parts


def contents_of(state: State) -> Contents:
    """Which sets a checkpoint of this state consists of, with their updates: see `sets.contents`."""
    return contents(
        {name: counter(part, UPDATES) for name, part in state.items()},
        {name: counter(part, TOKENS) or 0 for name, part in state.items()},
    )


def counter(part: Mapping[str, Tensor], name: str) -> int | None:
    """An integer of a set; None where it has none."""
    if name not in part:
        return None
    # Counters are the same on every rank, so no rank asks another.
    value = part[name]
    return int(value.to_local() if isinstance(value, DTensor) else value)


class Staging:
    """Host memory that a state is copied into, so that it can be written while training goes on.

    It is allocated once and used for every save: filling fresh memory takes several times as long as filling memory
    that the process has touched before. Page-locked where the state is on a GPU.
    """

    def __init__(self) -> None:
        """Holds nothing until the first copy."""
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, parts: State) -> State:
        """A copy of these sets, which later steps do not touch. It is good until the next call."""
        copied = {
            name: {key: self._copy(name, key, tensor) for key, tensor in part.items()} for name, part in parts.items()
        }
        if any(tensor.is_cuda for part in parts.values() for tensor in part.values()):
            torch.cuda.synchronize()
        return copied

    def _copy(self, name: str, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get((name, key))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # `to` copies a DTensor as well, with its placement; what is kept of it is its local part.
            buffer = tensor.detach().to("cpu", copy=True)
            if tensor.is_cuda and buffer.numel():
                buffer = _pinned(buffer)
            self._buffers[name, key] = buffer
            return buffer
        _local(buffer).copy_(_local(tensor.detach()), non_blocking=True)
        return buffer


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor | Fragment) else tensor


def _pinned(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor | Fragment):
        if tensor._local_tensor.numel():
            tensor._local_tensor = tensor._local_tensor.pin_memory()
        return tensor
    return tensor.pin_memory()


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
