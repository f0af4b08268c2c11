"""How fast a machine moves bytes and multiplies: by the data sheet of a known card, else measured in a second."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ragate_engine.roofline import Ceilings

CARDS = {
    r"NVIDIA B200": (8000, 2250),
    r"NVIDIA H200": (4800, 989.5),
    r"NVIDIA H200 NVL": (4800, 835.5),
    r"NVIDIA H100 80GB HBM3": (3350, 989.5),
    r"NVIDIA H100 NVL": (3938, 835.5),
    r"NVIDIA H100 PCIe": (2000, 756.5),
    r"NVIDIA A100-SXM4-80GB": (2039, 312),
    r"NVIDIA A100 80GB PCIe": (1935, 312),
    r"NVIDIA A100-(SXM4|PCIE)-40GB": (1555, 312),
    r"NVIDIA A40": (696, 149.7),
    r"NVIDIA A30": (933, 165),
    r"NVIDIA A10": (600, 125),
    r"NVIDIA L40S": (864, 362),
    r"NVIDIA L40": (864, 181),
    r"NVIDIA L4": (300, 121),
    r"NVIDIA RTX A6000": (768, 154.8),
    r"NVIDIA RTX 6000 Ada Generation": (960, 364.2),
    r"NVIDIA GeForce RTX 5090": (1792, 209.5),
    r"NVIDIA GeForce RTX 4090": (1008, 165.2),
    r"NVIDIA GeForce RTX 3090": (936, 71),
}
"""Memory bandwidth in GB/s and dense bfloat16 TFLOP/s, summed in float32, by the name that the driver gives.

Sources: NVIDIA's data sheets of each data-centre and workstation card, which state rates with sparsity (halved here);
for GeForce the appendices of the GA102, Ada and RTX Blackwell architecture whitepapers. Names that stand for several
cards (laptops, the two RTX 3080, slices of a card) are not here: those are measured."""

REACHED = (0.876, 0.745)
"""Of the data sheet's bandwidth and matrix rate, what a copy and a large product reach on an H200
(bench/results/limits-h200.json)."""

MOVED_BYTES = 256 << 20
"""More than any cache holds."""
SIDE = 4096
"""Rows and columns of a product on a card."""
SECONDS = 0.5
"""For each of the two measurements."""


def of_card(name: str, device: torch.device) -> Ceilings:
    """The rates of the card called `name`; one that is not in `CARDS` is measured, on `device`. Imports torch."""
    from ragate_engine.roofline import Ceilings

    for pattern, (gigabytes, teraflops) in CARDS.items():
        if re.fullmatch(pattern, name):
            origin = (
                f"data sheet, {gigabytes:,} GB/s and {teraflops:g} bf16 TFLOP/s, of which copies and products reach "
                f"{REACHED[0]:.0%} and {REACHED[1]:.0%} on an H200"
            )
            return Ceilings(teraflops * 1e12 * REACHED[1], gigabytes * 1e9 * REACHED[0], origin)
    return _measured_card(device)


def of_cpu(threads: int) -> Ceilings:
    """The rates of this CPU, measured by products of the kernels that serve. Imports torch.

    One row reads weights as decoding does; a copy, which writes as well, has been seen to move less.
    """
    import torch

    from ragate_engine.kernels import choose
    from ragate_engine.roofline import Ceilings

    kernels, _ = choose(torch.device("cpu"), "auto")
    if hasattr(kernels, "set_threads"):
        kernels.set_threads(threads)
    width, rows = 1024, 64
    large = kernels.pack_linear(torch.ones(MOVED_BYTES // 4 // width, width))
    small = kernels.pack_linear(torch.ones(width, width))
    # made before the clock runs: torch's own threads would wait on the cores that the kernels need
    one, many = torch.ones(1, width), torch.ones(rows, width)
    bandwidth = MOVED_BYTES / seconds_of(lambda: kernels.linear(one, large, None))
    flops = 2 * rows * width**2 / seconds_of(lambda: kernels.linear(many, small, None))
    origin = (
        f"measured on {threads} threads, {bandwidth / 1e9:.0f} GB/s by a product of one row, "
        f"{flops / 1e9:,.0f} float32 GFLOP/s by one of {rows}"
    )
    return Ceilings(flops, bandwidth, origin)


def _measured_card(device: torch.device) -> Ceilings:
    import torch

    from ragate_engine.roofline import Ceilings

    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * SIDE**3 / seconds_of(lambda: torch.mm(a, b), torch.cuda.synchronize)
    source = torch.ones(MOVED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * MOVED_BYTES / seconds_of(lambda: target.copy_(source), torch.cuda.synchronize)
    origin = f"measured, a copy {bandwidth / 1e9:,.0f} GB/s, a product {flops / 1e12:,.1f} bf16 TFLOP/s"
    return Ceilings(flops, bandwidth, origin)


def seconds_of(work: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """The least seconds that `work` took, done again and again for half a second; `wait` returns when it is over."""
    work()  # memory is touched and kernels are chosen before the clock runs
    wait()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)
