"""The engine's speed on the points that the peer is measured on, beside the peer and beside what the card could do.

Every point is run twice: the first pass also captures graphs, the second is the figure. Printed and written: tokens a
second, ratio to vLLM (bench/results, or a log of the same session), share of the roofline; KV slots that are held but
empty on the judge workload, beside those of a contiguous allocator; seconds from process start to the first token.

usage: python bench/engine.py 135m|1.5b|8b|MODEL_PATH [--points decode,prefill,judge,startup] [--out JSON]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench import peer, result, roofline, workload
from bench.random_model import QUANTIZED, SHAPES, open_model, write_safetensors
from ragate_engine import Engine, EngineConfig, SamplingParams, Usage
from ragate_engine.weights import Checkpoint, names

POINTS = ("startup", "decode", "prefill", "judge")
MAX_LEN = 4096


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(arguments)
    sizes = workload.SMALL if args.small else workload.FULL
    limits = roofline.ceilings(args.limits) if args.limits or args.device == "cuda" else None
    started = None
    if "startup" in args.points:  # first: a fresh process must find the card as it will, empty and unused
        started = startup(args.model, args.device, args.weights, args.folder, args.starts)
    found = result.header(args.device) | {
        "model": args.model,
        "settings": {"max_batch": args.max_batch, "max_step_tokens": args.max_step_tokens, "max_len": MAX_LEN,
                     "kv_dtype": args.kv_dtype, "weights": args.weights},
        "sizes": vars(sizes),
        "limits": vars(limits) if limits else None,
    }  # fmt: skip
    rival = _peer(args)
    if rival is not None and not args.small and args.device == "cuda":
        found["peer"] = rival.describe()
    else:
        rival = None
    if started is not None:
        found["startup"] = started
    if set(args.points) - {"startup"}:
        checkpoint = open_model(args.model, args.device)
        config = EngineConfig(
            device=args.device,
            max_len=min(MAX_LEN, checkpoint.config.max_len),
            max_batch=args.max_batch,
            max_step_tokens=args.max_step_tokens,
            kv_bytes=args.kv_bytes,
            kv_dtype=args.kv_dtype,
            weights=args.weights,
        )
        with Engine(checkpoint, config) as engine:
            gc.freeze()  # as ragate does (ragate/session.py)
            bench = Bench(engine, checkpoint, sizes, limits, rival, args.max_batch, args.kv_dtype)
            found |= bench.run(args.points)
            found["engine"] = engine.describe()
    report(found)
    result.save(found, args.out)
    return found


@dataclass
class Bench:
    """An engine, the work to time on it, and what to hold the times against."""

    engine: Engine
    checkpoint: Checkpoint
    sizes: workload.Sizes
    limits: roofline.Ceilings | None
    rival: peer.Peer | None
    batch: int
    kv_dtype: str

    @cached_property
    def shape(self) -> roofline.Shape:
        """The model as work."""
        kv_size = 1.0 if "fp8" in self.kv_dtype else 2.0
        return roofline.Shape(self.checkpoint.config, _weight_size(self.checkpoint), kv_size)

    def run(self, points: Sequence[str]) -> dict[str, Any]:
        """The points asked for, by name."""
        vocab, sizes = self.checkpoint.config.vocab_size, self.sizes
        time_of(self.engine, workload.warm_up(vocab, sizes), sizes.judge_out)
        found: dict[str, Any] = {}
        if "decode" in points:
            found["decode"] = {
                str(batch): self.decode(workload.decode(batch, vocab, sizes))
                for batch in sizes.decode_batches
            }
        if "prefill" in points:
            found["prefill"] = self.prefill(workload.prefill(vocab, sizes))
        if "judge" in points:
            found["judge"] = self.judge(workload.judge(vocab, sizes))
        return found

    def decode(self, prompts: list[workload.Prompt]) -> dict[str, Any]:
        """Many tokens behind short prompts."""
        out = self.sizes.decode_out
        distinct = len({tuple(prompt) for prompt in prompts})
        work = self.shape.decode(len(prompts), distinct, len(prompts[0]), out)
        seconds = self.twice(prompts, out)
        theirs = self.rival.decode_tok_s.get(str(len(prompts))) if self.rival else None
        return self.point(seconds, work, len(prompts) * out, theirs)

    def prefill(self, prompts: list[workload.Prompt]) -> dict[str, Any]:
        """Prompts answered with one token."""
        lengths = [len(prompt) for prompt in prompts]
        seconds = self.twice(prompts, 1)
        theirs = self.rival.prefill_tok_s if self.rival else None
        return self.point(seconds, self.shape.prefill(lengths), sum(lengths), theirs)

    def judge(self, prompts: list[workload.Prompt]) -> dict[str, Any]:
        """The judge workload, twice from an empty cache, with the KV slots watched."""
        sizes = self.sizes
        seconds, watched = [], []
        before = self.engine.usage()
        for _ in range(2):
            self.engine.reset_prefix_cache()
            with Watch(self.engine) as watch:
                seconds.append(time_of(self.engine, prompts, sizes.judge_out))
            watched.append(watch)
        used = _difference(before, self.engine.usage())
        own = [len(prompt) - sizes.prefix for prompt in prompts]
        batch = min(self.batch, len(prompts))
        work = self.shape.judge(sizes.prefix, own, sizes.judge_out, batch)
        point = self.point(seconds, work, len(prompts) * sizes.judge_out, None)
        if self.rival and self.rival.judge_s:
            theirs = sum(self.rival.judge_s) / len(self.rival.judge_s)
            point |= {"peer_s": theirs, "ratio": theirs / (sum(seconds) / 2)}
        held, contiguous = used["kv_slots_held"], used["kv_slots_contiguous"]
        point["kv"] = {
            "unused_share": used["kv_slots_unused"] / max(1, held),
            "contiguous_unused_share": used["kv_slots_contiguous_unused"] / max(1, contiguous),
            "held_to_contiguous": held / max(1, contiguous),
            "over_time": watched[-1].series(),
        }
        return point | {"usage": used}

    def twice(self, prompts: list[workload.Prompt], out: int) -> list[float]:
        """Seconds of two passes, each from an empty prefix cache."""
        seconds = []
        for _ in range(2):
            self.engine.reset_prefix_cache()
            seconds.append(time_of(self.engine, prompts, out))
        return seconds

    def point(
        self, seconds: list[float], work: roofline.Work, tokens: int, theirs: float | None
    ) -> dict[str, Any]:
        """One result; `tokens` are those that its rate counts."""
        rate = tokens / seconds[-1]
        point: dict[str, Any] = {
            "seconds": seconds,
            "tok_s": rate,
            "flops": work.flops,
            "bytes": work.bytes,
        }
        if self.limits is not None:
            least = self.limits.seconds(work)
            point |= {"limit_s": least, "of_limit": least / seconds[-1], "bound": self.limits.bound(work)}
        return point if theirs is None else point | {"peer_tok_s": theirs, "ratio": rate / theirs}


def time_of(engine: Engine, prompts: list[workload.Prompt], out: int) -> float:
    """Seconds from the first prompt sent to the last of `out` tokens each answered."""
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    start = time.perf_counter()
    futures = [engine.submit(prompt, params) for prompt in prompts]
    answers = [future.result() for future in futures]
    seconds = time.perf_counter() - start
    if any(len(answer.tokens) != out for answer in answers):
        raise AssertionError(f"an answer has not the {out} tokens that were asked for")
    return seconds


class Watch:
    """Reads the engine's counters of KV slots fifty times a second while it is entered."""

    PERIOD = 0.02
    POINTS = 60

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.samples: list[tuple[float, Usage]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        start = time.perf_counter()
        while True:
            stopped = self._stop.wait(self.PERIOD)
            self.samples.append((time.perf_counter() - start, self.engine.usage()))
            if stopped:
                return

    def series(self) -> list[dict[str, float]]:
        """Shares of unused slots between at most 60 moments, where the engine ran."""
        step = max(1, len(self.samples) // self.POINTS)
        kept = self.samples[::step]
        rows = []
        for (_, a), (seconds, b) in zip(kept, kept[1:], strict=False):
            used = _difference(a, b)
            if used["kv_slots_held"] and used["kv_slots_contiguous"]:
                paged = used["kv_slots_unused"] / used["kv_slots_held"]
                contiguous = used["kv_slots_contiguous_unused"] / used["kv_slots_contiguous"]
                rows.append({"s": round(seconds, 3), "paged": paged, "contiguous": contiguous})
        return rows


def startup(model: str, device: str, weights: str, folder: Path | None, starts: int) -> dict[str, Any]:
    """Fresh processes from their start to the first token, the weights in the page cache.

    The first finds no compiled kernels; each of the others those of the one before it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(model)
        if model in SHAPES:
            path = folder or Path(temporary) / model
            if not (path / "config.json").exists():
                write_safetensors(SHAPES[model], path)
        began = time.perf_counter()
        size = _read_through(path)
        seconds = time.perf_counter() - began
        found = []
        for i in range(starts):
            cache = Path(temporary) / "kernels"
            if i == 0:
                shutil.rmtree(cache, ignore_errors=True)
            environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
            found.append(_start(path, device, weights, environment))
    return {
        "weight_bytes": size,
        "page_cache_read_GBps": size / seconds / 1e9,
        "cold_kernels": found[0],
        "warm": found[1:],
    }


def _start(path: Path, device: str, weights: str, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each phase of one process; the clock is the system's, the same in parent and child."""
    began = time.monotonic()
    script = Path(__file__).with_name("first_token.py")
    command = [sys.executable, str(script), str(path), device, weights]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{script.name} failed: {done.stderr.strip()[-2000:]}")
    clock = json.loads(done.stdout.splitlines()[-1])
    return {
        "total": clock["first_token"] - began,
        "python": clock["began"] - began,
        "imports": clock["imported"] - clock["began"],
        "load": clock["loaded"] - clock["imported"],
        "first_token": clock["first_token"] - clock["loaded"],
    }


def _read_through(path: Path) -> int:
    """Read a model's files once, so that they are in the page cache; returns their bytes."""
    buffer = bytearray(1 << 26)
    size = 0
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                size += count
    return size


def _weight_size(checkpoint: Checkpoint) -> float:
    """Bytes a value on average: of random weights by their kind, else as the files have it."""
    if not checkpoint.files:
        kind = QUANTIZED.get(checkpoint.quantization)
        return kind.size if kind is not None else 2.0
    values = sum(torch.Size(shape).numel() for shape in names.expected(checkpoint.config).values())
    return sum(file.stat().st_size for file in checkpoint.files) / values


def _difference(before: Usage, after: Usage) -> dict[str, Any]:
    """What the counters counted between two readings."""
    found: dict[str, Any] = {}
    for name, value in vars(after).items():
        old = getattr(before, name)
        if isinstance(value, dict):
            found[name] = {key: value[key] - old.get(key, 0.0) for key in value}
        else:
            found[name] = value - old
    return found


def _peer(args: argparse.Namespace) -> peer.Peer | None:
    if args.peer_log:
        return peer.from_log(args.peer_log, args.model)
    return peer.committed(args.model)


def report(found: dict[str, Any]) -> None:
    """One line a point."""
    print(f"{found['model']} on {found['hardware']}")
    points = {f"decode b={batch}": point for batch, point in found.get("decode", {}).items()}
    points |= {name: found[name] for name in ("prefill", "judge") if name in found}
    for name, point in points.items():
        passes = " ".join(f"{seconds:.3f}" for seconds in point["seconds"])
        line = f"{name:14} {point['tok_s']:9.0f} tok/s  passes {passes} s"
        if "limit_s" in point:
            line += f"  {point['of_limit']:4.0%} of the {point['bound']} limit ({point['limit_s']:.3f} s)"
        if "ratio" in point:
            line += f"  {point['ratio']:.2f} x {found['peer']['name']}"
        print(line)
    if "judge" in found:
        kv = found["judge"]["kv"]
        print(f"KV slots unused: {kv['unused_share']:.2%}, contiguous {kv['contiguous_unused_share']:.2%}")
        phases = ", ".join(f"{name} {s:.2f}" for name, s in found["judge"]["usage"]["seconds"].items())
        print(f"judge, both passes: {found['judge']['usage']['steps']} steps; seconds by phase: {phases}")
    if "startup" in found:
        for name, start in [("cold kernels", found["startup"]["cold_kernels"])] + [
            ("warm", start) for start in found["startup"]["warm"]
        ]:
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in start.items())
            print(f"start to first token, {name}: {phases}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help=f"one of {', '.join(SHAPES)} (random weights), or a path")
    parser.add_argument(
        "--points", type=lambda text: text.split(","), default=list(POINTS), help=",".join(POINTS)
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="little of everything: it runs, and shows no speed"
    )
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    parser.add_argument("--kv-dtype", choices=("auto", "fp8_e4m3", "fp8_e5m2"), default="auto")
    parser.add_argument("--weights", choices=("auto", "packed", "dense"), default="auto")
    parser.add_argument("--kv-bytes", type=int)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of the point startup")
    parser.add_argument("--folder", type=Path, help="where the weights of the point startup are, or are left")
    parser.add_argument("--limits", type=Path, help="a result of bench/limits.py")
    parser.add_argument("--peer-log", type=Path, help="what bench/vllm_peer.py printed in the same session")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    return parser


if __name__ == "__main__":
    main()
