"""Files are written whole or not at all: temporary file, fsync, rename."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_MODE = 0o644


def write_whole(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace `path` at once, with bytes or pieces of them. Raises OSError, and then leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _MODE)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
