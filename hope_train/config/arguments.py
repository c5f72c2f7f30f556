"""What stands on a command line as overrides. Imports nothing that takes time."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hope_train.errors import UserError


def check_overrides(texts: Sequence[str] | None, first: str) -> list[str]:
    """The overrides, after a look at the mistakes people make on the command line. Raises UserError."""
    if "=" in first and not os.path.exists(first):
        raise UserError(f"{first!r} stands where a file or folder belongs: name that first, then the overrides")
    for text in texts or []:
        if text.startswith("-"):
            raise UserError(f"{text!r} is not an override: write key=value without dashes, and options before `--`")
        if "=" not in text:
            raise UserError(f"{text!r} is not an override: write key=value, for example train.tokens=1e6")
    return list(texts or [])
