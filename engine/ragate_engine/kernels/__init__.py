"""The operations of the decoder: one set of names, one module per backend, chosen here.

Backends: `reference` (plain torch, any device: the oracle), `cpu` (one C file), `triton` (NVIDIA). Each has

    pack_linear(weight) -> Packed                  prepare a [out, in] weight once
    linear(x, packed, bias, wide, rows) -> y       [M, in] -> [M, out], float32 when wide
    pack_gated(gate, up) -> Packed                 prepare the two weights of a gated MLP once
    gated(x, packed, activation, rows) -> y        act(x gate^T) * (x up^T): [M, in] -> [M, out]
    pack_quantized(weights, gated) -> parts        the same for weights that stay packed, or None (triton alone)
    quantized(x, parts, bias, activation, rows, wide) -> y
    pack_int8(weights, gated) -> Packed            the same for products in whole numbers, or None (triton alone)
    int8(x, packed, bias, activation, rows) -> y
    act_mul(x, activation, dtype, rows) -> y       act(gate) * up of x [M, gate | up], in `dtype`
    embed(ids, table, scale, step) -> h            rows of the table, fresh storage
    rms_norm(h, x, weight, eps, rows) -> y         h += x (unless None), then normalize; h is updated in place
    last_norm(h, x, weight, eps, step) -> y        the same for the rows whose logits are wanted: [W, hidden]
    make_kv(blocks, kv_heads, head_dim, ...)       the K and V cache of one layer, in the backend's own layout
    rope_write_kv(qkv, ..., step, kv, shape)       normalize and turn q and k in place, write k and v to their slots
    plan_attention(...) -> work                    on the host: which rows read which KV together
    attention(qkv, kv, step, shape, ...) -> out    causal paged attention
    pick(logits, mask) -> (ids, lse)               likeliest allowed token (lowest id among equals), log-sum-exp
    likeliest(logits, mask, n) -> (ids, logits)    the n likeliest allowed tokens

and in each the bits of a row depend on that row's own sequence alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class HeadShape:
    """Attention geometry of a layer: query heads, KV heads, head size, rotated dimensions."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int


class LayerKV(NamedTuple):
    """The KV cache of one layer. With an 8-bit cache a stored k (or v) times its head's scale is the value."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    """float32 [kv_heads], or `None` where the cache holds the values themselves."""
    v_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class StepInputs:
    """What a step's rows are, as int32 tensors on the device. M rows, R requests, B blocks in the widest table.

    On a card the tensors are views of one plan buffer, padded to the bucket of a CUDA graph; `rows` and
    `wanted_rows` then say how many are real, and padded rows have slot -1, position 0 and token 0.
    """

    positions: torch.Tensor
    """[M] absolute position of each row in its sequence."""
    slots: torch.Tensor
    """[M] where its K and V go: block * 16 + offset; -1 is nowhere."""
    row_table: torch.Tensor
    """[M] index of its block table."""
    tables: torch.Tensor
    """[R, B] block tables, padded with 0."""
    work: Any
    """What `plan_attention` of the same backend made of the step."""
    wanted: torch.Tensor
    """[W] rows whose logits are wanted."""
    rows: torch.Tensor | None = None
    """[1] how many rows are real; `None` where all are."""
    wanted_rows: torch.Tensor | None = None
    """[1] how many of `wanted` are real; `None` where all are."""
    sampled: torch.Tensor | None = None
    """[running requests] the token each sampled last: an id of -1 - i stands for its entry i."""
    adapters: torch.Tensor | None = None
    """[M] which adapter each row is computed with, -1 for none; `None` where no row has any."""


def choose(device: torch.device, wanted: str) -> tuple[ModuleType, str]:
    """The kernel module for `device` and its name for the fingerprint. `wanted` is `auto` or `reference`."""
    if wanted == "auto" and device.type == "cpu":
        from ragate_engine.kernels import cpu

        if cpu.available():
            return cpu, cpu.NAME
    if wanted == "auto" and device.type == "cuda":
        from ragate_engine.kernels import triton

        return triton, triton.NAME
    from ragate_engine.kernels import reference

    return reference, reference.NAME
