"""The GGUF block formats, a row each: how the bytes of a block become codes, scales and offsets.

The layouts are those of ggml's `block_q*` structs; the arithmetic, to the bit, is that of the numpy
dequantizers in the `gguf` package. It runs where the bytes are, on a CPU or on a card, with the same bits. A new
format is a function of ten lines and a row in `FORMATS`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING

import torch

from ragate_engine.quant.tensor import Form, QuantTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Decoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of n blocks of W weights: codes [n, W], scales [n, W / group], offsets of the same shape or `None`."""


class Kind(IntEnum):
    """The tensor types of GGUF, by their number in the file (`ggml_type` in ggml.h)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


@dataclass(frozen=True)
class Format:
    """One block format: `decode` takes blocks as uint8 [n, block_bytes] and gives codes of `bits` bits."""

    block_bytes: int
    block_weights: int
    bits: int
    group: int
    decode: Callable[[torch.Tensor], Decoded]


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _words(packed: torch.Tensor) -> torch.Tensor:
    """A copy as int32 words: a CPU has no vector shift for bytes."""
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The fields of `bits` bits of each byte, lowest first: [n, ..., w] -> [n, ..., 8 / bits, w]."""
    count = 8 // bits
    out = packed.new_empty((*packed.shape[:-1], count, packed.shape[-1]))
    words, fields = _words(packed), out.view(torch.int32)
    mask = 0x01010101 * ((1 << bits) - 1)
    for field in range(count):
        torch.bitwise_and(words >> bits * field, mask, out=fields[..., field, :])
    return out


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low nibbles of each byte, then its high ones: [n, ..., w] -> [n, ..., 2, w]."""
    return _fields(packed, 4)


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """The four 2-bit fields of each byte, lowest first: [n, ..., w] -> [n, ..., 4, w]."""
    return _fields(packed, 2)


def _signed(codes: torch.Tensor, zero: int) -> torch.Tensor:
    """Unsigned codes shifted so that `zero` becomes 0, in place, as int8."""
    return codes.sub_(zero).view(torch.int8)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """The bits of each byte, lowest first, as 0 or 16: [n, w] -> [n, 8 w]."""
    # eight copies of a byte side by side, of which the i-th keeps bit i alone
    spread = (packed.long() * 0x0101010101010101).bitwise_and_(0x8040201008040201 - (1 << 64))
    return spread.view(torch.uint8).ne(0).view(torch.uint8).mul_(16)


def _or_planes(codes: torch.Tensor, packed: torch.Tensor, place: int) -> None:
    """Set bit `place` of code 32 b + i, in place, to bit b of byte i: codes [n, 256], packed [n, 32]."""
    words = _words(packed)
    planes = codes.view(torch.int32).view(-1, 8, 8)
    for bit in range(8):
        moved = words << place - bit if bit < place else words >> bit - place
        planes[:, bit] |= moved.bitwise_and_(0x01010101 << place)


def _q4_0(blocks: torch.Tensor) -> Decoded:
    return _signed(_nibbles(blocks[:, 2:]).view(-1, 32), 8), _half(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> Decoded:
    return _nibbles(blocks[:, 4:]).view(-1, 32), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 6:]).view(-1, 32)
    codes |= _fifth_bits(blocks[:, 2:6])
    return _signed(codes, 16), _half(blocks, 0), None


def _q5_1(blocks: torch.Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 8:]).view(-1, 32)
    codes |= _fifth_bits(blocks[:, 4:8])
    return codes, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> Decoded:
    return blocks[:, 2:].clone(memory_format=torch.contiguous_format).view(torch.int8), _half(blocks, 0), None


def _q2_k(blocks: torch.Tensor) -> Decoded:
    scales, codes = blocks[:, :16], _pairs(blocks[:, 16:80].reshape(-1, 2, 32))
    low, high = (scales & 0x0F).float(), (scales >> 4).float()
    return codes.view(-1, 256), _half(blocks, 80) * low, -(_half(blocks, 82) * high)


def _q3_k(blocks: torch.Tensor) -> Decoded:
    codes = _pairs(blocks[:, 32:96].reshape(-1, 2, 32)).view(-1, 256)
    # Bit b of mask byte i is the third bit of weight 32 b + i: set means that nothing is subtracted.
    _or_planes(codes, blocks[:, :32], 2)
    low = _nibbles(blocks[:, 96:104]).view(-1, 16)
    high = _pairs(blocks[:, 104:108]).view(-1, 16)
    scales = _signed(low | high << 4, 32).float()
    return _signed(codes, 4), _half(blocks, 108) * scales, None


def _scale_min(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight 6-bit scales and eight 6-bit minima of a Q4_K or Q5_K block: [n, 12] -> two of [n, 8]."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 0x3F, (rest & 0x0F) | (first >> 2 & 0x30)], dim=-1)
    minima = torch.cat([second & 0x3F, (rest >> 4) | (second >> 2 & 0x30)], dim=-1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor) -> Decoded:
    scales, minima = _scale_min(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 256)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q5_k(blocks: torch.Tensor) -> Decoded:
    scales, minima = _scale_min(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 256)
    _or_planes(codes, blocks[:, 16:48], 4)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: torch.Tensor) -> Decoded:
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 8, 32)
    codes |= (_pairs(blocks[:, 128:192].reshape(-1, 2, 32)) << 4).view(-1, 8, 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _signed(codes.view(-1, 256), 32), _half(blocks, 208) * scales, None


_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL stand for (`kvalues_iq4nl` in ggml-common.h)."""


