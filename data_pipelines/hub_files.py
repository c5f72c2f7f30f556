"""Files of a hub data set, read in place: `datasets` says which they are, and any part of one can be read again.

`datasets` itself gives rows in streaming mode, but can go back to a place only by reading everything before it; here a
.parquet file is entered at its row group and a .jsonl at its byte. What a network does wrong becomes an OSError that
may pass, so that the caller tries again from the last whole record.
"""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from data_pipelines.hub import describe_missing_hub, hub_reachable, network
from data_pipelines.unpacking import one_line
from hope_train.errors import UserError

_BLOCK = 4 << 20
"""Bytes that are asked of the hub at a time."""

_BUFFER = 1 << 20


class HubFile:
    """One file of a hub data set at a fixed revision; as much of `Path` as reading needs."""

    def __init__(self, url: str) -> None:
        """`url`: hf://datasets/owner/name@revision/path."""
        self.url = url
        self.name = url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    @property
    def commit(self) -> str:
        """The hub's commit that it belongs to."""
        return self.url.partition("@")[2].partition("/")[0]

    def open(self, mode: str = "rb") -> Any:
        """The file as a seekable binary stream. Raises OSError, with ETIMEDOUT for whatever may pass."""
        return io.BufferedReader(_HubStream(self.url), _BUFFER)


class _HubStream(io.RawIOBase):
    """A remote file whose every failure is an OSError, and which never ends early without saying so."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfFileSystem

        self._url = url
        self._place = 0
        try:
            # No instance of before: its connections and listings may be those of a process that forked.
            files = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT") or None)
            self._file = files.open(url, "rb", block_size=_BLOCK, cache_type="readahead")
            self._size = int(self._file.size)
        except Exception as error:
            raise _passing(url, error) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        try:
            self._file.seek(self._place)
            found = self._file.read(wanted)
        except Exception as error:
            raise _passing(self._url, error) from error
        if len(found) < wanted:
            self._forget()
            raise _passing(self._url, EOFError(f"the answer ends {wanted - len(found)} bytes early"))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def _forget(self) -> None:
        """Drop what the library has kept of an answer that was too short."""
        self._file.cache.cache = b""
        self._file.cache.start = self._file.cache.end = 0


def _passing(url: str, error: BaseException) -> OSError:
    return OSError(errno.ETIMEDOUT, f"{type(error).__name__}: {one_line(error)[:200]}", url)


def hub_files(name: str, *, split: str, revision: str | None, timeout: float) -> list[HubFile]:
    """The files of a split at one commit, in the order of `datasets`.

    Args:
        name: `owner/name` or `owner/name:config`.
        timeout: seconds for the hub's first sign of life.

    Raises:
        UserError: the hub is out of reach, or does not know the data set, the configuration or the split.
    """
    if not hub_reachable(timeout):
        raise UserError(describe_missing_hub(name, timeout, "data.mode=streaming reads from the hub itself"))
    import datasets

    path, _, config = name.partition(":")
    with network(online=True):
        try:
            builder = datasets.load_dataset_builder(path, config or None, revision=revision)
            found = builder.config.data_files or {}
        except Exception as error:
            raise UserError(f"hub data set {name}: {one_line(error)[:300]}") from error
    if split not in found:
        raise UserError(f"hub data set {name}: no split {split!r}; it has {', '.join(map(str, found)) or 'no files'}")
    if not found[split]:
        raise UserError(f"hub data set {name}: split {split!r} has no files")
    return [HubFile(str(url)) for url in found[split]]
