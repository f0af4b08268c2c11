"""On the card: a quantized product has the bits of the plain product with its weights unpacked, in every tile.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from on_card import BF16, CARD, NEEDS_CARD, compile_together, error, on_device

pytest.importorskip("triton")
from ragate_engine.kernels.triton.linear import Packed, pack_gated
from ragate_engine.kernels.triton.linear import product as plain
from ragate_engine.kernels.triton.quantized import Tile, best_tile, dequantize, pack_quantized, product

_spec = importlib.util.spec_from_file_location(
    "quantized_cases", Path(__file__).parent.parent / "engine" / "quantized_cases.py"
)
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["quantized_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = NEEDS_CARD
ROWS = (1, 2, 15, 16, 17, 64, 65, 200, 256, 257, 1000)
WIDTHS = (576, 1536)
FORCED = [
    Tile(16, 32, 2, 6),
    Tile(16, 64, 1, 4),
    Tile(16, 64, 4, 4),
    Tile(16, 128, 4, 4),
    Tile(64, 64, 4, 3),
    Tile(128, 128, 8, 3),
]


def tiles() -> list[Tile]:
    """Those that `best_tile` gives, and more."""
    given = [
        best_tile(rows, out, is_gated)
        for rows in (*ROWS, 8192)
        for out in (576, 28672)
        for is_gated in (False, True)
    ]
    return list(dict.fromkeys([*given, *FORCED]))


@pytest.mark.parametrize("kind", cases.KINDS, ids=str)
def test_a_quantized_product_has_the_bits_of_the_plain_one(kind) -> None:
    width = 1536 if kind.group in (0, 128) else 1152
    weight = cases.random_weight(kind, 704, width).to(CARD)
    packed = pack_quantized([weight])[0]
    dense = Packed(dequantize(packed))
    bias = torch.randn(704, device=CARD).to(BF16)
    x = torch.randn(max(ROWS), width, device=CARD).to(BF16)
    ordered = x if weight.order is None else x[:, weight.order].contiguous()
    for wide in (False, True):
        expected = plain(ordered, dense, bias, wide, None, None)
        assert error(expected, x.double() @ weight.dequantize().double().T + bias.double()) < 1e-2
        compile_together(partial(product, x[:n].clone(), packed, bias, wide, None, None) for n in ROWS)
        for rows in ROWS:
            found = product(x[:rows].clone(), packed, bias, wide, None, None)
            assert torch.equal(found, expected[:rows]), (rows, wide)
        for tile in tiles():
            assert torch.equal(product(x, packed, bias, wide, None, None, tile=tile), expected), (tile, wide)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "kind", [cases.Kind(4, 128, "zero"), cases.Kind(4, 32, "offset"), cases.Kind(6, 16)], ids=str
)
def test_a_quantized_gated_pair_has_the_bits_of_the_plain_one(kind, activation: str) -> None:
    pair = [cases.random_weight(kind, 1536, 1024, seed).to(CARD) for seed in (1, 2)]
    packed = pack_quantized(pair, gated=True)[0]
    dense = pack_gated(*(dequantize(pack_quantized([weight])[0]) for weight in pair))
    x = torch.randn(300, 1024, device=CARD).to(BF16)
    expected = plain(x, dense, None, False, activation, None)
    for tile in tiles():
        assert torch.equal(product(x, packed, None, False, activation, None, tile=tile), expected), tile


def test_rows_past_the_count_and_columns_of_others_stay_as_they_are() -> None:
    weight = cases.random_weight(cases.Kind(4, 128, "zero"), 512, 1024).to(CARD)
    packed = pack_quantized([weight])[0]
    x = torch.randn(256, 1024, device=CARD).to(BF16)
    expected = product(x, packed, None, False, None, None)
    for count in (0, 1, 100, 256):
        x[count:] = float("nan")
        y = torch.full((256, 768), 7.0, device=CARD, dtype=BF16)
        product(x, packed, None, False, None, on_device(count), y[:, 128:640])
        assert torch.equal(y[:count, 128:640], expected[:count]), count
        assert (y[:, :128] == 7).all() and (y[:, 640:] == 7).all(), count
        x = torch.nan_to_num(x)
        x[count:] = torch.randn(256 - count, 1024, device=CARD).to(BF16)
        expected = product(x, packed, None, False, None, None)
