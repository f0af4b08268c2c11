"""Files are written whole or not at all: temporary file, fsync, rename."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from ragate.errors import RunError


def write_whole(path: Path, text: str) -> None:
    """Replace `path` with `text` atomically, UTF-8. Raises RunError (full disk, no permission), old file intact."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        way_out = "; free some space or name another folder with --out" if out_of_space(e) else ""
        raise RunError(f"{path}: cannot write: {e.strerror}{way_out}") from None


def out_of_space(error: OSError) -> bool:
    """True when the disk or the user's share of it is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
