"""A run folder -> one JSON result: scores, states, calls, tokens, seconds, machine. Run it where the run was made.

usage: ragate eval --testset testsets/llm-serving --judge smollm2-135m --out .ragate/bench
       python bench/eval_summary.py .ragate/bench bench/results/eval-NAME.json
"""

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ragate.gate.baseline import git_commit
from ragate.run import load_run


def hardware() -> str:
    """The card, else the CPU with its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    run = load_run(folder)
    timings = json.loads((folder / "timings.json").read_text())
    timings.pop("call_ms")
    sent, computed = timings["prompt_tokens_sent"], timings["prompt_tokens_computed"]
    finishes: dict[str, int] = {}
    for call in run.calls.values():
        finishes[call.finish] = finishes.get(call.finish, 0) + 1
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "ragas", "transformers", "llguidance")},
        "commit": git_commit(Path.cwd()),
        "judge": run.judge,
        "items": len(run.items),
        "means": {metric: run.mean(metric) for metric in run.metrics},
        "states": {metric: run.states(metric) for metric in run.metrics},
        "finishes": finishes,
        "tokens": run.tokens.model_dump(),
        "prompt_tokens_computed_share": round(computed / sent, 4) if sent else None,
        "fingerprint": run.fingerprint,
        "timings": timings,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps(
            {k: result[k] for k in ("hardware", "means", "states", "prompt_tokens_computed_share")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
