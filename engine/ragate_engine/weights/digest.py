"""The sha256 of large files, remembered beside the kernels: a model is hashed once, not at every start.

A digest is kept in the user's cache folder under everything that changes with a file's content: its place, inode,
size, and the times of its last change of content (mtime) and of anything (ctime, which no program can set back). A
file that was changed in the last seconds is hashed and not remembered, for a change within one tick of the file
system's clock would not show.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

WORTH_KEEPING = 32 << 20
"""Bytes of the smallest file whose digest is remembered."""
SETTLED = 4.0
"""Seconds since its last change after which a file's times can be trusted: FAT counts in steps of two."""


def sha256_of(path: Path) -> str:
    """sha256, hex, of a file's content as it is now. Raises OSError."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        kept = _place(path, before) if before.st_size >= WORTH_KEEPING else None
        if kept is not None and (known := _read(kept)):
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    settled = max(after.st_mtime, after.st_ctime) < time.time() - SETTLED
    if kept is not None and settled and _place(path, after) == kept:
        _write(kept, digest)
    return digest


def _place(path: Path, stat: os.stat_result) -> Path:
    """Where the digest of a file in this state is kept."""
    import platformdirs

    root = Path(os.environ.get("RAGATE_CACHE") or platformdirs.user_cache_dir("ragate"))
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    state = repr((str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, times))
    return root / "digests" / hashlib.sha256(state.encode()).hexdigest()


def _read(kept: Path) -> str | None:
    try:
        known = kept.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    whole = len(known) == 64 and not set(known) - set("0123456789abcdef")
    return known if whole else None


def _write(kept: Path, digest: str) -> None:
    with suppress(OSError):  # a read-only or full cache: it is hashed again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            file.write(digest)
        os.replace(file.name, kept)
