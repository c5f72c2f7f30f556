"""Documents from local files: .txt and .jsonl, plain or compressed (.gz, .zst), and .parquet."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_pipelines.documents import Document, check_text
from hope_train.errors import UserError

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_BOM = b"\xef\xbb\xbf"
_FINGERPRINT_BYTES = 1 << 16


def find_files(path: Path) -> list[Path]:
    """The text files at `path`: itself, or all below a folder in natural order (part-2 before part-10).

    Hidden files and folders are left out. Raises UserError if there is none.
    """
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder {path}")
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    if not found:
        raise UserError(f"{path}: the folder holds no text files; known are {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: natural_key(file.relative_to(path).as_posix()))


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key by which numbers inside names count as numbers; the name itself breaks ties such as 1 and 01."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def fingerprint(file: Path) -> list[str | int]:
    """What changes when a file does: its size, its time stamp, and a hash of its first and last 64 KiB."""
    try:
        status = file.stat()
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            digest.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, status.st_size - _FINGERPRINT_BYTES))
            digest.update(stream.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def read_file(file: Path, name: str, text_field: str) -> Iterator[Document]:
    """The documents of one file, ids beginning with `name`.

    A .txt file is one document, its line ends kept; a leading byte order mark is dropped. Documents without any
    text are passed over. Raises UserError naming the file, and the line or row, for anything that cannot be read.
    """
    lower = file.name.lower()
    if lower.endswith(".parquet"):
        yield from _read_parquet(file, name, text_field)
    elif lower.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        yield from _read_jsonl(file, name, text_field)
    else:
        yield from _read_txt(file, name)


def _read_txt(file: Path, name: str) -> Iterator[Document]:
    with _reading(file) as stream:
        raw = stream.read().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(f"{file}:{raw.count(10, 0, error.start) + 1}", error)) from None
    if text:
        yield Document(name, text)


def _read_jsonl(file: Path, name: str, text_field: str) -> Iterator[Document]:
    with _reading(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            text = _json_text(line, f"{file}:{number}", text_field)
            if text:
                yield Document(f"{name}:{number}", text)


def _json_text(line: bytes, place: str, text_field: str) -> str | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(place, error)) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}); .jsonl has one object per line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON object per line is expected, this is a {type(record).__name__}")
    if text_field not in record:
        raise UserError(f"{place}: no field {text_field!r}; set text_field to one of: {_few(list(record))}")
    text = record[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} is not text but a {type(text).__name__}; set text_field")
    return check_text(text, place)


def _read_parquet(file: Path, name: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise UserError(f"{file}: no column {text_field!r}; set text_field to one of: {_few(columns)}")
            kind = table.schema_arrow.field(text_field).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            texts = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
            if not any(is_text(kind) for is_text in texts):
                raise UserError(f"{file}: column {text_field!r} is not text but {kind}; set text_field")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text:
                        yield Document(f"{name}:{row}", text)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as parquet: {_one_line(error)}") from None


@contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    """An open file, decompressed on the way; errors of the medium or the packing become a UserError."""
    lower = file.name.lower()
    packing = "gzip" if lower.endswith(".gz") else "zstandard" if lower.endswith(".zst") else ""
    # Deferred for start-up time: zstandard is needed by .zst files alone.
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if packing == "zstandard":
        import zstandard

        errors += (zstandard.ZstdError,)
    try:
        with file.open("rb") as raw:
            if packing == "gzip":
                with gzip.open(raw) as stream:
                    yield stream  # type: ignore[misc]
            elif packing == "zstandard":
                yield io.BufferedReader(_ZstdReader(raw), 1 << 20)
            else:
                yield raw
    except errors as error:
        how = f" as {packing} (damaged or cut short?)" if packing else ""
        raise UserError(f"{file}: cannot be read{how}: {_one_line(error)}") from None


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


def _not_utf8(place: str, error: UnicodeDecodeError) -> str:
    return (
        f"{place}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, for example with "
        "iconv -f ISO-8859-1 -t UTF-8"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
