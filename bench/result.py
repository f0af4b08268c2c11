"""What every result file says of where it came from: date, hardware, versions, commit, command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def hardware(device: str) -> str:
    """The card, or the CPU with its cores."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def header(device: str) -> dict[str, Any]:
    """The fields that a result begins with."""
    versions: dict[str, str] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("triton", "ragate"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from the sources
            continue
    script = Path(sys.argv[0])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """RAGATE_COMMIT, for a copy of the files that was brought without its repository, else what is checked out."""
    if named := os.environ.get("RAGATE_COMMIT"):
        return named
    try:
        command = ["git", "-C", str(RESULTS), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write a result as JSON where it is wanted."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")
