"""The ceilings that results are held against, from bench/results; the work itself is the engine's to count."""

from __future__ import annotations

import json
from pathlib import Path

from bench.result import RESULTS
from ragate_engine.roofline import Ceilings, Shape, Work

__all__ = ["Ceilings", "Shape", "Work", "ceilings"]


def ceilings(limits: Path | None = None) -> Ceilings:
    """From a result of `bench/limits.py`; without one, from the session that measured the peer."""
    path = limits or RESULTS / "limits-h200.json"
    if path.exists():
        found = json.loads(path.read_text())["limits"]
        return Ceilings(found["matmul_TFLOPs"] * 1e12, found["copy_GBps"] * 1e9, path.name)
    path = RESULTS / "vllm-0.23.0-h200.json"
    found = json.loads(path.read_text())["ceilings"]
    return Ceilings(found["bf16_TFLOPs"] * 1e12, found["copy_GBps"] * 1e9, path.name)
