"""The Triton kernels behind the common names (NVIDIA cards; `TRITON_INTERPRET=1` runs them on a CPU for tests)."""

from __future__ import annotations

import torch

from ragate_engine.kernels.reference import likeliest, make_kv
from ragate_engine.kernels.triton.attention import attention
from ragate_engine.kernels.triton.linear import linear
from ragate_engine.kernels.triton.rowwise import act_mul, pick, rms_norm, rope_write_kv

NAME = "triton-2"

__all__ = [
    "NAME",
    "act_mul",
    "attention",
    "likeliest",
    "linear",
    "make_kv",
    "pack_linear",
    "pick",
    "rms_norm",
    "rope_write_kv",
]


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """Prepare `weight` [out, in]: rows side by side."""
    return weight.contiguous()
