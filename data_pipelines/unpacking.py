"""Files opened for reading from any place of their text: plain, gzip and zstandard.

A place is an offset into the unpacked bytes. In a plain file that is a seek. In a .gz it is one too where an index of
the file is at hand (`GzipIndexes`); otherwise, and in a .zst, everything before it is unpacked and dropped, which costs
at most one file.
"""

from __future__ import annotations

import atexit
import errno
import gzip
import hashlib
import io
import os
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data_pipelines.documents import DamagedError, UnreachableError

_CHUNK = 1 << 20
LARGE = 1 << 24
"""Bytes from which on a .gz gets an index: unpacking less takes a fraction of a second."""

# What a medium says that may be well again later; anything else about a file is the user's to mend.
_PASSING = {
    *(errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENODEV, errno.ENXIO),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN),
    *(errno.EREMOTEIO, errno.ENOLINK, errno.ECONNABORTED, errno.EPIPE, errno.ENETDOWN, errno.ENETRESET, errno.EINTR),
}


class Openable(Protocol):
    """A `Path`, or a file elsewhere that can be opened like one."""

    @property
    def name(self) -> str:
        """The file's own name."""

    def open(self, mode: Any = "rb") -> Any:
        """A seekable binary stream. Raises OSError."""


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def reading_error(file: Openable, error: OSError, how: str = "") -> UnreachableError | DamagedError:
    """The UserError for an OSError in reading `file`, by whether trying again may help."""
    message = f"{file}: cannot be read{how}: {one_line(error)}"
    return UnreachableError(message) if error.errno in _PASSING else DamagedError(message)


class GzipIndexes:
    """Where in large .gz files reading can begin, kept in a folder.

    An index is built by one pass when a file is first opened (some 300 MB/s and core), which also proves that the file
    is whole. Without `rapidgzip`, where the folder cannot be written, and for damaged files there is none: such files
    are unpacked from their start. Safe for several processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, file: Path) -> Path:
        """Where the index of `file` is kept. Raises OSError."""
        status = file.stat()
        key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.gzidx"

    def build(self, file: Path) -> None:
        """Make the index of a large file that has none yet. Failing is no error: an index only saves time."""
        import filelock

        if file.stat().st_size < LARGE or (place := self.place(file)).is_file():
            return
        with suppress(ImportError, OSError, ValueError, RuntimeError):
            import rapidgzip

            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{place}.lock"):
                if place.is_file():
                    return
                temporary = place.with_suffix(f".{os.getpid()}.tmp")
                try:
                    with rapidgzip.open(str(file), parallelization=1) as opened:
                        opened.export_index(str(temporary))
                    os.replace(temporary, place)
                finally:
                    temporary.unlink(missing_ok=True)

    def open(self, file: Path, offset: int) -> Any:
        """`file` unpacked from `offset` on, by its index. None: there is none."""
        place = self.place(file)
        if not place.is_file():
            return None
        try:
            import rapidgzip

            opened = rapidgzip.open(str(file), parallelization=1)
            _open.add(opened)
            opened.import_index(str(place))
            opened.seek(offset)
        except (ImportError, OSError, ValueError, RuntimeError):
            return None
        return opened


# The library ends the process if the interpreter finds one of its files open at its end.
_open: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for opened in list(_open):
        opened.close()


@contextmanager
def open_at(file: Openable, offset: int = 0, indexes: GzipIndexes | None = None) -> Iterator[BinaryIO]:
    """`file` unpacked, from byte `offset` of its text on.

    Raises:
        UnreachableError: the medium fails, or the file is not there (any more).
        DamagedError: the packing is broken or cut short.
    """
    lower = file.name.lower()
    packing = "gzip" if lower.endswith(".gz") else "zstandard" if lower.endswith(".zst") else ""
    how = f" as {packing} (damaged or cut short?)" if packing else ""
    # Deferred for start-up time: each is needed by files of its kind alone.
    damage: tuple[type[BaseException], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if packing == "zstandard":
        import zstandard

        damage += (zstandard.ZstdError,)
    try:
        with _opened(file, packing, offset, indexes) as stream:
            yield stream
    except damage as error:
        raise DamagedError(f"{file}: cannot be read{how}: {one_line(error)}") from None
    except OSError as error:
        raise reading_error(file, error, how) from None


@contextmanager
def _opened(file: Openable, packing: str, offset: int, indexes: GzipIndexes | None) -> Iterator[BinaryIO]:
    if packing == "gzip" and indexes is not None and isinstance(file, Path):
        if not offset:
            indexes.build(file)
        elif (indexed := indexes.open(file, offset)) is not None:
            try:
                yield io.BufferedReader(indexed, _CHUNK)
            finally:
                indexed.close()
            return
    with file.open("rb") as raw:
        if not packing:
            raw.seek(offset)
            yield raw
            return
        stream: Any = gzip.GzipFile(fileobj=raw) if packing == "gzip" else io.BufferedReader(_ZstdReader(raw), _CHUNK)
        with stream:
            _skip(stream, offset)
            yield stream


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        dropped = len(stream.read(min(count, _CHUNK)))
        if not dropped:
            raise EOFError("the text ends before the place where reading was to go on")
        count -= dropped


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of all frames in a file. zstandard's own reader takes a truncated file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._frame_begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._raw.read(1 << 18)
            if not packed:
                if self._frame_begun:
                    raise EOFError("the last frame is not complete")
                return 0
            parts = []
            while packed:
                self._frame_begun = True
                parts.append(self._frame.decompress(packed))
                packed = b""
                if self._frame.eof:
                    packed = self._frame.unused_data
                    self._frame = self._decompressor.decompressobj()
                    self._frame_begun = False
            self._ready = b"".join(parts)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
