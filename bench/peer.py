"""The peer's figures: those in bench/results, or those of a log that `bench/vllm_peer.py` has just printed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.result import RESULTS

COMMITTED = RESULTS / "vllm-0.23.0-h200.json"
_POINT = re.compile(
    r"^(?P<model>\S+) (?P<label>decode b=\d+|prefill 16x1000|judge 1000 requests(?:, again)?): "
    r"(?P<seconds>[\d.]+) s, [\d.]+ req/s, out (?P<out>\d+) tok/s, prompt (?P<prompt>\d+) tok/s",
    re.MULTILINE,
)
_START = re.compile(r"^(?P<model>\S+) start-up s (?P<seconds>[\d.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Peer:
    """One model's figures and where they are from; all are optional."""

    name: str
    origin: str
    startup_s: float | None
    decode_tok_s: dict[str, float]
    """By batch size, as text."""
    prefill_tok_s: float | None
    judge_s: list[float]

    def describe(self) -> dict[str, Any]:
        """The fields for a result file."""
        return dict(vars(self))


def committed(model: str, run: str = "") -> Peer | None:
    """vLLM on `model` as measured once (`run` is "" or "invariant"); `None` where it was not."""
    result = json.loads(COMMITTED.read_text())
    found = result["runs"].get(f"{model} {run}".strip())
    if found is None:
        return None
    return Peer(
        name=f"vLLM {result['versions']['vllm']} {run}".strip(),
        origin=f"{COMMITTED.name}, {result['date']}",
        startup_s=found["startup_s"],
        decode_tok_s=found["decode_tok_s"],
        prefill_tok_s=found["prefill_16x1000_tok_s"],
        judge_s=found["judge_1000_s"],
    )


def from_log(path: Path, model: str, run: str = "") -> Peer:
    """What a log says of `model`. Raises ValueError where it says nothing."""
    text = path.read_text(errors="replace")
    points = {m["label"]: m for m in _POINT.finditer(text) if m["model"] == model}
    if not points:
        raise ValueError(f"{path} has no line of {model}")
    starts = [float(m["seconds"]) for m in _START.finditer(text) if m["model"] == model]
    judged = [points.get("judge 1000 requests"), points.get("judge 1000 requests, again")]
    prefill = points.get("prefill 16x1000")
    return Peer(
        name=f"vLLM {run}".strip(),
        origin="the same session",
        startup_s=starts[-1] if starts else None,
        decode_tok_s={
            label.removeprefix("decode b="): float(m["out"])
            for label, m in points.items()
            if label.startswith("decode")
        },
        prefill_tok_s=float(prefill["prompt"]) if prefill else None,
        judge_s=[float(m["seconds"]) for m in judged if m],
    )
