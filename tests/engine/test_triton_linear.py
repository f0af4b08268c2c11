"""Both linear kernels through the interpreter: every tile gives the product, and rows that are not real stay out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from ragate_engine.kernels.triton.linear import (
    Packed,
    Tile,
    best_tile,
    pack_gated,
    pack_linear,
    product,
)

TILES = [Tile(False, 16, 32, 64, 4, 2), Tile(False, 64, 32, 64, 4, 2), Tile(True, 64, 32, 64, 4, 2)]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu checks the compiled kernels")


def inputs(rows: int, inner: int, outer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(rows, inner).half(),
        (torch.randn(outer, inner) * inner**-0.5).half(),
        torch.randn(outer).half(),
    )


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_every_tile_gives_the_product(tile: Tile, wide: bool) -> None:
    x, w, bias = inputs(150, 136, 48)
    found = product(x, pack_linear(w), bias, wide, None, None, tile=tile)
    expected = x.double() @ w.double().T + bias.double()
    assert found.dtype == (torch.float32 if wide else torch.float16)
    assert torch.allclose(found.double(), expected, atol=1e-5 if wide else 4e-3)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up_meet_in_every_tile(tile: Tile, activation: str) -> None:
    x, w, _ = inputs(70, 72, 80)
    gate, up = w.chunk(2)
    found = product(x, pack_gated(gate, up), None, False, activation, None, tile=tile)
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    acted = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    assert torch.allclose(found.double(), acted * u, atol=4e-3)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_rows_past_the_count_neither_matter_nor_cost_a_store(tile: Tile) -> None:
    x, w, _ = inputs(200, 64, 40)
    x[130:] = float("nan")
    out = torch.full((200, 40), 7.0)
    count = torch.tensor([130], dtype=torch.int32)
    product(x, pack_linear(w), None, True, None, count, out, tile=tile)
    assert torch.allclose(out[:130].double(), x[:130].double() @ w.double().T, atol=1e-5)
    assert torch.equal(out[130:], torch.full((70, 40), 7.0))


def test_widths_that_the_memory_accelerator_cannot_address_take_the_plain_kernel() -> None:
    x, w, bias = inputs(100, 35, 27)
    found = product(x, Packed(w), bias, False, None, None, tile=Tile(True, 64, 128, 64, 4, 4))
    assert torch.allclose(found.double(), x.double() @ w.double().T + bias.double(), atol=4e-3)


def test_tiles_grow_with_the_rows_and_fill_the_card() -> None:
    assert best_tile(1, 4096, 4096, False).rows == 16
    assert best_tile(8192, 28672, 4096, True) == Tile(True, 128, 256, 64, 8, 4)
    assert not best_tile(16, 128256, 4096, False).persistent
