"""Where a step's time goes, kernel by kernel: decode steps of the judge workload, and a prefill step of 8,192 rows.

The engine runs the same requests for 16 tokens and for 16 + 48, each under torch's profiler (the card's activities
only): the difference is 48 decode steps and nothing else. Kernels are profiled one after the other; the wall time of a
step is the same difference without the profiler and as served, where each kernel is set up while the one before it
ends, so it is less than the sum. A prefill step is one profiled step of eight prompts of 1,024 tokens.

usage: python bench/kernel_times.py 135m 8b [--out JSON]        (an NVIDIA card)
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import result, workload
from bench.random_model import SHAPES, open_model
from ragate_engine import Engine, EngineConfig, SamplingParams

FEW, MORE = 16, 64
"""Tokens answered in the two runs whose difference is taken."""
BATCHES = (1, 256)
PREFILL = (8, 1024)

device: Any = importlib.import_module("ragate_engine.kernels.triton.device")

Kernels = dict[str, tuple[int, float]]
"""By name: launches, and microseconds together."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", help=f"some of {', '.join(SHAPES)} (random weights), or paths")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    # graphs must be captured with the profiler's library loaded, and find it loaded when they are replayed
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    profiled(lambda: torch.zeros(1, device="cuda").add_(1))  # the profiler's own start takes seconds
    models: dict[str, Any] = {}
    for model in args.models:
        models[model] = steps_of(model)
        for name, step in models[model].items():
            print(f"{model} {name}: {step['wall_us']:.0f} us, kernels {step['kernel_us']:.0f} us")
            for row in step["kernels"][:12]:
                print(f"  {row['share']:6.1%} {row['us']:10.1f} us {row['launches']:6.0f} x {row['name']}")
    result.save(result.header("cuda") | {"models": models}, args.out)


def steps_of(model: str) -> dict[str, Any]:
    """The kinds of step of one model, each with its kernels by share."""
    kernels, walls = timed(model, alone=True), timed(model, alone=False)
    return {name: step_result(*kernels[name][:2], walls[name][2]) for name in kernels}


def timed(model: str, alone: bool) -> dict[str, tuple[Kernels, int, float]]:
    """Of each kind of step: what its kernels took (`alone` only), how many steps that is, and wall seconds of one.

    `alone`: no kernel is set up while the one before it ends, else the time that it waits would be counted as its own.
    """
    overlapping, device.PDL = device.PDL, device.PDL and not alone
    checkpoint = open_model(model, "cuda")
    vocab = checkpoint.config.vocab_size
    config = EngineConfig(device="cuda", max_len=4096, max_batch=256, max_step_tokens=8192)
    found: dict[str, tuple[Kernels, int, float]] = {}
    with Engine(checkpoint, config) as engine:
        for batch in BATCHES:
            prompts = workload.judge_prompts(-(-batch // workload.METRICS), vocab, seed=batch)[:batch]
            run(engine, prompts, MORE)  # graphs are captured, and the prompts are in the prefix cache
            kernels = {}
            if alone:
                kernels = difference(*(profiled(partial(run, engine, prompts, out)) for out in (FEW, MORE)))
            seconds = [min(run(engine, prompts, out) for _ in range(3)) for out in (FEW, MORE)]
            steps = MORE - FEW
            found[f"decode b={batch}"] = (kernels, steps, (seconds[1] - seconds[0]) / steps)
        count, length = PREFILL
        prompts = [
            p[-length:]
            for p in workload.judge_prompts(count, vocab, own=(length, length))[:: workload.METRICS]
        ]
        run(engine, prompts, 1)
        engine.reset_prefix_cache()
        wall = run(engine, prompts, 1)
        engine.reset_prefix_cache()
        kernels = profiled(partial(run, engine, prompts, 1)) if alone else {}
        found[f"prefill {count}x{length}"] = (kernels, 1, wall)
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    device.PDL = overlapping
    return found


def run(engine: Engine, prompts: list[workload.Prompt], out: int) -> float:
    """Seconds to answer all prompts with `out` tokens each; they reach the engine together."""
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)  # else its thread would take the first few into a step of their own
    start = time.perf_counter()
    futures = [engine.submit(prompt, params) for prompt in prompts]
    sys.setswitchinterval(interval)
    for future in futures:
        future.result()
    return time.perf_counter() - start


def profiled(work: Callable[[], object]) -> Kernels:
    """What the card did while `work` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_in(json.loads(path.read_text()))


def kernels_in(trace: dict[str, Any]) -> Kernels:
    """Kernels, copies and fills of a profiler's trace."""
    found: Kernels = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name = short_name(event["name"])
            launches, microseconds = found.get(name, (0, 0.0))
            found[name] = (launches + 1, microseconds + event["dur"])
    return found


def short_name(name: str) -> str:
    """A kernel's name without what a compiler wraps around it: namespaces, template arguments, parameters."""
    bare = re.sub(r"^void |\(anonymous namespace\)::", "", name)
    return re.sub(r"[<(].*", "", bare).rsplit("::", 1)[-1].strip() or name[:60]


def difference(few: Kernels, more: Kernels) -> Kernels:
    """What the longer run did beyond the shorter one."""
    return {
        name: (count - few.get(name, (0, 0.0))[0], microseconds - few.get(name, (0, 0.0))[1])
        for name, (count, microseconds) in more.items()
        if count > few.get(name, (0, 0.0))[0]
    }


def step_result(kernels: Kernels, steps: int, seconds: float) -> dict[str, Any]:
    """The fields of one kind of step; times and launches are those of one step."""
    if not kernels:
        raise SystemExit("the profiler saw no kernel")
    total = sum(microseconds for _, microseconds in kernels.values())
    rows = [
        {"name": name, "us": us / steps, "launches": count / steps, "share": us / total}
        for name, (count, us) in sorted(kernels.items(), key=lambda item: -item[1][1])
    ]
    return {"wall_us": seconds * 1e6, "kernel_us": total / steps, "kernels": rows}


if __name__ == "__main__":
    main()
