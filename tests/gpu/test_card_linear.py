"""On the card: products and gated pairs are right, and a row has the same bits whatever its company and its tile.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from on_card import BF16, CARD, FP16, FP32, NEEDS_CARD, compile_together, error, name_of, on_device

pytest.importorskip("triton")
from ragate_engine.kernels.triton.linear import (
    Tile,
    best_tile,
    gated,
    linear,
    pack_gated,
    pack_linear,
    product,
)

pytestmark = NEEDS_CARD
ROWS = (1, 2, 15, 16, 17, 63, 64, 65, 200, 256, 257, 1000, 4096)
TOLERANCE = {BF16: 4e-3, FP16: 1e-3, FP32: 1e-5}
WIDE_TOLERANCE = 5e-4
"""Of sums that leave in float32: far below what rounding to bfloat16 would cost."""


class Case(NamedTuple):
    """A weight [outer, inner] (of a gated pair both halves) and what is done beside the product."""

    inner: int
    outer: int
    bias: bool = False
    wide: bool = False
    activation: str | None = None
    dtype: torch.dtype = BF16


CASES = [
    *(
        Case(inner, outer, bias, wide)
        for inner, outer in ((4096, 6144), (14336, 4096), (576, 960), (8960, 1536), (40, 27))
        for bias in (False, True)
        for wide in (False, True)
    ),
    *(
        Case(inner, outer, activation=activation)
        for inner, outer in ((576, 3072), (1536, 17920))
        for activation in ("silu", "gelu_tanh")
    ),
    Case(576, 49152, wide=True),
    Case(4096, 6144, dtype=FP16),
    Case(576, 3072, activation="silu", dtype=FP16),
    Case(576, 960, bias=True, dtype=FP32),
]


class Operands:
    """Random rows and weights of a case."""

    def __init__(self, case: Case, rows: int) -> None:
        torch.manual_seed(0)
        self.case = case
        self.x = torch.randn(rows, case.inner, device=CARD).to(case.dtype)
        self.weight = (torch.randn(case.outer, case.inner, device=CARD) * case.inner**-0.5).to(case.dtype)
        self.bias = torch.randn(case.outer, device=CARD).to(case.dtype) if case.bias else None
        self.packed = pack_gated(*self.weight.chunk(2)) if case.activation else pack_linear(self.weight)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """By the names that the model calls."""
        if self.case.activation:
            return gated(x, self.packed, self.case.activation)
        return linear(x, self.packed, self.bias, self.case.wide)

    def forced(self, tile: Tile | None = None, rows: int | None = None, y: torch.Tensor | None = None):
        """By the launcher itself: with a tile of ours, a number of real rows, a place for the result."""
        count = None if rows is None else on_device(rows)
        return product(self.x, self.packed, self.bias, self.case.wide, self.case.activation, count, y, tile)

    def exact(self, rows: slice) -> torch.Tensor:
        """In float64."""
        y = self.x[rows].double() @ self.weight.double().T
        if self.bias is not None:
            y = y + self.bias.double()
        if self.case.activation is None:
            return y
        gate, up = y.chunk(2, dim=1)
        return (F.silu(gate) if self.case.activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_product_is_right_and_a_row_has_the_same_bits_in_any_company(case: Case) -> None:
    operands = Operands(case, max(ROWS))
    x = operands.x
    compile_together(partial(operands.run, x[:rows].clone()) for rows in ROWS)
    full = operands.run(x)
    assert full.dtype == (FP32 if case.wide else case.dtype)
    some = slice(5, None, 61)
    limit = min(WIDE_TOLERANCE, TOLERANCE[case.dtype]) if case.wide else TOLERANCE[case.dtype]
    assert error(full[some], operands.exact(some)) < limit
    for rows in ROWS[:-1]:
        first = 7919 * rows % (len(x) - rows)
        assert torch.equal(operands.run(x[first : first + rows].clone()), full[first : first + rows]), rows
    # every row in another tile, beside others
    assert torch.equal(operands.run(x.roll(1000, 0)), full.roll(1000, 0))


def tiles(is_gated: bool, wide: bool) -> list[Tile]:
    """Every tile that `best_tile` gives, whatever the shape."""
    shapes = [(n, k) for n in (960, 4096, 6144, 28672, 128256) for k in (576, 4096)]
    return sorted(
        {best_tile(rows, n, k, is_gated, wide) for rows in (1, 17, *range(65, 8193, 97)) for n, k in shapes}
    )


@pytest.mark.parametrize(
    "case",
    [Case(1536, 1088), Case(1536, 1088, bias=True, wide=True), Case(1536, 1088, activation="silu")],
    ids=name_of,
)
def test_every_tile_gives_the_same_bits(case: Case) -> None:
    operands = Operands(case, 520)
    every = tiles(case.activation is not None, case.wide)
    assert len(every) >= 4
    compile_together(partial(operands.forced, tile) for tile in every)
    expected = operands.forced()
    assert error(expected, operands.exact(slice(None))) < TOLERANCE[BF16]
    different = [tile for tile in every if not torch.equal(operands.forced(tile), expected)]
    assert different == []


@pytest.mark.parametrize(
    "case", [Case(576, 960), Case(576, 960, wide=True), Case(576, 3072, activation="silu")], ids=name_of
)
@pytest.mark.parametrize("bucket", [8, 16, 64, 256, 1024])
def test_rows_past_the_count_on_the_device_are_left_alone_and_spread_no_nan(case: Case, bucket: int) -> None:
    operands = Operands(case, bucket)
    tile = best_tile(bucket, case.outer, case.inner, case.activation is not None, case.wide)
    expected = operands.forced()
    for count in (0, 1, bucket // 2 + 1, bucket - 3):
        operands.x[count:] = float("nan")
        y = torch.full_like(expected, 7.0)
        operands.forced(None, count, y)
        assert torch.equal(y[:count], expected[:count]), count
        # the memory accelerator writes whole tiles
        whole = tile.persistent and not case.wide
        reached = -(-count // tile.rows) * tile.rows if whole else count
        assert (y[reached:] == 7.0).all(), count
        operands = Operands(case, bucket)
