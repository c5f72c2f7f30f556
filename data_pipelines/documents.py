"""A document, the thing that every source gives and everything downstream takes."""

from __future__ import annotations

from typing import NamedTuple

from hope_train.errors import UserError


class Document(NamedTuple):
    """One text. `id` is stable: it names the source as the configuration does, the file in it, and the line or row."""

    id: str
    text: str


class UnreachableError(UserError):
    """A source cannot be reached just now (a medium, a network): trying again may help."""


class DamagedError(UserError):
    """A file ends or breaks where it should not: what came before is good, trying again does not help."""


def check_text(text: str, place: str) -> str:
    """`text` itself. Raises UserError when it cannot be written as UTF-8 (a lone surrogate)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: the text holds a lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}, "
            "which is not valid Unicode: repair or remove it"
        ) from None
    return text
