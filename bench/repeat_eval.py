"""The same evaluation many times: seconds of each, and whether every run.json is the same file, byte for byte.

The first runs are alone on the machine, the others several at a time: company and clocks differ, the bytes may not.

usage: python bench/repeat_eval.py [--runs 10] [--alone 2] [--together 4] [--out JSON] -- --judge qwen-1.5b --kv-gib 4
       (everything after -- goes to `ragate eval`)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--alone", type=int, default=2)
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="for the result's header")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    parser.add_argument("options", nargs="*", help="options of `ragate eval`")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = [evaluate(args.options, Path(folder) / str(i), alone=True) for i in range(args.alone)]
        with ThreadPoolExecutor(args.together) as pool:
            rest = [
                pool.submit(evaluate, args.options, Path(folder) / str(i), alone=False)
                for i in range(args.alone, args.runs)
            ]
            runs += [run.result() for run in rest]
    identical = len({run["sha256"] for run in runs}) == 1
    found = result.header(args.device) | {"options": args.options, "runs": runs, "identical": identical}
    for run in runs:
        company = "alone" if run["alone"] else "in company"
        took = f"{run['seconds']:6.1f} s ({run['evaluation_s']:.1f} s of it evaluating)"
        print(f"{took}, {company}, run.json {run['sha256'][:16]}")
    print("every run.json is the same file" if identical else "RUNS DIFFER")
    result.save(found, args.out)
    return 0 if identical else 1


def evaluate(options: Sequence[str], folder: Path, alone: bool) -> dict[str, Any]:
    """One run from nothing, in a process of its own. Raises SystemExit where it ends without a run."""
    command = [sys.executable, "-m", "ragate", "eval", *options, "--out", str(folder), "--quiet"]
    start = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if not (folder / "run.json").exists():
        raise SystemExit(f"ragate eval ended with {ended.returncode}: {ended.stderr[-2000:]}")
    timings = json.loads((folder / "timings.json").read_text())
    return {
        "seconds": seconds,
        "evaluation_s": timings["seconds"]["total"],
        "alone": alone,
        "sha256": hashlib.sha256((folder / "run.json").read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    sys.exit(main())
