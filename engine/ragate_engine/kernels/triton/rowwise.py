"""The kernels that walk one row per program: embedding, norm with residual, norm of the wanted rows, activation.

Each moves its row in and out once. Block shapes depend on the model alone, never on the number of rows, so the order
of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ragate_engine.kernels import StepInputs
from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton.linear import _act_mul


@triton.jit
def _embed(ids, table, sampled, h, count, D, scale, BD: tl.constexpr, COUNTED: tl.constexpr, POOL: tl.constexpr,
           SCALED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    m = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        if m >= tl.load(count):
            return
    token = tl.load(ids + m)
    if POOL:
        if token < 0:
            token = tl.load(sampled - 1 - token)
    token = tl.maximum(token, 0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    value = tl.load(table + token * D + d, d < D, 0.0)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(h.dtype.element_ty)
    tl.store(h + m.to(tl.int64) * D + d, value, d < D)


def embed(ids: torch.Tensor, table: torch.Tensor, scale: float, step: StepInputs) -> torch.Tensor:
    """ids int32 [M] -> rows of `table` [vocab, hidden] times `scale`; id -1 - i is `step.sampled[i]` (int32)."""
    rows, width = ids.shape[0], table.shape[1]
    h = torch.empty(rows, width, dtype=table.dtype, device=table.device)
    _embed[(rows, triton.cdiv(width, 1024))](
        ids, table, step.sampled if step.sampled is not None else ids, h, step.rows if step.rows is not None else ids,
        width, scale, 1024, step.rows is not None, step.sampled is not None, scale != 1.0, device.PDL, num_warps=4,
        **device.launch(),
    )  # fmt: skip
    return h


@triton.jit
def _rms_norm(h, x, weight, y, count, D, eps, BD: tl.constexpr, ADD: tl.constexpr, COUNTED: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    m = tl.program_id(0)
    d = tl.arange(0, BD)
    inside = d < D
    w = tl.load(weight + d, inside, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        if m >= tl.load(count):
            return
    at = m.to(tl.int64) * D + d
    value = tl.load(h + at, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(x + at, inside, 0.0).to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + at, value, inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(y + at, (wide * scale * w).to(y.dtype.element_ty), inside)


def rms_norm(
    h: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [M, D] += x [M, D] unless None; returns h / rms(h) * weight (Zhang & Sennrich 2019)."""
    y = torch.empty_like(h)
    width = h.shape[1]
    _rms_norm[(h.shape[0],)](
        h, x if x is not None else h, weight, y, rows if rows is not None else h, width, eps,
        triton.next_power_of_2(width), x is not None, rows is not None, device.PDL, num_warps=4, **device.launch(),
    )  # fmt: skip
    return y


@triton.jit
def _last_norm(
    h, x, weight, y, wanted, count, D, eps, BD: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr
):
    w = tl.program_id(0)
    d = tl.arange(0, BD)
    inside = d < D
    gain = tl.load(weight + d, inside, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        if w >= tl.load(count):
            return
    at = tl.load(wanted + w).to(tl.int64) * D + d
    value = tl.load(h + at, inside, 0.0).to(tl.float32) + tl.load(x + at, inside, 0.0).to(tl.float32)
    wide = value.to(h.dtype.element_ty).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(y + w.to(tl.int64) * D + d, (wide * scale * gain).to(y.dtype.element_ty), inside)


def last_norm(
    h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, step: StepInputs
) -> torch.Tensor:
    """`rms_norm` of h + x for the rows whose logits are wanted: [W, hidden]; h stays as it is."""
    rows, width = step.wanted.shape[0], h.shape[1]
    y = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    counted = step.wanted_rows is not None
    _last_norm[(rows,)](
        h, x, weight, y, step.wanted, step.wanted_rows if counted else step.wanted, width, eps,
        triton.next_power_of_2(width), counted, device.PDL, num_warps=4, **device.launch(),
    )  # fmt: skip
    return y


@triton.jit
def _act_mul_rows(
    x, y, count, F, BF: tl.constexpr, GELU: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr
):
    m = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        if m >= tl.load(count):
            return
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    at = x + m.to(tl.int64) * 2 * F + f
    gate = tl.load(at, f < F, 0.0).to(tl.float32)
    up = tl.load(at + F, f < F, 0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * F + f, _act_mul(gate, up, GELU).to(y.dtype.element_ty), f < F)


def act_mul(
    x: torch.Tensor,
    activation: str,
    dtype: torch.dtype | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, 2F] is gate | up; returns act(gate) * up [M, F] in `dtype` (x's where it is `None`), float32 inside."""
    width = x.shape[1] // 2
    y = torch.empty(x.shape[0], width, dtype=dtype or x.dtype, device=x.device)
    _act_mul_rows[(x.shape[0], triton.cdiv(width, 1024))](
        x, y, rows if rows is not None else x, width, 1024, activation != "silu", rows is not None, device.PDL,
        num_warps=4, **device.launch(),
    )  # fmt: skip
    return y
