"""One file as numbered records, from any place of it on; what is wrong with a record comes along with it.

Whether a fault stops the run or is counted and passed over is the caller's business (`selecting.py`); here it is only
named. A fault is a property of the file, so every reading of it finds the same faults at the same records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.documents import DamagedError, check_text
from data_pipelines.unpacking import GzipIndexes, Openable, one_line, open_at, reading_error
from hope_train.errors import UserError

_BOM = b"\xef\xbb\xbf"
_ROWS = 256

FAULTS = ("not_utf8", "not_json", "no_text", "not_unicode", "damaged")
"""Kinds of fault: bytes that are not UTF-8, a line that is not JSON (or no object), a field that is missing or no text,
a lone surrogate, a file that breaks off or is garbled from here on."""


class Fault(NamedTuple):
    """What is wrong with a record."""

    kind: str
    message: str

    def error(self) -> UserError:
        """The fault as an error that stops the work."""
        return DamagedError(self.message) if self.kind == "damaged" else UserError(self.message)


class Place(NamedTuple):
    """Where in a file reading is: `cursor` is a byte offset into the unpacked text, or a number of rows."""

    cursor: int = 0
    number: int = 0
    """Records before it."""


class Record(NamedTuple):
    """A line, a row, or a whole .txt file."""

    number: int
    """From 1."""

    after: Place
    """Where reading goes on after it."""

    text: str | None
    """None: the field is null, or there is a fault."""

    row: Mapping[str, Any]
    """The other columns that were asked for."""

    fault: Fault | None = None

    whole_file: bool = False
    """A .txt, which is one document."""


def read_records(
    file: Openable,
    text_field: str,
    place: Place = Place(),  # noqa: B008 - immutable
    part: int = 0,
    parts: int = 1,
    columns: Sequence[str] | None = (),
    indexes: GzipIndexes | None = None,
) -> Iterator[Record]:
    """The records of `file` from `place` on; of those only every `parts`-th, beginning with number `part` + 1.

    Args:
        columns: to be given in `Record.row` beside the text; None: all of them.
        indexes: where seek indexes of large .gz files are.

    Raises:
        UnreachableError: the file is not there or its medium fails.
        UserError: the whole file is not of the kind that its name says, or has no such column.
    """
    lower = file.name.lower()
    if lower.endswith(".parquet"):
        yield from _parquet(file, text_field, place, part, parts, columns)
    elif lower.endswith(".arrow"):
        yield from _arrow(file, text_field, place, part, parts, columns)
    elif lower.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        yield from _jsonl(file, text_field, place, part, parts, columns, indexes)
    elif place.number == 0 and part == 0:
        yield from _txt(file)


def _txt(file: Openable) -> Iterator[Record]:
    end = Place(1, 1)
    try:
        with open_at(file) as stream:
            raw = stream.read().removeprefix(_BOM)
    except DamagedError as error:
        yield Record(1, end, None, {}, Fault("damaged", str(error)), True)
        return
    try:
        yield Record(1, end, raw.decode("utf-8"), {}, None, True)
    except UnicodeDecodeError as error:
        message = _not_utf8(f"{file}:{raw.count(10, 0, error.start) + 1}", error)
        yield Record(1, end, None, {}, Fault("not_utf8", message), True)


def _jsonl(
    file: Openable,
    text_field: str,
    place: Place,
    part: int,
    parts: int,
    columns: Sequence[str] | None,
    indexes: GzipIndexes | None,
) -> Iterator[Record]:
    offset, number = place
    try:
        with open_at(file, offset, indexes) as stream:
            for line in stream:
                start, offset, number = offset, offset + len(line), number + 1
                if (number - 1) % parts != part:
                    continue
                if start == 0:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield _line(line, number, Place(offset, number), f"{file}:{number}", text_field, columns)
    except DamagedError as error:
        # Every part would find the break; one of them tells it.
        if part == number % parts:
            yield Record(number + 1, Place(offset, number + 1), None, {}, Fault("damaged", str(error)))


def _line(line: bytes, number: int, after: Place, where: str, text_field: str, columns: Sequence[str] | None) -> Record:
    def bad(kind: str, message: str) -> Record:
        return Record(number, after, None, {}, Fault(kind, message))

    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return bad("not_utf8", _not_utf8(where, error))
    except json.JSONDecodeError as error:
        explained = f"{where}: not valid JSON ({error.msg}, column {error.colno}); .jsonl has one object per line"
        return bad("not_json", explained)
    except (ValueError, RecursionError) as error:
        return bad("not_json", f"{where}: not valid JSON ({error})")
    if not isinstance(row, dict):
        return bad("not_json", f"{where}: a JSON object per line is expected, this is a {type(row).__name__}")
    if text_field not in row:
        return bad("no_text", f"{where}: no field {text_field!r}; set text_field to one of: {few(list(row))}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        return bad("no_text", f"{where}: field {text_field!r} is not text but a {kind}; set text_field")
    others = row if columns is None else {name: row.get(name) for name in columns}
    return text_record(number, after, text, others, where)


def text_record(number: int, after: Place, text: str | None, row: Mapping[str, Any], where: str) -> Record:
    """A record of a text, if that can be written as UTF-8."""
    try:
        return Record(number, after, None if text is None else check_text(text, where), row)
    except UserError as error:
        return Record(number, after, None, {}, Fault("not_unicode", str(error)))


def _parquet(
    file: Openable, text_field: str, place: Place, part: int, parts: int, columns: Sequence[str] | None
) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = place.number
    try:
        with file.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            wanted = _check_columns(table.schema_arrow, str(file), text_field, columns)
            sizes = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
            group, before = 0, 0
            while group < len(sizes) and before + sizes[group] <= row:
                before += sizes[group]
                group += 1
            if group == len(sizes):
                return
            groups, first = list(range(group, len(sizes))), before
            for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=wanted):
                for record in _rows(batch, first, row, str(file), text_field, part, parts):
                    row = record.number
                    yield record
                first += batch.num_rows
    except OSError as error:
        if error.errno is not None:
            raise reading_error(file, error, " as parquet") from None
        yield _broken(file, "parquet", row, error)
    except (ValueError, pyarrow.ArrowException) as error:
        yield _broken(file, "parquet", row, error)


def _arrow(
    file: Openable, text_field: str, place: Place, part: int, parts: int, columns: Sequence[str] | None
) -> Iterator[Record]:
    """Both of Arrow's formats: the stream, as `datasets` keeps its tables, and the file."""
    import pyarrow
    import pyarrow.ipc

    row, first = place.number, 0
    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
                tables = iter(batches)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_file(source)
                tables = (batches.get_batch(number) for number in range(batches.num_record_batches))
            wanted = _check_columns(batches.schema, str(file), text_field, columns)
            for batch in tables:
                if first + batch.num_rows > place.number:
                    for record in _rows(batch.select(wanted), first, row, str(file), text_field, part, parts):
                        row = record.number
                        yield record
                first += batch.num_rows
    except OSError as error:
        if error.errno is not None:
            raise reading_error(file, error, " as arrow") from None
        yield _broken(file, "arrow", row, error)
    except (ValueError, pyarrow.ArrowException) as error:
        yield _broken(file, "arrow", row, error)


