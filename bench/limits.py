"""What the machine can do at best, through the simplest code: the ceilings that every other result is held against.

Copy bandwidth (bytes read plus written), matrix product on random data, a linear layer of one row (graph replays over
rotating weights), time a kernel inside a graph and one launched from Python, pinned copies from host to card, reads
from the page cache. Medians of repeated runs after a warm-up.

usage: python bench/limits.py [--out bench/results/limits-h200.json]        (half a minute; --device cpu for a look)
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import result

LINEARS = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate, up": (28672, 4096),
    "8b down": (4096, 14336),
    "8b head": (128256, 4096),
    "135m gate, up": (3072, 576),
    "135m head": (49152, 576),
}
"""[out_features, in_features] of weights whose one-row product is timed."""
ROTATE_BYTES = 400 << 20
"""Weights to rotate among: several times the card's cache."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small tensors: it runs, and measures caches")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    limits: dict[str, Any] = {
        "copy_GBps": copy_rate(args.device, 1 << 24 if args.small else 4 << 30),
        "matmul_TFLOPs": matmul_rate(args.device, 256 if args.small else 8192),
        "page_cache_read_GBps": page_cache_rate(1 << 22 if args.small else 2 << 30),
    }
    if args.device == "cuda":
        limits["one_row_linear_GBps"] = {name: one_row_rate(*shape) for name, shape in LINEARS.items()}
        limits["matmul_sustained_TFLOPs"] = sustained_matmul_rate(8192, seconds=2.0)
        limits |= launch_times() | transfer_rates(1 << 30)
    for name, value in limits.items():
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name + ' ' + part:40} {number:10.2f}")
    found = result.header(args.device) | {"limits": limits}
    result.save(found, args.out)
    return found


def seconds_of(work: Callable[[], object], device: str, runs: int = 15, warm_up: int = 3) -> float:
    """Median seconds of `work` after some warm-up runs; by the card's own events where there is one."""
    for _ in range(warm_up):
        work()
    times = []
    if device == "cpu":
        for _ in range(runs):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_rate(device: str, size: int) -> float:
    """GB/s of a copy within the device's memory, bytes read plus bytes written."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device) / 1e9


def matmul_rate(device: str, n: int) -> float:
    """TFLOP/s of an n x n x n product of random bfloat16 (float32 on a CPU)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, runs=40) / 1e12


def sustained_matmul_rate(n: int, seconds: float) -> float:
    """TFLOP/s of the same product without a pause, in the last part of some seconds: the card is warm by then."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def work() -> None:
        for _ in range(100):
            torch.mm(a, b, out=out)

    rate = 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        rate = 100 * 2 * n**3 / seconds_of(work, "cuda", runs=1, warm_up=0) / 1e12
    return rate


def one_row_rate(outer: int, inner: int) -> float:
    """GB/s of weights read by torch's one-row linear layer, in a graph, over weights that no cache can hold."""
    copies = max(2, ROTATE_BYTES // (2 * outer * inner))
    weights = [torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(1, inner, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(1, outer, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        for weight in weights:
            torch.mm(x, weight.t(), out=out)

    graph = captured(work)
    return 2 * outer * inner * copies / seconds_of(graph.replay, "cuda") / 1e9


def launch_times(kernels: int = 1000) -> dict[str, float]:
    """Microseconds of a kernel that does nothing to speak of: within a graph, and launched one by one."""
    x = torch.zeros(1, device="cuda")

    def work() -> None:
        for _ in range(kernels):
            x.add_(1.0)

    graph = captured(work)
    one = captured(lambda: x.add_(1.0))
    return {
        "graph_kernel_us": seconds_of(graph.replay, "cuda") / kernels * 1e6,
        "graph_of_one_us": seconds_of(one.replay, "cuda") * 1e6,
        "eager_kernel_us": seconds_of(work, "cuda") / kernels * 1e6,
    }


def transfer_rates(size: int) -> dict[str, float]:
    """Copies from pinned host memory to the card: GB/s of a large one, microseconds of a plan buffer's 64 KiB."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    host.random_()
    card = torch.empty(size, dtype=torch.uint8, device="cuda")
    large = seconds_of(lambda: card.copy_(host, non_blocking=True), "cuda", runs=5)
    plan, there = host[: 1 << 16], card[: 1 << 16]
    small = seconds_of(lambda: there.copy_(plan, non_blocking=True), "cuda")
    return {"pinned_to_card_GBps": size / large / 1e9, "pinned_64KiB_to_card_us": small * 1e6}


def page_cache_rate(size: int) -> float:
    """GB/s of reading a file that is in memory, by one thread, into a buffer of 64 MiB."""
    chunk = os.urandom(1 << 20) * min(64, size >> 20)
    buffer = memoryview(bytearray(len(chunk)))
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        for _ in range(size // len(chunk)):
            file.write(chunk)

        def work() -> None:
            file.seek(0)
            while file.readinto(buffer):
                pass

        return size // len(chunk) * len(chunk) / seconds_of(work, "cpu", runs=3) / 1e9


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after a warm-up on the side stream that capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


if __name__ == "__main__":
    main()
