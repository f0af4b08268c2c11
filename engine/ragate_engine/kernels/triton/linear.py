"""y = x W^T + b on tensor cores, with K walked in one fixed order: the bits of a row are the same in any tile.

Moves at least the weight, N K items, and for many rows does 2 M N K operations. Plan: one program per (rows, columns)
tile; 64 items of K at a time, accumulated in float32; tile sizes follow the row count freely, since neither mma nor
wgmma changes the order in which a row's products are summed (checked on the card by tests/gpu).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_K = 64


@triton.jit
def _linear(
    x, w, bias, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    tiles_n = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    columns = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + ks
        a = tl.load(
            x + rows[:, None].to(tl.int64) * K + k[None, :], (rows[:, None] < M) & (k[None, :] < K), 0.0
        )
        b = tl.load(
            w + columns[None, :].to(tl.int64) * K + k[:, None], (columns[None, :] < N) & (k[:, None] < K), 0.0
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
    at = y + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), (rows[:, None] < M) & (columns[None, :] < N))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool = False
) -> torch.Tensor:
    """x [M, K], weight [N, K] -> [M, N], in float32 when `wide`, else in x's dtype."""
    rows, inner = x.shape
    outer = weight.shape[0]
    y = torch.empty(rows, outer, dtype=torch.float32 if wide else x.dtype, device=x.device)
    if rows <= 16:
        bm, bn, warps, stages = 16, 64, 4, 4
    elif rows <= 64:
        bm, bn, warps, stages = 64, 64, 4, 4
    else:
        bm, bn, warps, stages = 128, 128, 8, 3
    if x.dtype == torch.float32:
        bm, bn, stages = min(bm, 32), 32, 2
    grid = (triton.cdiv(rows, bm) * triton.cdiv(outer, bn),)
    _linear[grid](
        x, weight, bias if bias is not None else x, y, rows, outer, inner, bm, bn, BLOCK_K, bias is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y
