"""The one kind of error that is the user's to mend: one clear line, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input. The message is one line that says what to change; the CLI exits with 2."""
