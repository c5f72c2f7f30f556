"""Filters by dotted name, as a configuration gives them."""

from __future__ import annotations

import time
from typing import Any


def no_rhythm(row: dict[str, Any]) -> bool:
    """Documents that do not say `rhythm`."""
    return "rhythm" not in row["text"]


def broken(row: dict[str, Any]) -> bool:
    """Fails on every document."""
    return bool(row["nothing of the kind"])


def no_rhythm_in_body(row: dict[str, Any]) -> bool:
    """The same of the column `body`; the other columns are there too."""
    return "rhythm" not in row["body"] and row["id"] >= 0 and row["lang"] != "de"


def asleep(row: dict[str, Any]) -> bool:
    """Does not come to an end."""
    time.sleep(600.0)
    return True
