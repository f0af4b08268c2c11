"""y = x W^T in whole numbers: weights in int8 with a scale a row, activations rounded to int8 with a scale a row.

Shapes: x [M, K], W [N, K], y [M, N]. Moves at least the weight, N K bytes; does 2 M N K operations, at twice the
rate of bfloat16. Sums are int32 and exact up to K = 132,104, so any tile and order gives the same bits; what is lost
is lost where a row of activations is rounded (Dettmers et al. 2022, section 2, without their outliers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton.linear import _act
from ragate_engine.quant.tensor import QuantTensor

MOST_COLUMNS = (1 << 31) // (127 * 128)
"""K up to which a sum of products fits 32 bits."""


@dataclass(frozen=True)
class Int8:
    """A weight [N, K]; of a gated pair the rows are gate 0, up 0, gate 1, up 1, ..."""

    codes: torch.Tensor
    """int8 [N, K]."""
    scales: torch.Tensor
    """float32 [N]."""
    gated: bool = False


def unpack_int8(packed: Int8) -> torch.Tensor:
    """The float32 weights [N, K] in the packed order of rows."""
    return packed.codes * packed.scales[:, None]


def pack_int8(weights: list[torch.Tensor | QuantTensor], gated: bool = False) -> Int8 | None:
    """Weights [out_i, in] one below the other, or a gate and an up, each row rounded to 255 steps of its largest value.

    What is int8 with a scale a row already stays as it is. `None` where the kernel does not take them.
    """
    rounded = [_rounded(weight) for weight in weights]
    codes, scales = [code for code, _ in rounded], [scale for _, scale in rounded]
    width = codes[0].shape[1]
    if width % 16 or width > MOST_COLUMNS or any(len(code) % 16 for code in codes):
        return None
    if gated:
        return Int8(torch.stack(codes, 1).flatten(0, 1), torch.stack(scales, 1).flatten(), gated=True)
    return Int8(torch.cat(codes), torch.cat(scales))


def _rounded(weight: torch.Tensor | QuantTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [out, in] and float32 scales [out]."""
    if isinstance(weight, QuantTensor):
        as_stored = (weight.bits, weight.group) == (8, weight.shape[1]) and weight.offsets is None
        if as_stored and weight.order is None:
            return weight.codes, weight.scales.flatten()
        weight = weight.dequantize(torch.float32)
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    return torch.round(wide / torch.where(scales == 0, 1, scales)[:, None]).to(torch.int8), scales


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of `quantize_rows`: int8 [M, K] and float32 scales [M]."""
    wide = x.float()
    scales = wide.abs().amax(1) * (1 / 127)
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return torch.floor(wide * inverse[:, None] + 0.5).to(torch.int8), scales


@triton.jit
def _quantize_rows(x, q, scales, count, K, BLOCK: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        if row >= tl.load(count):
            return
    at = row.to(tl.int64) * K
    columns = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        value = tl.load(x + at + first + columns, first + columns < K, 0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
    scale = tl.max(most, 0) * (1 / 127)
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, scale))
    for first in range(0, K, BLOCK):
        inside = first + columns < K
        value = tl.load(x + at + first + columns, inside, 0.0).to(tl.float32)
        tl.store(q + at + first + columns, tl.floor(value * inverse + 0.5).to(tl.int8), inside)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["M"])
def _whole(
    x, w, x_scales, w_scales, bias, y, count, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # 8 tiles of rows side by side share a tile of weights in the L2 cache
        group = tile // (8 * tiles_n)
        height = tl.minimum(tiles_m - group * 8, 8)
        m = (group * 8 + (tile % (8 * tiles_n)) % height) * BM
        n = (tile % (8 * tiles_n)) // height * BN
        acc = tl.zeros((BM, BN), tl.int32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc, out_dtype=tl.int32)
        rows = m + tl.arange(0, BM)
        columns = n + tl.arange(0, BN)
        x_scale = tl.load(x_scales + rows, rows < M, 0.0)
        w_scale = tl.load(w_scales + columns, columns < N, 0.0)
        found = acc.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
        if HAS_BIAS:
            found += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
        if GATED:
            y.store([m, n // 2], _act(found, GELU).to(y.dtype))
        else:
            y.store([m, n], found.to(y.dtype))


class Tile(NamedTuple):
    """Rows, columns and K items of a tile, warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def best_tile(M: int, N: int) -> Tile:
    """The tile for x [M, K] and W [N, K]: it never changes a bit."""
    if M <= 64:
        return Tile(64, 64, 256, 4, 4) if N > 8192 else Tile(64, 32, 256, 4, 4)
    if M <= 256:
        return Tile(64, 128, 128, 4, 6)
    return Tile(128, 256, 128, 8, 3)


def quantize_rows(x: torch.Tensor, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [M, K] and float32 scales [M] of x [M, K]; rows past `rows` (int32 [1]) are left as they are."""
    M, K = x.shape
    q = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(K))
    _quantize_rows[(M,)](
        x, q, scales, rows if rows is not None else x, K, block, rows is not None, device.PDL, num_warps=4,
        **device.launch(),
    )  # fmt: skip
    return q, scales


def int8(
    x: torch.Tensor,
    packed: Int8,
    bias: torch.Tensor | None,
    activation: str | None = None,
    rows: torch.Tensor | None = None,
    wide: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] -> [M, N] (in `out` if given); `activation` is of a gated pair, `wide` sums are not made here."""
    assert not wide
    return product(x, packed, bias, activation, rows, out)


def product(
    x: torch.Tensor,
    packed: Int8,
    bias: torch.Tensor | None,
    activation: str | None,
    rows: torch.Tensor | None,
    y: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x [M, K] times the weight, in x's dtype; rows past `rows` (int32 [1]) may be left as they are."""
    M, K = x.shape
    N = packed.codes.shape[0]
    width = N // 2 if packed.gated else N
    if y is None:
        y = torch.empty(M, width, dtype=x.dtype, device=x.device)
    q, scales = quantize_rows(x, rows)
    tile = tile or best_tile(M, N)
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    gelu = activation is not None and activation != "silu"
    _whole[(min(device.programs(), tiles),)](
        TensorDescriptor(q, [M, K], [K, 1], [tile.rows, tile.inner]),
        TensorDescriptor(packed.codes, [N, K], [K, 1], [tile.columns, tile.inner]),
        scales, packed.scales, bias if bias is not None else x,
        TensorDescriptor(y, [M, width], [y.stride(0), 1],
                         [tile.rows, tile.columns // (2 if packed.gated else 1)]),
        rows if rows is not None else x, M, N, K, tile.rows, tile.columns, tile.inner, rows is not None,
        bias is not None, packed.gated, gelu, tile.stages, device.PDL, num_warps=tile.warps, **device.launch(),
    )  # fmt: skip
    return y
