"""A document, the thing that every source gives and everything downstream takes."""

from __future__ import annotations

from typing import NamedTuple

from hope_train.errors import UserError


class Document(NamedTuple):
    """One text. `id` is stable: it names the source as the configuration does, the file in it, and the line or row."""

    id: str
    text: str


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
