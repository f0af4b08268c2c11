"""What the same bits in any company cost: our kernels as they run, against a free choice of kernels for each shape.

Products: the tile that serving takes, against the best of that, of every tile, and of two, four and eight segments of
K added by a second kernel (which changes bits, so serving may not). Attention: the softmax that starts afresh at every
chunk of 256 keys and the split that serving takes, against the same kernel that never starts afresh or splits. The cost
of a layer is the sum over its kernels; graphs over rotating weights are replayed in turns. cuBLAS is shown beside them:
it changes bits with the row count, has no activation at its end and is not charged for one.

usage: python bench/invariance_cost.py [--models 8b,135m] [--out bench/results/invariance-cost-h200.json]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from bench import result
from bench.random_model import SHAPES
from ragate_engine.config import ModelConfig
from ragate_engine.kernels import HeadShape, StepInputs

ROWS = (1, 32, 256, 1024, 8192)
OURS, CUBLAS = "ours", "cuBLAS"
TILE_ROWS = (16, 64, 128, 256, 8192)
ROTATE_BYTES = 300 << 20
BUCKETS = {1: 8, 32: 64}
"""Rows are padded to these."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="8b,135m")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    found = result.header("cuda") | {"models": {}}
    warm_up()
    for name in args.models.split(","):
        model = SHAPES[name]
        steps: dict[str, Any] = {}
        for rows in ROWS:
            products = {part: product_times(rows, *shape) for part, shape in weights_of(model).items()}
            attention = attention_times(model, rows)
            ours = sum(times[OURS] for times in products.values()) + attention[OURS]
            free = sum(times["free"] for times in products.values()) + attention["free"]
            library = (
                sum(min(times["free"], times[CUBLAS]) for times in products.values()) + attention["free"]
            )
            steps[str(rows)] = {
                "products": products,
                "attention": attention,
                "ours_us": ours * 1e6,
                "free_us": free * 1e6,
                "cost": ours / free - 1,
                "with_cublas_us": library * 1e6,
            }
            print(
                f"{name:5} {rows:5} rows: a layer {ours * 1e6:8.1f} us, free {free * 1e6:8.1f} us, "
                f"cost {100 * (ours / free - 1):5.1f} %; with cuBLAS where it is faster {library * 1e6:8.1f} us",
                flush=True,
            )
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


def graph_of(works: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """`works`, captured together."""
    works[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    return graph


def medians(graphs: dict[str, torch.cuda.CUDAGraph], count: int, rounds: int = 9) -> dict[str, float]:
    """Median seconds of one of the `count` works in each graph, the graphs taking turns: clocks and heat move."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(found) / count for name, found in times.items()}


def warm_up(seconds: float = 1.0) -> None:
    """Bring the card from its resting clocks."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


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

    served = linear.best_tile(padded, out, width, gated)
    works: dict[str, list[Callable[[], object]]] = {OURS: [partial(run, w) for w in weights]}
    tiles = [
        linear.best_tile(m, n, k, gated)
        for m in TILE_ROWS
        for n in (512, 2048, 8192, 32768)
        for k in (512, 4096)
    ]
    for tile in dict.fromkeys(tiles):
        if tile != served and (tile.persistent or rows <= 64 * tile.rows):
            works[f"tile {tuple(tile)}"] = [partial(run, w, tile) for w in weights]
    plain = x[:rows]
    works[CUBLAS] = [partial(torch.matmul, plain, w.weight.T) for w in weights]
    for segments in (2, 4, 8):
        part = width // segments
        if rows > 256 or part % 64:
            continue
        # K in segments: the products of one launch, [segments * out, part], write float32, which a second one adds up
        inputs = x[:, :part].contiguous()
        sums = torch.empty(padded, segments * out, device="cuda")
        y = torch.empty(padded, out // (2 if gated else 1), device="cuda", dtype=torch.bfloat16)

        def split(
            w: Any,
            inputs: torch.Tensor = inputs,
            sums: torch.Tensor = sums,
            y: torch.Tensor = y,
            n: int = segments,
        ) -> None:
            pieces = linear.Packed(w.weight.view(n * out, -1))
            linear.product(inputs, pieces, None, True, None, real, sums)
            _add_segments[(triton.cdiv(y.shape[1], 256), padded)](sums, y, out, n, gated, 256)

        works[f"{segments} segments"] = [partial(split, w) for w in weights]
    times = medians({name: graph_of(work) for name, work in works.items()}, count)
    free = min(value for name, value in times.items() if name != CUBLAS)
    return {"free": free, **times}


@triton.jit
def _add_segments(sums, y, N, segments: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """What follows a product in segments of K: their sum, with the activation of a gated pair."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = N // 2 if GATED else N
    inside = column < width
    at = sums + row.to(tl.int64) * N * segments
    if GATED:
        gate, up = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(segments):
            gate += tl.load(at + i * N + 2 * column, inside, 0.0)
            up += tl.load(at + i * N + 2 * column + 1, inside, 0.0)
        found = gate / (1.0 + tl.exp(-gate)) * up
    else:
        found = tl.zeros((BLOCK,), tl.float32)
        for i in range(segments):
            found += tl.load(at + i * N + column, inside, 0.0)
    tl.store(y + row.to(tl.int64) * width + column, found.to(y.dtype.element_ty), inside)


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

    kept: list[object] = []  # what the graphs read must outlive them

    def graph(programs: int, chunk: int | None) -> torch.cuda.CUDAGraph | None:
        plan = plan_of.plan_attention(
            (ends - counts).astype(np.int32), starts, counts, tables, shape, programs, 16384
        )
        if chunk is not None and plan.parts:
            return None
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
            run = partial(ops.attention, qkv)
            works = [partial(run, kv, step, shape, shape.head_dim**-0.5, None, None) for kv in caches]
            kept.extend(works)
            return graph_of(works)
        finally:
            vars(plan_of)["CHUNK"] = before

    graphs = {
        OURS: graph(device.programs(), None),
        "unsplit": graph(1, None),
        "one softmax": graph(1, 1 << 20),
    }
    times = medians({name: found for name, found in graphs.items() if found is not None}, len(caches))
    return {"free": min(times.values()), **times}


if __name__ == "__main__":
    main()