def _rows(batch: Any, first: int, done: int, where: str, text_field: str, part: int, parts: int) -> Iterator[Record]:
    """The records of an Arrow batch whose first row has number `first` + 1, but for those up to `done`."""
    skip = max(0, done - first)
    skip += (part - first - skip) % parts
    chosen = list(range(skip, batch.num_rows, parts))
    if not chosen:
        return
    batch = batch.take(chosen) if parts > 1 else batch.slice(skip)
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    for place, text in enumerate(columns[text_field]):
        number = first + chosen[place] + 1
        row = {name: values[place] for name, values in columns.items()}
        del row[text_field]
        wrong = next((value for value in (text, *row.values()) if isinstance(value, UnicodeDecodeError)), None)
        if wrong is not None:
            fault = Fault("not_utf8", _not_utf8(f"{where}:{number}", wrong))
            yield Record(number, Place(number, number), None, {}, fault)
        else:
            yield text_record(number, Place(number, number), text, row, f"{where}:{number}")


def _values(column: Any) -> list[Any]:
    """A column as Python has it; the error in place of a text that is not UTF-8, which the format does not prevent."""
    import pyarrow

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pyarrow.types.is_nested(column.type):
            raise
        return [_decoded(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(raw: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if raw is None else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def _check_columns(schema: Any, where: str, text_field: str, columns: Sequence[str] | None) -> list[str]:
    """The columns to read. Raises UserError if one is missing, or the text is no text."""
    import pyarrow

    for name in (text_field, *(columns or ())):
        if name not in schema.names:
            key = "text_field" if name == text_field else "language_field"
            raise UserError(f"{where}: no column {name!r}; set {key} to one of: {few(schema.names)}")
    kind = schema.field(text_field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(is_text(kind) for is_text in texts):
        raise UserError(f"{where}: column {text_field!r} is not text but {kind}; set text_field")
    return list(schema.names) if columns is None else list(dict.fromkeys([text_field, *columns]))


def _broken(file: Openable, kind: str, row: int, error: BaseException) -> Record:
    message = f"{file}: cannot be read as {kind}: {one_line(error)}"
    return Record(row + 1, Place(row + 1, row + 1), None, {}, Fault("damaged", message))


def _not_utf8(place: str, error: UnicodeDecodeError) -> str:
    return (
        f"{place}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, for example with "
        "iconv -f ISO-8859-1 -t UTF-8"
    )


def few(names: Sequence[str]) -> str:
    """Names for a message, not too many."""
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
