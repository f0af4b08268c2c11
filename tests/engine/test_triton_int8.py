"""Products in whole numbers through the interpreter: sums are exact, rows are rounded each by its own scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import Kind, random_weight

pytest.importorskip("triton")
from ragate_engine.kernels.triton.int8 import Int8, Tile, pack_int8, product, quantize_rows, round_rows

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu checks the compiled kernels")
TILES = [Tile(64, 32, 64, 4, 2), Tile(64, 128, 128, 4, 2)]


def rows_of(count: int, width: int) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(3))
    return (x * torch.logspace(-2, 2, count)[:, None]).half()


def exact(x: torch.Tensor, packed: Int8) -> torch.Tensor:
    """In whole numbers, then the two scales."""
    q, scales = round_rows(x)
    sums = (q.long() @ packed.codes.long().T).double()
    return sums * scales.double()[:, None] * packed.scales.double()


def test_a_row_of_weights_is_rounded_to_steps_of_its_largest() -> None:
    weight = torch.randn(32, 48)
    weight[3] = 0
    packed = pack_int8([weight])
    assert packed is not None
    assert torch.equal(packed.codes.abs().amax(1).long()[[0, 3]], torch.tensor([127, 0]))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((packed.codes * packed.scales[:, None] - weight).abs() <= step * 0.501).all()


def test_int8_files_keep_their_codes() -> None:
    weight = random_weight(Kind(8, 0), 32, 64)
    packed = pack_int8([weight])
    assert packed is not None
    assert torch.equal(packed.codes, weight.codes) and torch.equal(packed.scales, weight.scales[:, 0])
    assert pack_int8([torch.randn(24, 64)]) is None and pack_int8([torch.randn(32, 40)]) is None


@interpreted
def test_rows_are_rounded_each_by_its_own_largest_value() -> None:
    x = rows_of(20, 5000)
    x[4] = 0
    q, scales = quantize_rows(x, None)
    expected = round_rows(x)
    assert torch.equal(q, expected[0]) and torch.equal(scales, expected[1])
    assert int(q.abs().max()) == 127 and not q[4].any()


@interpreted
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_sums_are_exact(tile: Tile) -> None:
    x = rows_of(70, 208)
    packed = pack_int8([torch.randn(48, 208), torch.randn(32, 208)])
    assert packed is not None
    bias = torch.randn(80).half()
    found = product(x, packed, bias, None, None, tile=tile)
    expected = exact(x, packed) + bias.double()
    assert torch.allclose(found.double(), expected, rtol=2e-3, atol=2e-3)


@interpreted
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up_meet(activation: str) -> None:
    gate, up = torch.randn(32, 64) * 0.1, torch.randn(32, 64) * 0.1
    x = rows_of(66, 64).clamp(-3, 3)
    g, u = (exact(x, packed) for weight in (gate, up) if (packed := pack_int8([weight])) is not None)
    acted = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    packed = pack_int8([gate, up], gated=True)
    assert packed is not None
    for tile in TILES:
        found = product(x, packed, None, activation, None, tile=tile)
        assert torch.allclose(found.double(), acted * u, rtol=2e-3, atol=2e-3), tile


@interpreted
def test_rows_past_the_count_neither_matter_nor_are_rounded() -> None:
    x = rows_of(40, 64)
    x[25:] = float("nan")
    packed = pack_int8([torch.randn(32, 64)])
    assert packed is not None
    count = torch.tensor([25], dtype=torch.int32)
    found = product(x, packed, None, None, count, tile=TILES[0])
    assert torch.allclose(found[:25].double(), exact(x[:25], packed), rtol=2e-3, atol=2e-3)
