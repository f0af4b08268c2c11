"""y = x W^T + b (and the gated pair act(x G^T) * (x U^T)) on tensor cores, K walked in one fixed order.

Shapes: x [M, K], W [N, K], y [M, N]. Moves at least the weight, 2 N K bytes; does 2 M N K operations.
Plan: a row's bits come from one chain of 16-wide products along K, accumulated in float32 from zero. mma.sync, wgmma,
every tile and every pipeline depth make the same chain (tests/gpu shows it), so tiles follow the row count freely:
- few rows (`_skinny`): bound by reading W. Narrow column tiles, so that every multiprocessor has some, and deep
  pipelines, so that enough bytes are in flight;
- many rows (`_persistent`): bound by the tensor cores. One program per multiprocessor walks over the tiles, both
  operands come through the tensor memory accelerator.
The rows of a gated pair are interleaved, so that gate and up meet in the registers of one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ragate_engine.kernels.triton import device

PREFETCH = 8
"""Lines of 128 bytes of each weight row that are asked for before the kernel's turn has come."""
PREFETCH_BYTES = 8 << 20
"""Larger weights keep the memory busy by themselves, and asking ahead only disturbs their order."""


class Tile(NamedTuple):
    """How a product is cut: kernel, rows, columns and K items of a tile, warps, pipeline stages."""

    persistent: bool
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Packed:
    """A weight [N, K]; of a gated pair the rows are gate 0, up 0, gate 1, up 1, ..."""

    weight: torch.Tensor
    gated: bool = False


def pack_linear(weight: torch.Tensor) -> Packed:
    """Prepare `weight` [out, in]."""
    return Packed(weight.contiguous())


def pack_gated(gate: torch.Tensor, up: torch.Tensor) -> Packed:
    """Prepare the gate and up weights [out, in] of an MLP."""
    return Packed(torch.stack([gate, up], dim=1).flatten(0, 1), gated=True)


@triton.jit
def _act_mul(gate, up, GELU: tl.constexpr):
    z = gate
    if GELU:
        # tanh(t) = 2 sigmoid(2 t) - 1, so gelu_tanh(g) = g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))
        z = (gate + 0.044715 * gate * gate * gate) * 1.5957691216057308
    return gate / (1.0 + tl.exp(-z)) * up


