"""The Triton kernels behind the common names (NVIDIA cards; `TRITON_INTERPRET=1` runs them on a CPU for tests)."""

from __future__ import annotations

from ragate_engine.kernels.triton.attention import attention, make_kv
from ragate_engine.kernels.triton.int8 import int8, pack_int8, unpack_int8
from ragate_engine.kernels.triton.linear import gated, linear, pack_gated, pack_linear
from ragate_engine.kernels.triton.pick import likeliest, pick
from ragate_engine.kernels.triton.quantized import pack_quantized, quantized, unpack_quantized
from ragate_engine.kernels.triton.rope import rope_write_kv
from ragate_engine.kernels.triton.rowwise import act_mul, embed, last_norm, rms_norm

NAME = "triton-3"

__all__ = [
    "NAME",
    "act_mul",
    "attention",
    "embed",
    "gated",
    "int8",
    "last_norm",
    "likeliest",
    "linear",
    "make_kv",
    "pack_gated",
    "pack_int8",
    "pack_linear",
    "pack_quantized",
    "pick",
    "quantized",
    "rms_norm",
    "rope_write_kv",
    "unpack_int8",
    "unpack_quantized",
]
