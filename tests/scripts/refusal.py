"""What a script says about a mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def assert_refused(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` ends with exit code 2 after one line that contains `message`."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
