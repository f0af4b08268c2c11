"""The operations of the decoder: one set of names, one module per backend, chosen here.

Backends: `reference` (plain torch, any device: the oracle), `cpu` (one C file), `triton` (NVIDIA). Each has

    pack_linear(weight) -> Packed                  prepare a [out, in] weight once
    linear(x, packed, bias, wide) -> y             [M, in] -> [M, out], float32 when wide
    rms_norm(h, x, weight, eps) -> y               h += x (unless None), then normalize; h is updated in place
    make_kv(blocks, kv_heads, head_dim, ...)       the K and V cache of one layer, in the backend's own layout
    rope_write_kv(qkv, ..., step, k, v, shape)     normalize and turn q and k in place, write k and v to their slots
    attention(qkv, k, v, step, shape, ...) -> out  causal paged attention
    act_mul(x, activation) -> y                    act(gate) * up
    pick(logits, mask) -> (ids, lse)               likeliest allowed token (lowest id among equals), log-sum-exp
    likeliest(logits, mask, n) -> (ids, logits)    the n likeliest allowed tokens

and in each the bits of a row depend on that row's own sequence alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class HeadShape:
    """Attention geometry of a layer: query heads, KV heads, head size, rotated dimensions."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int


@dataclass(frozen=True)
class StepInputs:
    """What a step's rows are, as int32 tensors on the device. M rows, R requests, B blocks in the widest table."""

    positions: torch.Tensor
    """[M] absolute position of each row in its sequence."""
    slots: torch.Tensor
    """[M] where its K and V go: block * 16 + offset."""
    row_table: torch.Tensor
    """[M] index of its block table."""
    tables: torch.Tensor
    """[R, B] block tables, padded with 0."""
    groups: torch.Tensor
    """[n, 3] rows read together: (first row, rows, leading blocks they share and that are full for all of them)."""
    singles: int
    """Leading rows that are one new token of a request each."""
    single_groups: int
    """Leading groups that hold those rows; the others are pieces of up to 16 tokens of one request."""


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
