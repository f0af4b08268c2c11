"""What the same bits in any company cost: our kernels as they run, against a free choice of kernels for each shape.

Products: the tile that serving takes, against the best of that, of every tile, of two and four segments of K added
afterwards (which changes bits, so serving may not), and of cuBLAS (which changes bits with the row count). cuBLAS has
no activation at its end and is not charged for one. Attention: the softmax that starts afresh at every chunk of 256
keys, against the same kernel that never does. The cost of a step is the sum over its kernels; a graph replay over
rotating weights times each.

usage: python bench/invariance_cost.py [--models 8b,135m] [--out bench/results/invariance-cost-h200.json]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import result
from bench.random_model import SHAPES
from ragate_engine.config import ModelConfig
from ragate_engine.kernels import HeadShape, StepInputs

ROWS = (1, 32, 256, 1024, 8192)
ROTATE_BYTES = 300 << 20
BUCKETS = {1: 16, 32: 64}
"""Rows are padded to these."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="8b,135m")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    found = result.header("cuda") | {"models": {}}
    for name in args.models.split(","):
        model = SHAPES[name]
        steps: dict[str, Any] = {}
        for rows in ROWS:
            products = {part: product_times(rows, *shape) for part, shape in weights_of(model).items()}
            attention = attention_times(model, rows)
            ours = sum(times["ours"] for times in products.values()) + attention["ours"]
            free = sum(times["free"] for times in products.values()) + attention["free"]
            steps[str(rows)] = {
                "products": products,
                "attention": attention,
                "ours_us": ours * 1e6,
                "free_us": free * 1e6,
                "cost": ours / free - 1,
            }
            print(f"{name:5} {rows:5} rows: a layer {ours * 1e6:8.1f} us, free {free * 1e6:8.1f} us, "
                  f"cost {100 * (ours / free - 1):5.1f} %", flush=True)  # fmt: skip
        found["models"][name] = steps
    result.save(found, args.out)
    return found


