"""AWQ, GPTQ and compressed-tensors: how the int32 words of a safetensors folder become `QuantTensor`, and back.

All three pack codes of `bits` bits into words as one stream, lowest bits first (3-bit codes run over word boundaries),
and mean `w = scale * (code - zero)`. They differ in the axis that is packed, in the order within a word, in what is
stored for a zero point, and in whether inputs were reordered. With float16 or bfloat16 scales every step is exact in
float32, so that the weights are those of the published unpacking to the bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ragate_engine.errors import ModelFileError
from ragate_engine.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AWQ_BITS = (4,)
GPTQ_BITS = (2, 3, 4, 8)
COMPRESSED_BITS = (4, 8)

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column 8 c + _AWQ_ORDER[i] is field i of word c (AutoAWQ, awq/utils/packing_utils.py)."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INDICES = (torch.int32, torch.int64)

Shape = tuple[int, ...]


def pack_words(codes: torch.Tensor, bits: int, places: Sequence[int] | None = None) -> torch.Tensor:
    """Codes [..., n], uint8 below 2**bits, as int32 words [..., n * bits / 32]: one stream of bits, lowest first.

    `places[i]` says which of the codes of a word is its field i, where that is not the i-th. Raises ValueError where
    n codes do not fill whole words.
    """
    period = math.lcm(bits, 32)
    if codes.shape[-1] % (period // bits):
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole words")
    fields = codes.int().contiguous().view(*codes.shape[:-1], -1, period // bits)
    words = fields.new_zeros((*fields.shape[:-1], period // 32))
    for i, place in enumerate(places or range(period // bits)):
        word, shift = divmod(bits * i, 32)
        words[..., word] |= fields[..., place] << shift
        if shift + bits > 32:
            words[..., word + 1] |= fields[..., place] >> 32 - shift
    return words.flatten(-2)


def unpack_words(words: torch.Tensor, bits: int, places: Sequence[int] | None = None) -> torch.Tensor:
    """The codes of `pack_words`: int32 [..., m] -> uint8 [..., m * 32 / bits]. ValueError for words left over."""
    period = math.lcm(bits, 32)
    if words.shape[-1] % (period // 32):
        raise ValueError(f"{words.shape[-1]} words hold no whole number of {bits}-bit codes")
    blocks = words.view(*words.shape[:-1], -1, period // 32)
    codes = words.new_empty((*blocks.shape[:-1], period // bits), dtype=torch.uint8)
    for i, place in enumerate(places or range(period // bits)):
        word, shift = divmod(bits * i, 32)
        field = blocks[..., word] >> shift
        if shift + bits > 32:  # the sign has filled what the next word's lowest bits belong to
            field = field & ((1 << 32 - shift) - 1) | blocks[..., word + 1] << 32 - shift
        codes[..., place] = field & (1 << bits) - 1
    return codes.flatten(-2)


# --- AWQ ------------------------------------------------------------------------------------------------


def pack_awq(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int = 4
) -> dict[str, torch.Tensor]:
    """AutoAWQ's "gemm" layout of codes, uint8 [out, in], scales and zeros (uint8), both [out, in / group].

    Gives qweight int32 [in, out / 8], qzeros int32 [in / group, out / 8] and scales float16 [in / group, out].
    Source: AutoAWQ, awq/modules/linear/gemm.py. Raises ValueError for other than 4 bits.
    """
    if bits not in AWQ_BITS:
        raise ValueError(f"AWQ packs 4 bits, not {bits}")
    return {
        "qweight": pack_words(codes.T, bits, _AWQ_ORDER),
        "qzeros": pack_words(zeros.T, bits, _AWQ_ORDER),
        "scales": scales.T.to(torch.float16).contiguous(),
    }


def awq_shape(tensors: Mapping[str, torch.Tensor], bits: int, group: int, name: str) -> tuple[int, int]:
    """[out, in] of a weight from the shapes of its parts, which may lie on the meta device.

    Raises ModelFileError, naming `name`, where a part is missing or they do not fit each other.
    """
    if bits not in AWQ_BITS:
        raise ModelFileError(f"{name} is packed in {bits} bits: of AWQ, 4 bits are read")
    _has(tensors, ("qweight", "qzeros", "scales"), name)
    width, words = _matrix(tensors, "qweight", name)
    shape = (words * 32 // bits, width)
    groups = _groups(width, group, name)
    _fits(tensors, "qzeros", (groups, words), name, (torch.int32,))
    _fits(tensors, "scales", (groups, shape[0]), name, _FLOATS)
    return shape


def unpack_awq(tensors: Mapping[str, torch.Tensor], bits: int, group: int, name: str) -> QuantTensor:
    """The weight in AutoAWQ's "gemm" layout (`pack_awq`); `group` -1 is a whole row. Source: AutoAWQ's `unpack_awq`.

    Raises ModelFileError, naming `name`, for parts that are missing, do not fit, or hold a scale that is no number.
    """
    shape = awq_shape(tensors, bits, group, name)
    codes = unpack_words(tensors["qweight"], bits, _AWQ_ORDER).T.contiguous()
    zeros = unpack_words(tensors["qzeros"], bits, _AWQ_ORDER).T
    return _affine(codes, tensors["scales"].T, zeros, bits, shape, None, name)


# --- GPTQ -----------------------------------------------------------------------------------------------


def pack_gptq(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    version: int = 1,
) -> dict[str, torch.Tensor]:
    """AutoGPTQ's layout of codes, uint8 [out, in], scales and zeros (uint8), both [out, groups], g_idx int32 [in].

    `g_idx[j]` is the group of input j; columns stay in the order of the inputs. Gives qweight int32
    [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales float16 [groups, out] and g_idx. Version 1
    stores zero points minus one, modulo 2**bits: some readers (vLLM) do not bring a zero point of 0 back, so write
    asymmetric weights as version 2 (`checkpoint_format: gptq_v2`). Source: AutoGPTQ, qlinear_cuda.py, `pack`.
    Raises ValueError where the shapes do not fill whole words.
    """
    stored = zeros if version == 2 else zeros.int().sub(1).bitwise_and((1 << bits) - 1)
    return {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words(stored.T, bits),
        "scales": scales.T.to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def gptq_shape(tensors: Mapping[str, torch.Tensor], bits: int, group: int, name: str) -> tuple[int, int]:
    """As `awq_shape`, for AutoGPTQ's layout; `g_idx` may be missing."""
    if bits not in GPTQ_BITS:
        raise ModelFileError(f"{name} is packed in {bits} bits: of GPTQ, {listed(GPTQ_BITS)} are read")
    _has(tensors, ("qweight", "qzeros", "scales"), name)
    words, out = _matrix(tensors, "qweight", name)
    if words * 32 % bits or out * bits % 32 or (bits == 3 and words % 3):
        raise ModelFileError(
            f"{name}.qweight has shape {[words, out]}, which {bits}-bit codes in words of 32 bits do not fill"
        )
    width = words * 32 // bits
    groups = _groups(width, group, name)
    _fits(tensors, "qzeros", (groups, out * bits // 32), name, (torch.int32,))
    _fits(tensors, "scales", (groups, out), name, _FLOATS)
    if "g_idx" in tensors:
        _fits(tensors, "g_idx", (width,), name, _INDICES)
    return out, width


def unpack_gptq(
    tensors: Mapping[str, torch.Tensor], bits: int, group: int, name: str, version: int
) -> QuantTensor:
    """The weight in AutoGPTQ's layout (`pack_gptq`); `group` -1 is a whole row, `version` 1 or 2.

    Where g_idx says that inputs were grouped in another order (act-order), columns are stored group by group and
    `order` leads back. Source: AutoGPTQ, qlinear_cuda.py; zero points of version 1 wrap as in its later releases.
    Raises ModelFileError as `unpack_awq` does, and for a g_idx that does not give each group its inputs.
    """
    out, width = gptq_shape(tensors, bits, group, name)
    codes = unpack_words(tensors["qweight"].T.contiguous(), bits)
    zeros = unpack_words(tensors["qzeros"], bits).T
    if version == 1:
        zeros = zeros.int().add(1).bitwise_and((1 << bits) - 1)
    order = _order(tensors.get("g_idx"), zeros.shape[1], width, name)
    return _affine(codes, tensors["scales"].T, zeros, bits, (out, width), order, name)


# --- compressed-tensors ---------------------------------------------------------------------------------


def compressed_shape(
    tensors: Mapping[str, torch.Tensor], bits: int, group: int, name: str
) -> tuple[int, int]:
    """As `awq_shape`, for "pack-quantized"; the two numbers of `weight_shape` are read, so it must hold them."""
    if bits not in COMPRESSED_BITS:
        raise ModelFileError(
            f"{name} is packed in {bits} bits: of compressed-tensors, {listed(COMPRESSED_BITS)} are read"
        )
    _has(tensors, ("weight_packed", "weight_scale", "weight_shape"), name)
    out, words = _matrix(tensors, "weight_packed", name)
    _fits(tensors, "weight_shape", (2,), name, _INDICES)
    stated = tensors["weight_shape"].tolist()
    if stated[0] != out or -(-stated[1] * bits // 32) != words:
        raise ModelFileError(
            f"{name}.weight_packed has shape {[out, words]}, which {stated} weights of {bits} bits do not fill"
        )
    width: int = stated[1]
    _check_scales(tensors, out, width, bits, group, name)
    return out, width


def unpack_compressed(tensors: Mapping[str, torch.Tensor], bits: int, group: int, name: str) -> QuantTensor:
    """A weight of compressed-tensors' "pack-quantized"; `group` -1 is a whole row.

    Parts: weight_packed int32 [out, in * bits / 32], rounded up; weight_scale [out, groups] (or [out], or one for
    all); weight_shape int [2]; maybe weight_zero_point, int32 [out * bits / 32, groups], rounded up, or not packed,
    int8 and shaped as the scales; maybe weight_g_idx int [in]. Codes and zero points are signed, and packed with
    2**(bits - 1) added. Source: compressed-tensors, compressors/pack_quantized, `unpack_from_int32`. Raises
    ModelFileError as `unpack_gptq` does.
    """
    shape = compressed_shape(tensors, bits, group, name)
    codes = unpack_words(tensors["weight_packed"], bits)[:, : shape[1]].contiguous()
    return _compressed(codes, tensors, bits, shape, group, name)


def int8_shape(tensors: Mapping[str, torch.Tensor], group: int, name: str) -> tuple[int, int]:
    """As `awq_shape`, for int8 weights that lie there as they are."""
    _has(tensors, ("weight", "weight_scale"), name)
    out, width = _matrix(tensors, "weight", name, torch.int8)
    _check_scales(tensors, out, width, 8, group, name)
    return out, width


def unpack_int8(tensors: Mapping[str, torch.Tensor], group: int, name: str) -> QuantTensor:
    """int8 weights as they are: compressed-tensors' "int-quantized". Parts as in `unpack_compressed`, but for `weight`,
    int8 [out, in], in place of weight_packed and weight_shape. Raises ModelFileError as `unpack_gptq` does.
    """
    shape = int8_shape(tensors, group, name)
    codes = tensors["weight"].view(torch.uint8) ^ 128  # 128 more, without the sign
    return _compressed(codes, tensors, 8, shape, group, name)


def _check_scales(
    tensors: Mapping[str, torch.Tensor], out: int, width: int, bits: int, group: int, name: str
) -> None:
    """Do scales, zero points and g_idx go with weights [out, in]?"""
    groups = _groups(width, group, name)
    shape = tuple(tensors["weight_scale"].shape)
    expected = shape if groups == 1 and shape in ((), (1,), (out,), (1, 1)) else (out, groups)
    _fits(tensors, "weight_scale", expected, name, _FLOATS)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        packed = zeros.dtype == torch.int32
        fitting = (-(-out * bits // 32), groups) if packed else expected
        _fits(tensors, "weight_zero_point", fitting, name, (torch.int8, torch.int32))
    if "weight_g_idx" in tensors:
        _fits(tensors, "weight_g_idx", (width,), name, _INDICES)


def _compressed(
    codes: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    shape: tuple[int, int],
    group: int,
    name: str,
) -> QuantTensor:
    """The weight of unsigned codes [out, in] and of what lies beside them."""
    out, width = shape
    groups = _groups(width, group, name)
    scales = tensors["weight_scale"].reshape(-1, groups).expand(out, groups)
    zeros, middle = tensors.get("weight_zero_point"), 1 << bits - 1
    if zeros is None:
        zeros = torch.full_like(scales, middle, dtype=torch.int32)
    elif zeros.dtype == torch.int32:
        zeros = unpack_words(zeros.T.contiguous(), bits)[:, :out].T
    else:
        zeros = zeros.reshape(-1, groups).expand(out, groups).int() + middle
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None and bool((g_idx == -1).all()):  # as it is before calibration
        g_idx = None
    return _affine(codes, scales, zeros, bits, shape, _order(g_idx, groups, width, name), name)


# --- what they share ------------------------------------------------------------------------------------


def _affine(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    shape: tuple[int, int],
    order: torch.Tensor | None,
    name: str,
) -> QuantTensor:
    """scale * (code - zero) as codes, scales and offsets; signed codes alone where every zero point is the middle."""
    scales = scales.float().contiguous()
    if not bool(torch.isfinite(scales).all()):
        raise ModelFileError(
            f"{name} has a scale that is no finite number: fetch or quantize the model again"
        )
    if order is not None:
        codes = codes[:, order]
    middle = 1 << bits - 1
    offsets = None
    if bool((zeros == middle).all()):
        codes = codes.sub_(middle).view(torch.int8)
    else:
        offsets = scales * zeros.float()
        offsets.neg_()
    return QuantTensor(bits, shape[1] // scales.shape[1], codes, scales, offsets, shape, order)


def _order(g_idx: torch.Tensor | None, groups: int, width: int, name: str) -> torch.Tensor | None:
    """Inputs group by group, as int64 [in]; `None` where that is the order they have."""
    if g_idx is None:
        return None
    each = width // groups
    in_turn = torch.arange(width, device=g_idx.device) // each
    if torch.equal(g_idx.long(), in_turn):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), in_turn):  # of another range too
        raise ModelFileError(
            f"{name}.g_idx does not give each of {groups} groups {each} of {width} inputs: "
            "fetch or quantize the model again"
        )
    return order


def _groups(width: int, group: int, name: str) -> int:
    """How many groups a row of `width` weights has."""
    if group == -1:
        return 1
    if group < 1 or width % group:
        raise ModelFileError(f"{name} has rows of {width} weights, which groups of {group} do not divide")
    return width // group


def _has(tensors: Mapping[str, torch.Tensor], parts: tuple[str, ...], name: str) -> None:
    for part in parts:
        if part not in tensors:
            raise ModelFileError(f"{name} lacks its {part}: fetch or quantize the model again")


def _matrix(
    tensors: Mapping[str, torch.Tensor], part: str, name: str, dtype: torch.dtype = torch.int32
) -> tuple[int, int]:
    """The shape of codes, which must be a matrix of `dtype`."""
    shape = tuple(tensors[part].shape)
    if len(shape) != 2 or 0 in shape:
        raise ModelFileError(f"{name}.{part} has shape {list(shape)}, expected a matrix")
    _is_typed(tensors[part], (dtype,), f"{name}.{part}")
    return shape[0], shape[1]


def _fits(
    tensors: Mapping[str, torch.Tensor],
    part: str,
    expected: Shape,
    name: str,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Is a part, other than the codes, of the shape and of a type that go with them?"""
    if tuple(tensors[part].shape) != expected:
        raise ModelFileError(
            f"{name}.{part} has shape {list(tensors[part].shape)}, expected {list(expected)}"
        )
    _is_typed(tensors[part], dtypes, f"{name}.{part}")


def _is_typed(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ModelFileError(
            f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, expected {names}"
        )


def listed(bits: tuple[int, ...]) -> str:
    """`(2, 4, 8)` as `2, 4 and 8 bits`."""
    *rest, last = map(str, bits)
    return f"{', '.join(rest)} and {last} bits" if rest else f"{last} bits"
