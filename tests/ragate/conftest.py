"""The command `ragate` as a fixture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import Ended, Ragate

from ragate.cli import run


@pytest.fixture
def ragate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ragate:
    """The command, in an empty folder and without settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RAGATE_") and name != "RAGATE_CACHE"]:
        monkeypatch.delenv(name)

    def command(*arguments: str) -> Ended:
        capsys.readouterr()
        code = run(list(arguments))
        return Ended(code, *capsys.readouterr())

    return command
