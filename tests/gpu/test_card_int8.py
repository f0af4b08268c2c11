"""On the card: products in int8 are the exact sums, and a row has the same bits in every tile and company.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from on_card import BF16, CARD, NEEDS_CARD, compile_together, error, on_device

pytest.importorskip("triton")
from ragate_engine.kernels.triton.int8 import best_tile, pack_int8, product, quantize_rows, round_rows

pytestmark = NEEDS_CARD
ROWS = (1, 2, 16, 17, 64, 65, 200, 257, 1000)


def rows_of(count: int, width: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(count, width, device=CARD) * torch.logspace(-2, 2, count, device=CARD)[:, None]
    x[3] = 0
    return x.to(BF16)


@pytest.mark.parametrize("width", [576, 1536, 14336])
def test_rows_are_rounded_each_by_its_own_largest_value(width: int) -> None:
    x = rows_of(300, width)
    q, scales = quantize_rows(x, None)
    expected = round_rows(x)
    assert torch.equal(q, expected[0]) and torch.equal(scales, expected[1])


@pytest.mark.parametrize(("inner", "outer"), [(576, 960), (4096, 6144), (14336, 4096), (1536, 17920)])
def test_sums_are_exact_in_every_tile(inner: int, outer: int) -> None:
    x = rows_of(max(ROWS), inner)
    packed = pack_int8([torch.randn(outer, inner, device=CARD) * inner**-0.5])
    bias = torch.randn(outer, device=CARD).to(BF16)
    q, scales = round_rows(x)
    sums = (q.double() @ packed.codes.double().T).float()
    expected = (sums * (scales[:, None] * packed.scales) + bias.float()).to(BF16)
    compile_together(partial(product, x[:n].clone(), packed, bias, None, None) for n in ROWS)
    full = product(x, packed, bias, None, None)
    assert error(full, expected) < 1e-5  # a fused multiply-add at the end may round the other way
    for rows in ROWS:
        assert torch.equal(product(x[:rows].clone(), packed, bias, None, None), full[:rows]), rows
    for tile in {best_tile(m, n) for m in (1, 100, 4096) for n in (960, 28672)}:
        assert torch.equal(product(x, packed, bias, None, None, tile=tile), full), tile


def test_gated_pairs_and_rows_past_the_count() -> None:
    gate, up = (torch.randn(1536, 576, device=CARD) * 576**-0.5 for _ in range(2))
    packed = pack_int8([gate, up], gated=True)
    x = rows_of(256, 576)
    full = product(x, packed, None, "silu", None)
    exact = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert error(full, exact) < 0.05
    x[100:] = float("nan")
    assert torch.equal(product(x, packed, None, "silu", on_device(100))[:100], full[:100])
