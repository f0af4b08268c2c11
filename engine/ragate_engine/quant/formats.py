"""The GGUF block formats, a row each: how the bytes of a block become codes, scales and offsets.

The layouts are those of ggml's `block_q*` structs; the arithmetic, to the bit, is that of the numpy
dequantizers in the `gguf` package. A new format is a function of ten lines and a row in `FORMATS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ragate_engine.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from collections.abc import Callable

Bytes = NDArray[np.uint8]
Codes = NDArray[np.uint8] | NDArray[np.int8]
Floats = NDArray[np.float32]
Decoded = tuple[Codes, Floats, Floats | None]
"""Of n blocks of W weights: codes [n, W], scales [n, W / group], offsets of the same shape or `None`."""


@dataclass(frozen=True)
class Format:
    """One block format: `decode` takes blocks as uint8 [n, block_bytes]."""

    block_bytes: int
    block_weights: int
    bits: int
    group: int
    decode: Callable[[Bytes], Decoded]


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Low nibbles of each byte, then its high ones: [n, ..., w] -> [n, ..., 2, w]."""
    out = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 0x0F, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])
    return out


def _pairs(packed: Bytes) -> Bytes:
    """The four 2-bit fields of each byte, lowest first: [n, ..., w] -> [n, ..., 4, w]."""
    out = np.empty((*packed.shape[:-1], 4, packed.shape[-1]), np.uint8)
    for field in range(4):
        np.bitwise_and(packed >> np.uint8(2 * field), 3, out=out[..., field, :])
    return out


def _signed(codes: Bytes, zero: int) -> NDArray[np.int8]:
    """Unsigned codes shifted so that `zero` becomes 0, in place."""
    codes -= np.uint8(zero)
    return codes.view(np.int8)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """The 32 high bits of a Q5 block at byte `start`, as 0 or 16: [n, 32]."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, start : start + 4]), axis=-1, bitorder="little")
    return np.left_shift(bits, 4, out=bits)


def _q4_0(blocks: Bytes) -> Decoded:
    return _signed(_nibbles(blocks[:, 2:]).reshape(-1, 32), 8), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 4:]).reshape(-1, 32), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, 6:]).reshape(-1, 32)
    codes |= _fifth_bits(blocks, 2)
    return _signed(codes, 16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, 8:]).reshape(-1, 32)
    codes |= _fifth_bits(blocks, 4)
    return codes, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Decoded:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0), None


def _q2_k(blocks: Bytes) -> Decoded:
    scales, codes = blocks[:, :16], _pairs(blocks[:, 16:80].reshape(-1, 2, 32))
    low, high = (scales & np.uint8(0x0F)).astype(np.float32), (scales >> np.uint8(4)).astype(np.float32)
    return codes.reshape(-1, 256), _half(blocks, 80) * low, -(_half(blocks, 82) * high)


def _q3_k(blocks: Bytes) -> Decoded:
    codes = _pairs(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    # Bit b of mask byte i is the third bit of weight 32 b + i: set means that nothing is subtracted.
    for bit in range(8):
        codes[:, bit] |= ((blocks[:, :32] >> np.uint8(bit)) & np.uint8(1)) << np.uint8(2)
    low = _nibbles(blocks[:, 96:104]).reshape(-1, 16)
    high = _pairs(blocks[:, 104:108]).reshape(-1, 16)
    scales = _signed(low | (high << np.uint8(4)), 32).astype(np.float32)
    return _signed(codes.reshape(-1, 256), 4), _half(blocks, 108) * scales, None


def _scale_min(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and eight 6-bit minima of a Q4_K or Q5_K block: [n, 12] -> two of [n, 8]."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 0x3F, (rest & 0x0F) | ((first >> 2) & 0x30)], axis=-1)
    minima = np.concatenate([second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: Bytes) -> Decoded:
    scales, minima = _scale_min(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q5_k(blocks: Bytes) -> Decoded:
    scales, minima = _scale_min(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    for bit in range(8):
        codes[:, bit] |= ((blocks[:, 16:48] >> np.uint8(bit)) & np.uint8(1)) << np.uint8(4)
    return codes.reshape(-1, 256), _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    codes |= (_pairs(blocks[:, 128:192].reshape(-1, 2, 32)) << np.uint8(4)).reshape(-1, 8, 32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _signed(codes.reshape(-1, 256), 32), _half(blocks, 208) * scales, None


FORMATS: dict[GGMLQuantizationType, Format] = {
    GGMLQuantizationType.Q4_0: Format(18, 32, 4, 32, _q4_0),
    GGMLQuantizationType.Q4_1: Format(20, 32, 4, 32, _q4_1),
    GGMLQuantizationType.Q5_0: Format(22, 32, 5, 32, _q5_0),
    GGMLQuantizationType.Q5_1: Format(24, 32, 5, 32, _q5_1),
    GGMLQuantizationType.Q8_0: Format(34, 32, 8, 32, _q8_0),
    GGMLQuantizationType.Q2_K: Format(84, 256, 2, 16, _q2_k),
    GGMLQuantizationType.Q3_K: Format(110, 256, 3, 16, _q3_k),
    GGMLQuantizationType.Q4_K: Format(144, 256, 4, 32, _q4_k),
    GGMLQuantizationType.Q5_K: Format(176, 256, 5, 32, _q5_k),
    GGMLQuantizationType.Q6_K: Format(210, 256, 6, 16, _q6_k),
}

DENSE: dict[GGMLQuantizationType, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

for _kind, _row in FORMATS.items():
    assert (_row.block_weights, _row.block_bytes) == GGML_QUANT_SIZES[_kind], f"{_kind.name} block size"
    assert _row.block_weights % _row.group == 0, f"{_kind.name} group size"

SUPPORTED = (*FORMATS, *DENSE)
"""Every tensor type that `decode` reads."""

_CHUNK_BYTES = 1 << 20  # decoded at a time: the temporaries of one chunk stay in the cache


def decode(kind: GGMLQuantizationType, data: Bytes) -> QuantTensor | torch.Tensor:
    """The rows of a tensor, uint8 [rows, row_bytes], as codes and scales, or dense as the stored dtype.

    `kind` must be one of `SUPPORTED` and a row a whole number of blocks. Shares no memory with `data`.
    """
    if kind in DENSE:
        return torch.from_numpy(np.array(data)).view(DENSE[kind])
    form = FORMATS[kind]
    rows, row_bytes = data.shape
    width = row_bytes // form.block_bytes * form.block_weights
    blocks = data.reshape(-1, form.block_bytes)
    step = max(1, _CHUNK_BYTES // form.block_bytes)
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN scale is the file's, and stays one
        parts = [form.decode(blocks[start : start + step]) for start in range(0, max(len(blocks), 1), step)]
    codes = np.concatenate([part[0] for part in parts])
    scales = np.concatenate([part[1] for part in parts])
    offsets = [part[2] for part in parts if part[2] is not None]
    groups = (rows, width // form.group)
    return QuantTensor(
        bits=form.bits,
        group=form.group,
        codes=torch.from_numpy(codes.reshape(rows, width)),
        scales=torch.from_numpy(scales.reshape(groups)),
        offsets=torch.from_numpy(np.concatenate(offsets).reshape(groups)) if offsets else None,
        shape=(rows, width),
    )
