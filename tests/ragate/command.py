"""What tests see of the command `ragate`: the fixture of that name is in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Ragate = Callable[..., Ended]
