"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from smelt import cli


class Out(NamedTuple):
    code: int
    out: str
    err: str


Smelt = Callable[..., Out]


def called(capsys: pytest.CaptureFixture[str], *argv: object) -> Out:
    """What a command printed, and its exit code."""
    code = cli.main([str(a) for a in argv])
    return Out(code, *capsys.readouterr())