def weights_of(model: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """(out, in, gated) of the four products of a layer."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": (q + 2 * kv, model.hidden_size, False),
        "o": (model.hidden_size, q, False),
        "gate, up": (2 * model.intermediate_size, model.hidden_size, True),
        "down": (model.hidden_size, model.intermediate_size, False),
    }


def graph_seconds(works: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median seconds of one of `works`, captured together in a graph."""
    works[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(times)) / len(works)


def product_times(rows: int, out: int, width: int, gated: bool) -> dict[str, float]:
    """Seconds of a product: as served, and of each free choice."""
    linear = importlib.import_module("ragate_engine.kernels.triton.linear")
    count = max(2, min(40, ROTATE_BYTES // (out * width * 2)))
    weights = [
        linear.Packed((torch.randn(out, width, device="cuda") * width**-0.5).bfloat16(), gated)
        for _ in range(count)
    ]
    padded = BUCKETS.get(rows, rows)
    x = torch.randn(padded, width, device="cuda", dtype=torch.bfloat16)
    real = torch.tensor([rows], device="cuda", dtype=torch.int32)
    activation = "silu" if gated else None

    def run(packed: Any, tile: Any = None) -> object:
        return linear.product(x, packed, None, False, activation, real, tile=tile)

    times = {"ours": graph_seconds([lambda w=w: run(w) for w in weights])}  # type: ignore[misc]
    tiles = [linear.best_tile(m, n, width, gated) for m in (16, 64, 256, 8192) for n in (2048, 8192, 32768)]
    for tile in dict.fromkeys(tiles):
        if rows > 64 * tile.rows and not tile.persistent:
            continue
        times[f"tile {tuple(tile)}"] = graph_seconds([lambda w=w, t=tile: run(w, t) for w in weights])  # type: ignore[misc]
    plain = x[:rows]
    times["cuBLAS"] = graph_seconds([lambda w=w: plain @ w.weight.T for w in weights])  # type: ignore[misc]
    for segments in (2, 4):
        part = width // segments
        if rows > 64 or part % 64:
            continue
        pieces = [
            [linear.Packed(w.weight[:, i * part : (i + 1) * part].contiguous()) for i in range(segments)]
            for w in weights
        ]
        inputs = [x[:, i * part : (i + 1) * part].contiguous() for i in range(segments)]
        sums = torch.empty(segments, padded, out, device="cuda")

        def split(parts: list[Any], inputs: list[Any] = inputs, sums: torch.Tensor = sums) -> object:
            # one stream has to run the segments in turn: the time of the first stands for all, side by side
            return linear.product(inputs[0], parts[0], None, True, None, real, sums[0])

        times[f"{segments} segments, at best"] = graph_seconds([lambda p=p: split(p) for p in pieces])  # type: ignore[misc]
    # segments side by side still read the whole weight: no faster than memory
    floor = out * width * 2 / 4.24e12
    free = min(max(value, floor) if "segments" in name else value for name, value in times.items())
    return {"ours": times["ours"], "free": free, **{k: v for k, v in times.items() if k != "ours"}}


def attention_times(model: ModelConfig, rows: int) -> dict[str, float]:
    """Seconds of attention for `rows` rows: single tokens at a context of 1,000, or runs of 1,024 new tokens."""
    plan_of = importlib.import_module("ragate_engine.kernels.triton.plan")
    ops = importlib.import_module("ragate_engine.kernels.triton.attention")
    device = importlib.import_module("ragate_engine.kernels.triton.device")
    shape = HeadShape(model.num_heads, model.num_kv_heads, model.head_dim, model.head_dim)
    requests, tokens = (rows // 1024, 1024) if rows >= 1024 else (rows, 1)
    context = 1024
    starts = np.full(requests, context - tokens, np.int32)
    counts = np.full(requests, tokens, np.int32)
    blocks = context // 16
    tables = (
        np.random.default_rng(0).permutation(requests * blocks).astype(np.int32).reshape(requests, blocks)
    )
    layers = max(2, min(32, ROTATE_BYTES // (requests * context * shape.kv_heads * shape.head_dim * 4) + 1))
    caches = [
        ops.make_kv(requests * blocks, shape.kv_heads, shape.head_dim, torch.bfloat16, torch.device("cuda"))
        for _ in range(layers)
    ]
    for cache in caches:
        cache.k.normal_(), cache.v.normal_()
    qkv = torch.randn(
        rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    ends = np.cumsum(counts)
    position = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])

    def card(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int32)).cuda()

    def seconds(programs: int, chunk: int | None) -> float:
        plan = plan_of.plan_attention(
            (ends - counts).astype(np.int32), starts, counts, tables, shape, programs, 16384
        )
        if chunk is not None and plan.parts:
            return float("inf")
        buffer = np.zeros(plan_of.HEADER + plan_of.packed_size(plan, tables), np.int32)
        plan_of.pack(buffer, plan_of.HEADER, plan, tables)
        buffer[plan_of.ROWS] = rows
        partials = torch.empty(16384 * shape.heads * (shape.head_dim + 2), device="cuda")
        work = ops.Work(
            card(buffer), card(plan.part_of), partials, len(plan.small) > 0, len(plan.big) > 0, plan.parts > 0
        )
        nothing = card(np.zeros(1))
        step = StepInputs(card(position), nothing, nothing, nothing, work, nothing)
        before = plan_of.CHUNK
        vars(plan_of)["CHUNK"] = chunk or before
        try:
            return graph_seconds(
                [
                    lambda kv=kv: ops.attention(qkv, kv, step, shape, shape.head_dim**-0.5, None, None)  # type: ignore[misc]
                    for kv in caches
                ]
            )
        finally:
            vars(plan_of)["CHUNK"] = before

    ours = seconds(device.programs(), None)
    whole, never = seconds(1, None), seconds(1, 1 << 20)
    return {"ours": ours, "free": min(ours, whole, never), "unsplit": whole, "one softmax": never}


if __name__ == "__main__":
    main()