def _iq4_nl(blocks: torch.Tensor) -> Decoded:
    # affine only in what the codes stand for, so those are kept: a byte each, where the file has four bits
    values = torch.tensor(_NL_VALUES, dtype=torch.int8, device=blocks.device)
    codes = _nibbles(blocks[:, 2:]).view(-1).int()
    return values.index_select(0, codes).view(-1, 32), _half(blocks, 0), None


FORMATS: dict[Kind, Format] = {
    Kind.Q4_0: Format(18, 32, 4, 32, _q4_0),
    Kind.Q4_1: Format(20, 32, 4, 32, _q4_1),
    Kind.Q5_0: Format(22, 32, 5, 32, _q5_0),
    Kind.Q5_1: Format(24, 32, 5, 32, _q5_1),
    Kind.Q8_0: Format(34, 32, 8, 32, _q8_0),
    Kind.Q2_K: Format(84, 256, 2, 16, _q2_k),
    Kind.Q3_K: Format(110, 256, 3, 16, _q3_k),
    Kind.Q4_K: Format(144, 256, 4, 32, _q4_k),
    Kind.Q5_K: Format(176, 256, 5, 32, _q5_k),
    Kind.Q6_K: Format(210, 256, 6, 16, _q6_k),
    Kind.IQ4_NL: Format(18, 32, 8, 32, _iq4_nl),
}

DENSE: dict[Kind, torch.dtype] = {
    Kind.F32: torch.float32,
    Kind.F16: torch.float16,
    Kind.BF16: torch.bfloat16,
}


@cache
def form_of(kind: Kind) -> Form:
    """The form of a tensor of `kind`, which must be one of `SUPPORTED`."""
    if kind in DENSE:
        return Form(DENSE[kind].itemsize)
    stored = FORMATS[kind]
    _, _, offsets = stored.decode(torch.zeros(1, stored.block_bytes, dtype=torch.uint8))
    return Form(
        stored.block_bytes / stored.block_weights, stored.bits, stored.group, beside=offsets is not None
    )


_UNREAD: dict[Kind, tuple[int, int]] = {
    Kind.Q8_1: (32, 40),
    Kind.Q8_K: (256, 292),
    Kind.IQ2_XXS: (256, 66),
    Kind.IQ2_XS: (256, 74),
    Kind.IQ3_XXS: (256, 98),
    Kind.IQ1_S: (256, 50),
    Kind.IQ3_S: (256, 110),
    Kind.IQ2_S: (256, 82),
    Kind.IQ4_XS: (256, 136),
    Kind.I8: (1, 1),
    Kind.I16: (1, 2),
    Kind.I32: (1, 4),
    Kind.I64: (1, 8),
    Kind.F64: (1, 8),
    Kind.IQ1_M: (256, 56),
    Kind.TQ1_0: (256, 54),
    Kind.TQ2_0: (256, 66),
    Kind.MXFP4: (32, 17),
    Kind.NVFP4: (64, 36),
    Kind.Q1_0: (128, 18),
}

SIZES: dict[Kind, tuple[int, int]] = {
    **{kind: (form.block_weights, form.block_bytes) for kind, form in FORMATS.items()},
    **{kind: (1, dtype.itemsize) for kind, dtype in DENSE.items()},
    **_UNREAD,
}
"""Weights and bytes of one block, of every type there is: a header is checked before a type is refused."""

SUPPORTED = (*FORMATS, *DENSE)
"""Every tensor type that `decode` reads."""

_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Decoded at a time: on a CPU the temporaries stay in its cache, on a card the launches are few."""


def decode(kind: Kind, data: torch.Tensor) -> QuantTensor | torch.Tensor:
    """The rows of a tensor, uint8 [rows, row_bytes], as codes and scales, or dense as the stored dtype.

    `kind` must be one of `SUPPORTED` and a row a whole number of blocks. The result is where `data` is; codes share
    no memory with it, dense weights are a view of it.
    """
    if kind in DENSE:
        return data.view(DENSE[kind])
    form = FORMATS[kind]
    rows, row_bytes = data.shape
    width = row_bytes // form.block_bytes * form.block_weights
    blocks = data.reshape(-1, form.block_bytes)
    with _one_thread(data.device):
        step = _CHUNK_BYTES[data.device.type] // form.block_bytes
        parts = [form.decode(blocks[first : first + step]) for first in range(0, max(len(blocks), 1), step)]
    codes, scales, offsets = zip(*parts, strict=True)
    groups = (rows, width // form.group)
    return QuantTensor(
        bits=form.bits,
        group=form.group,
        codes=_joined(codes).view(rows, width),
        scales=_joined(scales).view(groups),
        offsets=None if offsets[0] is None else _joined(offsets).view(groups),
        shape=(rows, width),
    )


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Some thirty short operations a chunk: on a busy CPU threads would wait for each other at each of them."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
