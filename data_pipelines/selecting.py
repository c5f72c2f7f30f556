"""Which records become training documents, which are held out, and a count of every one that is neither.

Nothing is passed over silently: each record ends up in exactly one of `documents`, `held_out`, `empty`, `too_short`,
`too_long`, `other_language`, `filtered`, or in one of the faults (`records.FAULTS`, with data.on_fault=skip).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines.carving import is_held_out, text_hash
from data_pipelines.documents import UnreachableError
from data_pipelines.records import FAULTS, Place, Record
from data_pipelines.shards import Shard
from hope_train.config.data import DataConfig, SourceConfig
from hope_train.errors import UserError

COUNTERS = (
    *("documents", "held_out", "empty", "too_short", "too_long", "other_language", "filtered"),
    *FAULTS,
)
LONG_CHARACTERS = 1 << 20
"""A document of more characters counts as `long` too: it is used like any other, but a row never sees all of it."""

Keep = Callable[[dict[str, Any]], bool]


def load_filter(name: str) -> tuple[Keep, str]:
    """The function `package.module:function`, and a fingerprint of its module's source. Raises UserError."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"filter {name}: {module_name} cannot be imported ({error}); is it on PYTHONPATH?") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"filter {name}: {module_name} has no function {function_name}")
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        source = name
    return function, hashlib.sha256(source.encode()).hexdigest()[:16]


class Selector:
    """The decision for the records of one source."""

    def __init__(self, source: SourceConfig, data: DataConfig) -> None:
        """Raises UserError for a filter that cannot be loaded."""
        self._source = source
        self._skip = data.on_fault == "skip"
        self._fraction = data.validation_fraction
        self._languages = frozenset(source.language)
        self._filter = load_filter(source.filter)[0] if source.filter else None
        self.columns: tuple[str, ...] | None = (source.language_field,) if source.language else ()
        if self._filter is not None:
            self.columns = None

    def judge(self, record: Record) -> str:
        """What becomes of a record: one of `COUNTERS`.

        Raises UserError for a fault where faults stop the run, and for a filter that fails.
        """
        if record.fault is not None:
            if not self._skip:
                raise record.fault.error()
            return record.fault.kind
        text, source = record.text, self._source
        if not text:
            return "empty"
        if len(text) < source.min_characters:
            return "too_short"
        if source.max_characters is not None and len(text) > source.max_characters:
            return "too_long"
        if self._languages and record.row.get(source.language_field) not in self._languages:
            return "other_language"
        if self._filter is not None and not self._ask(text, record.row, record.number):
            return "filtered"
        if self._fraction and is_held_out(text_hash(text), self._fraction):
            return "held_out"
        return "documents"

    def _ask(self, text: str, row: Mapping[str, Any], number: int) -> bool:
        assert self._filter is not None
        try:
            return bool(self._filter({**row, self._source.text_field: text}))
        except Exception as error:
            raise UserError(
                f"filter {self._source.filter} failed on record {number}: {type(error).__name__}: {error}"
            ) from error


def reading_again(
    shard: Shard,
    place: Place,
    part: int,
    parts: int,
    columns: tuple[str, ...] | None,
    retries: int = 0,
    wait: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Record]:
    """The records of a shard from `place` on. Out of reach, it is tried again after the last whole record.

    Args:
        retries: tries in a row that may fail before the error comes through; a record in between begins anew.
        wait: seconds before the first try, doubled for each further one.
        tell: gets a line about each.

    Raises:
        UnreachableError: the last of the tries failed.
    """
    failed = 0
    while True:
        try:
            for record in shard.records(place, part, parts, columns):
                yield record
                place, failed = record.after, 0
            return
        except UnreachableError as error:
            if failed >= retries:
                raise UnreachableError(f"{error} (tried {failed + 1} times)") from None
            pause = min(wait * 2**failed, 60.0)
            failed += 1
            tell(f"{error}; try {failed} of {retries} in {pause:g} s")
            sleep(pause)
