"""On the card: a quantized product has the bits of the plain product with its weights unpacked, in every tile.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from on_card import BF16, CARD, NEEDS_CARD, compile_together, error, on_device

pytest.importorskip("triton")
from ragate_engine.kernels.triton.linear import Packed, pack_gated
from ragate_engine.kernels.triton.linear import product as plain
from ragate_engine.kernels.triton.quantized import (
    PackedQuant,
    Tile,
    best_tile,
    dequantize,
    pack_quantized,
    product,
    unpacked,
    walk_of,
)

_spec = importlib.util.spec_from_file_location(
    "quantized_cases", Path(__file__).parent.parent / "engine" / "quantized_cases.py"
)
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["quantized_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = NEEDS_CARD
ROWS = (1, 2, 8, 9, 16, 17, 33, 64, 65, 200, 256, 257, 1000, 2500)
SHAPES = ((704, 1536), (576, 4608), (17408, 512))
"""[N, K]: one chain; segments; wide."""
FORCED = [
    Tile(16, 32, 128, 1, 4, few=True),
    Tile(16, 32, 256, 2, 2, few=True),
    Tile(16, 64, 128, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(128, 128, 128, 8, 3),
    Tile(256, 128, 64, 8, 3),
]


def tiles(packed: PackedQuant) -> list[Tile]:
    """Those that `best_tile` gives, for a wide weight too, and more."""
    wide = replace(packed, low=packed.low[:1].expand(28672 // 16, -1, -1))
    given = [best_tile(rows, weight) for rows in ROWS for weight in (packed, wide)]
    segments = packed.segments
    given = [
        tile for tile in given if segments == 1 or tile.few or tile.rows >= 64
    ]  # fewer rows take more counts
    more = [tile for tile in FORCED if segments == 1 or tile.rows >= 64]
    return list(dict.fromkeys([*given, *more]))


def in_segments(x: torch.Tensor, packed: PackedQuant, bias: torch.Tensor | None, wide: bool) -> torch.Tensor:
    """The plain product with the unpacked weights, a segment after the other."""
    weights = dequantize(packed)
    span = packed.low.shape[1] * walk_of(packed.bits, packed.group).block // packed.segments
    total = torch.zeros(len(x), packed.rows, device=CARD)
    for begin in range(0, packed.columns, span):
        part = slice(begin, begin + span)
        total += plain(x[:, part].contiguous(), Packed(weights[:, part].contiguous()), None, True, None, None)
    total = total if bias is None else total + bias.float()
    return total if wide else total.to(BF16)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, SHAPES[0]) for kind in cases.KINDS),
        *((kind, SHAPES[1]) for kind in cases.KINDS[::3]),
        (cases.KINDS[0], SHAPES[2]),
    ],
    ids=str,
)
def test_a_quantized_product_has_the_bits_of_the_plain_one(kind, shape: tuple[int, int]) -> None:
    out, width = shape
    weight = cases.random_weight(kind, out, width).to(CARD)
    packed = pack_quantized([weight])[0]
    assert packed.segments == (4 if width > 4096 else 1)
    bias = torch.randn(out, device=CARD).to(BF16)
    x = torch.randn(max(ROWS), width, device=CARD).to(BF16)
    ordered = x if weight.order is None else x[:, weight.order].contiguous()
    launches = [partial(product, x[:n].clone(), packed, bias, False, None, None) for n in ROWS]
    launches += [
        partial(product, x[:1000], packed, bias, False, None, None, tile=tile) for tile in tiles(packed)
    ]
    compile_together(launches)
    expected = in_segments(ordered, packed, bias, False)
    assert error(expected, x.double() @ weight.dequantize().double().T + bias.double()) < 1e-2
    for launch in launches:
        found = launch()
        assert torch.equal(found, expected[: len(found)]), (len(found), launch.keywords)
    assert packed.done is None or not packed.done.any()
    whole = product(x[:60], packed, bias, True, None, None)
    assert torch.equal(whole, in_segments(ordered[:60], packed, bias, True))


@pytest.mark.parametrize("kind", cases.KINDS, ids=str)
def test_unpacked_weights_are_what_the_reference_says(kind) -> None:
    pair = [cases.random_weight(kind, 576, 1536, seed).to(CARD) for seed in (1, 2)]
    pair[1] = replace(pair[1], order=pair[0].order)
    single = [pack_quantized([weight])[0] for weight in pair]
    assert torch.equal(unpacked(single[0]), dequantize(single[0]))
    turns = torch.stack([dequantize(packed) for packed in single], dim=1).flatten(0, 1)
    assert torch.equal(unpacked(pack_quantized(pair, gated=True)[0]), turns)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "kind", [cases.Kind(4, 128, "zero"), cases.Kind(4, 32, "offset"), cases.Kind(6, 16)], ids=str
)
def test_a_quantized_gated_pair_has_the_bits_of_the_plain_one(kind, activation: str) -> None:
    pair = [cases.random_weight(kind, 1536, 1024, seed).to(CARD) for seed in (1, 2)]
    packed = pack_quantized(pair, gated=True)[0]
    dense = pack_gated(*(dequantize(pack_quantized([weight])[0]) for weight in pair))
    x = torch.randn(max(ROWS), 1024, device=CARD).to(BF16)
    compile_together(partial(product, x[:n].clone(), packed, None, False, activation, None) for n in ROWS)
    expected = plain(x, dense, None, False, activation, None)
    for rows in ROWS:
        found = product(x[:rows].clone(), packed, None, False, activation, None)
        assert torch.equal(found, expected[:rows]), rows
    for tile in tiles(packed):
        found = product(x[:300], packed, None, False, activation, None, tile=tile)
        assert torch.equal(found, expected[:300]), tile


@pytest.mark.parametrize("width", [1024, 4096])
def test_rows_past_the_count_and_columns_of_others_stay_as_they_are(width: int) -> None:
    weight = cases.random_weight(cases.Kind(4, 128, "zero"), 512, width).to(CARD)
    packed = pack_quantized([weight])[0]
    for buckets, counts in ((16, (0, 1, 16)), (256, (0, 1, 100, 256)), (2048, (0, 1, 2000))):
        x = torch.randn(buckets, width, device=CARD).to(BF16)
        expected = product(x, packed, None, False, None, None)
        for count in counts:
            x[count:] = float("nan")
            y = torch.full((buckets, 768), 7.0, device=CARD, dtype=BF16)
            product(x, packed, None, False, None, on_device(count), y[:, 128:640])
            assert torch.equal(y[:count, 128:640], expected[:count]), count
            assert (y[:, :128] == 7).all() and (y[:, 640:] == 7).all(), count
            x = torch.nan_to_num(x)
            x[count:] = torch.randn(buckets - count, width, device=CARD).to(BF16)
            expected = product(x, packed, None, False, None, None)
