"""What this machine has."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands, by version of control groups."""


def memory_bytes() -> int:
    """Main memory that processes here can have in all: the machine's, or its container's share. Swap does not count."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or `max`
            found = min(found, int(Path(limit).read_text(encoding="ascii")))
    return found
