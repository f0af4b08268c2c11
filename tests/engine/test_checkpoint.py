"""What a start asks of a checkpoint besides its weights: its size, its identity, and no needless imports."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_gguf import write_tiny

from ragate_engine import ModelFileError
from ragate_engine.weights import Checkpoint, digest, open_checkpoint

LONG_AGO = time.time() - 1000


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of remembered digests; files of any size are worth it, and none is too young."""
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "WORTH_KEEPING", 1)
    monkeypatch.setattr(digest, "SETTLED", -60.0)
    return tmp_path / "cache" / "digests"


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read through from now on."""
    seen: list[str] = []
    whole = hashlib.file_digest

    def watched(file, kind):
        seen.append(Path(file.name).name)
        return whole(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", watched)
    return seen


def test_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    weights = write_tiny(tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path / "m.gguf").parameters == sum(array.size for array in weights.values())


def test_a_file_is_hashed_once_for_all_starts(tmp_path: Path, kept: Path, monkeypatch) -> None:
    path = tmp_path / "m.gguf"
    write_tiny(path)
    seen = hashed(monkeypatch)
    identities = {open_checkpoint(path).identity for _ in range(3)}
    assert identities == {hashlib.sha256(path.read_bytes()).hexdigest()}
    assert seen == ["m.gguf"]
    assert len(list(kept.iterdir())) == 1


def test_a_changed_file_never_gets_the_digest_of_the_old_one(tmp_path: Path, kept: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"first")
    os.utime(path, (LONG_AGO, LONG_AGO))
    first = digest.sha256_of(path)
    path.write_bytes(b"other")
    os.utime(path, (LONG_AGO, LONG_AGO))  # the same size and time; ctime tells
    assert digest.sha256_of(path) == hashlib.sha256(b"other").hexdigest() != first
    moved = tmp_path / "copy.bin"
    moved.write_bytes(b"third")
    os.utime(moved, (LONG_AGO, LONG_AGO))
    os.replace(moved, path)
    assert digest.sha256_of(path) == hashlib.sha256(b"third").hexdigest()


def test_a_file_that_was_changed_just_now_is_not_remembered(tmp_path: Path, kept: Path, monkeypatch) -> None:
    monkeypatch.setattr(digest, "SETTLED", 4.0)
    path = tmp_path / "w.bin"
    path.write_bytes(b"young")
    digest.sha256_of(path)
    assert not kept.exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, kept: Path, monkeypatch
) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"before")
    whole = hashlib.file_digest

    def meddled(file, kind):
        found = whole(file, kind)
        path.write_bytes(b"after it")
        return found

    monkeypatch.setattr(hashlib, "file_digest", meddled)
    digest.sha256_of(path)
    assert not kept.exists()


def test_a_damaged_or_forbidden_cache_only_costs_time(tmp_path: Path, kept: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"content")
    expected = digest.sha256_of(path)
    (remembered,) = kept.iterdir()
    remembered.write_bytes(b"\xff" * 64)
    assert digest.sha256_of(path) == expected
    remembered.unlink()
    kept.rmdir()
    kept.write_text("a file where the folder should be")
    assert digest.sha256_of(path) == expected


def test_hashing_ahead_works_in_a_thread_and_is_done_once(tmp_path: Path, monkeypatch) -> None:
    write_tiny(tmp_path / "m.gguf")
    go = threading.Event()
    calls: list[Path] = []

    def slow(path: Path) -> str:
        calls.append(path)
        go.wait(10)
        return "abc"

    monkeypatch.setattr(digest, "sha256_of", slow)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert not checkpoint.hash_ahead().done()
    go.set()
    assert checkpoint.identity == checkpoint.identity == "abc"
    assert len(calls) == 1


def test_a_file_that_vanishes_has_no_identity(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    checkpoint.path.unlink()
    for _ in range(2):
        with pytest.raises(ModelFileError, match=r"m\.gguf cannot be read"):
            _ = checkpoint.identity


def test_a_checkpoint_without_files_has_an_identity(tmp_path: Path) -> None:
    config = open_checkpoint(_tiny(tmp_path)).config
    made = Checkpoint(Path("made"), config, None, {}, "bfloat16", files=())
    assert made.identity == hashlib.sha256(b"").hexdigest()


def _tiny(folder: Path) -> Path:
    write_tiny(folder / "m.gguf")
    return folder / "m.gguf"


def test_opening_a_model_imports_nothing_that_only_tests_or_other_formats_need(tmp_path: Path) -> None:
    code = (
        f"import sys; from ragate_engine.weights import open_checkpoint; open_checkpoint({str(_tiny(tmp_path))!r});"
        "print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "gguf",
        "yaml",
        "safetensors",
        "transformers",
        "triton",
        "sympy",
        "torch._dynamo",
        "torch._inductor",
    }
    assert not heavy & set(out.stdout.split())