@triton.jit
def _act(acc, GELU: tl.constexpr):
    gate, up = tl.split(tl.reshape(acc, acc.shape[0], acc.shape[1] // 2, 2))
    return _act_mul(gate, up, GELU)


@triton.jit(do_not_specialize=["M"])
def _skinny(
    x, w, bias, y, count, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    ks = tl.arange(0, BK)
    # columns past the end read column 0, so that loads of whole tiles need no mask
    w_at_row = w + tl.where(columns < N, columns, 0).to(tl.int64) * K
    w_at = w_at_row[:, None] + ks[None, :]
    x_at = x + rows[:, None].to(tl.int64) * K + ks[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            # the weights do not wait for the kernel before: their first lines of 128 bytes go to the L2 cache now
            line = tl.arange(0, PREFETCH) * (128 // (w.dtype.element_ty.primitive_bitwidth // 8))
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [w_at_row[:, None] + line[None, :]],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
        if tl.program_id(1) * BM >= M:
            return
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if EVEN:
            a = tl.load(x_at, rows[:, None] < M, 0.0)
            b = tl.load(w_at, eviction_policy="evict_first")
        else:
            inside = (k + ks < K)[None, :]
            a = tl.load(x_at, (rows[:, None] < M) & inside, 0.0)
            b = tl.load(w_at, inside, 0.0)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
        x_at += BK
        w_at += BK
    if HAS_BIAS:
        acc += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
    if GATED:
        out = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        at = y + rows[:, None].to(tl.int64) * (N // 2) + out[None, :]
        inside = (rows[:, None] < M) & (out < N // 2)[None, :]
        tl.store(at, _act(acc, GELU).to(y.dtype.element_ty), inside)
    else:
        at = y + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), (rows[:, None] < M) & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _persistent(
    x, w, bias, y, count, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # GROUP tiles of rows side by side share a tile of weights in the L2 cache
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        m = (group * GROUP + (tile % (GROUP * tiles_n)) % height) * BM
        n = (tile % (GROUP * tiles_n)) // height * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc, input_precision="ieee")
        if HAS_BIAS:
            columns = n + tl.arange(0, BN)
            acc += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
        if GATED:
            y.store([m, n // 2], _act(acc, GELU).to(y.dtype))
        elif WIDE:
            columns = n + tl.arange(0, BN)
            lines = m + tl.arange(0, BM)
            at = y + lines[:, None].to(tl.int64) * N + columns[None, :]
            tl.store(at, acc, (lines[:, None] < M) & (columns < N)[None, :])
        else:
            y.store([m, n], acc.to(y.dtype))


# time of one tile on the H200, the largest being 1: what fills the card evenly wins
_MANY = (
    (Tile(True, 128, 256, 64, 8, 3), 1.0),
    (Tile(True, 128, 128, 64, 4, 4), 0.52),
    (Tile(True, 64, 128, 64, 4, 6), 0.36),
    (Tile(True, 64, 64, 128, 4, 6), 0.25),
    (Tile(True, 64, 32, 128, 4, 6), 0.22),
)


def best_tile(M: int, N: int, K: int, gated: bool, wide: bool = False) -> Tile:
    """The tile for x [M, K] and W [N, K], by measurement on the H200: it never changes a bit."""
    narrow = device.programs() * 32 >= N
    if M <= 16:
        if gated:
            return Tile(False, 16, 64, 64, 4, 4)
        if N > 16384:
            return Tile(False, 16, 64, 128, 4, 6)
        if K < 1024:
            return Tile(False, 16, 32, 64, 4, 8)
        return Tile(False, 16, 32, 256, 4, 6) if narrow else Tile(False, 16, 32, 128, 2, 6)
    if M <= 64:
        if N > 16384:
            return Tile(True, 64, 128, 64, 4, 6)
        return Tile(True, 64, 32, 128, 4, 6) if narrow else Tile(False, 64, 64, 128, 4, 6)

    def cost(choice: tuple[Tile, float]) -> float:
        tile, time = choice
        return time * -(-(-(-M // tile.rows) * -(-N // tile.columns)) // device.programs())

    # a tile of 128 x 256 float32 would not fit beside the pipeline on its way out
    tile = min(_MANY[1:] if wide else _MANY, key=cost)[0]
    return tile._replace(stages=4) if gated and tile.columns == 256 else tile


def fitting(tile: Tile, item_bytes: int, gated: bool) -> Tile:
    """`tile` with as many stages as the card's shared memory holds: the depth of a pipeline changes no bit."""
    stage = (tile.rows + tile.columns) * tile.inner * item_bytes
    out = tile.rows * tile.columns * item_bytes // (2 if gated else 1) if tile.persistent else 0
    most = (device.shared_memory() - out) // stage
    return tile if tile.stages <= most else tile._replace(stages=max(1, most))


def prefetches(M: int, N: int, K: int, item_bytes: int) -> bool:
    """Whether the kernel for few rows asks for its first weights before its turn."""
    return M <= 16 and N * K * item_bytes <= PREFETCH_BYTES and K * item_bytes >= PREFETCH * 128


def product(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    wide: bool,
    activation: str | None,
    rows: torch.Tensor | None,
    y: torch.Tensor | None = None,
    tile: Tile | None = None,
    group: int = 8,
) -> torch.Tensor:
    """x [M, K] times the packed weight; rows past `rows` (int32 [1]) may be left as they are."""
    M, K = x.shape
    N = packed.weight.shape[0]
    width = N // 2 if packed.gated else N
    if y is None:
        y = torch.empty(M, width, dtype=torch.float32 if wide else x.dtype, device=x.device)
    tile = tile or best_tile(M, N, K, packed.gated, wide)
    gelu = activation is not None and activation != "silu"
    # what the tensor memory accelerator cannot address, and float32, take the plain kernel
    if tile.persistent and (K % 8 or (width % 8 and not wide) or x.dtype == torch.float32):
        tile = Tile(False, 64, 64, 64, 4, 3)
    if x.dtype == torch.float32:
        tile = Tile(False, min(tile.rows, 32), 32, 32, 4, 2)
    tile = fitting(tile, x.element_size(), packed.gated)
    if tile.persistent:
        tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
        store_columns = tile.columns // 2 if packed.gated else tile.columns
        _persistent[(min(device.programs(), tiles),)](
            TensorDescriptor(x, [M, K], [K, 1], [tile.rows, tile.inner]),
            TensorDescriptor(packed.weight, [N, K], [K, 1], [tile.columns, tile.inner]),
            bias if bias is not None else x,
            y if wide else TensorDescriptor(y, [M, width], [width, 1], [tile.rows, store_columns]),
            rows if rows is not None else x, M, N, K, tile.rows, tile.columns, tile.inner, group, rows is not None,
            bias is not None, packed.gated, gelu, wide, tile.stages, device.PDL,
            num_warps=tile.warps, **device.launch(),
        )  # fmt: skip
    else:
        prefetch = PREFETCH if prefetches(M, N, K, x.element_size()) else 0
        _skinny[(triton.cdiv(N, tile.columns), triton.cdiv(M, tile.rows))](
            x, packed.weight, bias if bias is not None else x, y, rows if rows is not None else x, M, N, K,
            tile.rows, tile.columns, tile.inner, K % tile.inner == 0, rows is not None, bias is not None, packed.gated,
            gelu, tile.stages, prefetch, device.PDL, num_warps=tile.warps, num_stages=tile.stages, **device.launch(),
        )  # fmt: skip
    return y


def linear(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    wide: bool = False,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] -> [M, N] (in `out` if given), in float32 when `wide`, else in x's dtype."""
    return product(x, packed, bias, wide, None, rows, out)


def gated(x: torch.Tensor, packed: Packed, activation: str, rows: torch.Tensor | None = None) -> torch.Tensor:
    """act(x G^T) * (x U^T): [M, K] -> [M, out], float32 until the end."""
    return product(x, packed, None, False, activation, rows)
