"""Products with quantized weights on the shapes of a model: microseconds, share of the copy rate, of bfloat16's rate.

Every kind is timed as it serves (packed codes, bfloat16 activations), and int8 with rounded activations beside them,
against the plain bfloat16 product of the same shape; graphs over rotating weights are replayed in turns. The bits of a
packed product are compared with those of the plain one with the same weights: a difference is exit code 1.

usage: python bench/quantized_products.py [--model 8b] [--out bench/results/quantized-products-h200.json]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import result
from bench.invariance_cost import graph_of, medians, warm_up, weights_of
from bench.limits import copy_rate
from bench.random_model import QUANTIZED, SHAPES, draw_codes

ROWS = (1, 16, 64, 256, 4096)
ROTATE_BYTES = 300 << 20
KINDS = {
    "int4 g128": QUANTIZED["int4"][:3],
    "Q4_K": QUANTIZED["q4_k_m"][:3],
    "Q5_K": (5, 32, "offset"),
    "Q6_K": QUANTIZED["q6_k"][:3],
    "Q8_0": QUANTIZED["q8_0"][:3],
    "Q2_K": (2, 16, "offset"),
    "Q3_K": (3, 16, "nothing"),
}
"""Bits, group and what stands beside a scale."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="8b", choices=tuple(SHAPES))
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    warm_up()
    copy = copy_rate("cuda", 4 << 30) * 1e9
    found: dict[str, Any] = {}
    different = 0
    for part, (out, width, gated) in weights_of(SHAPES[args.model]).items():
        found[part] = {}
        header = result.header("cuda") | {"model": args.model, "copy_GBps": copy / 1e9}
        for rows in ROWS:
            timed, differ = product_times(rows, out, width, gated, copy)
            found[part][str(rows)] = timed
            different += differ
            shown = "  ".join(
                f"{name} {kind['us']:.1f} us ({kind['of_copy']:.0%}, {kind['of_bf16_rate']:.2f} x bf16)"
                for name, kind in timed.items()
            )
            print(f"{part:9} {rows:5} rows: {shown}", flush=True)
            result.save(header | {"differ": different, "products": found}, args.out)
    return int(different > 0)


def product_times(
    rows: int, out: int, width: int, gated: bool, copy: float
) -> tuple[dict[str, dict[str, float]], int]:
    """Of each kind: microseconds, GB/s of packed bytes over the copy rate, speed over bfloat16's; and how many kinds
    have other bits than the plain product with their weights."""
    linear = importlib.import_module("ragate_engine.kernels.triton.linear")
    quantized = importlib.import_module("ragate_engine.kernels.triton.quantized")
    int8 = importlib.import_module("ragate_engine.kernels.triton.int8")
    x = torch.randn(max(8, rows), width, device="cuda", dtype=torch.bfloat16)
    real = torch.tensor([rows], device="cuda", dtype=torch.int32)
    activation = "silu" if gated else None
    works: dict[str, list[Callable[[], object]]] = {}
    sizes: dict[str, int] = {}
    different = 0
    for name, (bits, group, beside) in KINDS.items():
        if width % group:
            continue
        shape = (out // 2 if gated else out, width)
        halves = [
            draw_codes(half, shape, 0, "cuda", bits, group, beside) for half in ("gate", "up")[: 1 + gated]
        ]
        packed = quantized.pack_quantized(halves, gated)[0]
        dense = (
            linear.pack_gated(*(quantized.dequantize(quantized.pack_quantized([half])[0]) for half in halves))
            if gated
            else linear.Packed(quantized.dequantize(packed))
        )
        mine = quantized.product(x, packed, None, False, activation, real)[:rows]
        plain = linear.product(x, dense, None, False, activation, real)[:rows]
        if packed.segments > 1:  # the plain product of each, added in their order
            span = packed.low.shape[1] * quantized.walk_of(bits, group).block // packed.segments
            parts = []
            for at in range(0, width, span):
                part = linear.Packed(dense.weight[:, at : at + span].contiguous())
                parts.append(linear.product(x[:, at : at + span].contiguous(), part, None, True, None, real))
            plain = functools.reduce(torch.add, parts).to(x.dtype)[:rows]
        different += not torch.equal(mine, plain)
        sizes[name] = packed.nbytes
        copies = [packed, *(clone(packed) for _ in range(rotations(sizes[name]) - 1))]
        works[name] = [partial(quantized.product, x, one, None, False, activation, real) for one in copies]
        if "bf16" not in works:
            whole = int8.pack_int8(halves, gated)
            sizes["int8"] = whole.codes.nbytes
            copies = [whole, *(clone(whole) for _ in range(rotations(sizes["int8"]) - 1))]
            works["int8"] = [partial(int8.product, x, one, None, activation, real) for one in copies]
            sizes["bf16"] = dense.weight.nbytes
            copies = [dense, *(clone(dense) for _ in range(rotations(sizes["bf16"]) - 1))]
            works["bf16"] = [partial(linear.product, x, one, None, False, activation, real) for one in copies]
    graphs = {name: graph_of(work) for name, work in works.items()}
    times: dict[str, float] = {}
    for name, graph in graphs.items():
        times |= medians({name: graph}, len(works[name]))
    return {
        name: {
            "us": seconds * 1e6,
            "bytes": sizes[name],
            "of_copy": sizes[name] / seconds / copy,
            "of_bf16_rate": times["bf16"] / seconds,
            "tflops": 2 * rows * out * width / seconds / 1e12,
        }
        for name, seconds in times.items()
    }, different


def rotations(size: int) -> int:
    """How many copies of a weight keep it out of the L2 cache."""
    return max(2, min(40, ROTATE_BYTES // size))


def clone(packed: Any) -> Any:
    """The same weight in other memory."""
    fields = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(packed).items()}
    return type(packed)(**fields)


if __name__ == "__main__":
    sys.exit(main())
