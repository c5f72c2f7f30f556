"""megatron-core's indexed data sets, through its own code: <prefix>.bin holds token ids, <prefix>.idx where they lie.

Importing it takes seconds and torch, so that happens inside the functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hope_train.errors import UserError

_HEADER = b"MMIDIDX\x00\x00"


def _module() -> Any:
    """megatron.core.datasets.indexed_dataset, without its complaints about what else could be installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def indexed_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron keeps ids of such a vocabulary in: uint16, or int32 from 65500 pieces on."""
    return np.dtype(_module().DType.optimal_dtype(vocab_size))


class IndexedWriter:
    """Writes one <prefix>.bin and .idx, document after document."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        module = _module()
        self.prefix = prefix
        self._idx = module.get_idx_path(str(prefix))
        self._dtype = dtype
        self._builder = module.IndexedDatasetBuilder(module.get_bin_path(str(prefix)), dtype=dtype.type)

    def add(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Append a document of one sequence."""
        self._builder.add_document(np.asarray(token_ids, self._dtype), [len(token_ids)])

    def close(self) -> None:
        """Write the index."""
        self._builder.finalize(self._idx)

    def abandon(self) -> None:
        """Close the files without an index."""
        self._builder.data_file.close()


@dataclass(frozen=True)
class IndexedFile:
    """One .bin/.idx pair, mapped."""

    prefix: Path

    tokens: np.ndarray
    """All ids in the order of the file, uint16 or int32 [tokens]; a memory map."""

    documents: np.ndarray
    """int64 [documents + 1]: token at which each document begins; the end last."""

    keep: Any
    """The library's own object: its arrays are views of a map that it closes when it goes."""


def open_indexed(prefix: Path) -> IndexedFile:
    """Map a pair written by `IndexedWriter` or by Megatron's own tools. Raises UserError for anything else."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; an indexed data set is a pair {prefix.name}.bin and .idx")
    module = _module()
    with idx_path.open("rb") as stream:  # Looked at first: the library complains about such a file twice.
        if stream.read(len(_HEADER)) != _HEADER:
            raise UserError(f"{idx_path}: not an index of Megatron's")
    if not bin_path.stat().st_size:
        return IndexedFile(prefix, np.zeros(0, np.uint16), np.zeros(1, np.int64), None)
    try:
        data = module.IndexedDataset(str(prefix))
    except (AssertionError, ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{idx_path}: not an index of Megatron's ({' '.join(str(error).split())})") from None
    index = data.index
    dtype = np.dtype(index.dtype)
    if dtype.kind not in "ui":
        raise UserError(f"{idx_path}: it holds {dtype}, not token ids")
    ends = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
    if bin_path.stat().st_size != ends[-1] * dtype.itemsize:
        raise UserError(
            f"{bin_path} has {bin_path.stat().st_size} bytes, its index says {ends[-1] * dtype.itemsize}: it was cut "
            "short or belongs to another index"
        )
    if not np.array_equal(index.sequence_pointers, ends[:-1] * dtype.itemsize):
        raise UserError(f"{idx_path}: its sequences do not follow one another; write the set anew")
    # As a plain array: numpy's own class for maps takes microseconds for every slice.
    tokens = np.memmap(bin_path, dtype=dtype, mode="r").view(np.ndarray)
    return IndexedFile(prefix, tokens, ends[np.asarray(index.document_indices)], data)
