"""A file is replaced whole or stays as it was, and the reason is the one that the system gave."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from ragate.errors import RunError
from ragate.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        (errno.ENOSPC, "; free some space or name another folder with --out"),
        (errno.EDQUOT, "; free some space or name another folder with --out"),
        (errno.EACCES, ""),
        (errno.EROFS, ""),
    ],
)
def test_space_is_asked_for_only_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, way_out: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "run.json"
    path.write_text("old")
    monkeypatch.setattr("ragate.files.os.replace", refuse)
    with pytest.raises(RunError) as refused:
        write_whole(path, "new")
    assert str(refused.value) == f"{path}: cannot write: {os.strerror(code)}{way_out}"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("run.json", "old")]
