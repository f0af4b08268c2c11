"""Weights into GGUF blocks, a function per format: ggml's own choice of scales and codes, to the bit.

The searches are those of ggml's `quantize_row_*_ref` without an importance matrix (ggml-quants.c,
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c). ggml walks through the weights of one group after the
other; here a step is taken in all groups at once, so a group is a column: [weights of a group, groups]. Sums are
added up in ggml's order, a term at a time, and nothing is fused, so that a CPU and a card write the same bytes.
A new format is a function and a row in `_ENCODERS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ragate_engine.quant.formats import DENSE, FORMATS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST = 65504.0
"""No weight may be larger: scales are stored as float16."""
_TINY = 1e-15
"""A group whose weights are all smaller is taken for zero (`GROUP_MAX_EPS`)."""
_CHUNK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Encoded at a time: the temporaries stay near a CPU's cache; a card wants few launches."""


def encode(kind: Kind, rows: torch.Tensor) -> torch.Tensor:
    """Weights [n, in], of any float dtype, as the rows of a GGUF tensor: uint8 [n, row_bytes], on the same device.

    Raises ValueError for a kind that is not written, rows that are no whole number of blocks, and weights that are
    not finite or beyond `LARGEST`.
    """
    if kind in DENSE:
        stored = rows.to(DENSE[kind]).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"there are weights that are not finite, or too large for {kind.name}")
        return stored.view(torch.uint8)
    if kind not in _ENCODERS:
        raise ValueError(f"{kind.name} is not written: take one of {', '.join(k.name for k in WRITTEN)}")
    form = FORMATS[kind]
    count, width = rows.shape
    if width % form.block_weights:
        raise ValueError(
            f"rows of {width} weights do not divide into {kind.name} blocks of {form.block_weights}"
        )
    out = torch.empty(
        (count * width // form.block_weights, form.block_bytes), dtype=torch.uint8, device=rows.device
    )
    blocks = rows.reshape(-1, form.block_weights)
    step = max(1, _CHUNK_WEIGHTS[rows.device.type] // form.block_weights)
    for first in range(0, len(blocks), step):
        chunk = blocks[first : first + step].float()
        if not bool((chunk.abs() <= LARGEST).all()):  # so that NaN fails too
            raise ValueError(f"a weight is not finite, or larger than {LARGEST:.0f}")
        torch.cat(_ENCODERS[kind](chunk), dim=1, out=out[first : first + step])
    return out.view(count, -1)


# --- arithmetic -----------------------------------------------------------------------------------------


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, from the first term to the last."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _over(above: float, below: torch.Tensor) -> torch.Tensor:
    """`above / below` with one rounding; torch would multiply with a reciprocal."""
    return torch.full_like(below, above) / below


def _part(whole: torch.Tensor, count: float) -> torch.Tensor:
    """`whole / count` with one rounding; a card would multiply with a reciprocal."""
    return whole / torch.full_like(whole, count)


def _inverse(scale: torch.Tensor, above: float = 1.0) -> torch.Tensor:
    """`above / scale`; 0 where that is infinite, for there the scale is 0 as a float16."""
    return _over(above, scale).nan_to_num_(posinf=0.0, neginf=0.0)


def _extreme(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The value of largest magnitude, the first of equals, with its sign; zero is +0."""
    return x.gather(dim, x.abs().max(dim, keepdim=True).indices).squeeze(dim) + 0.0


def _half(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers [n] as float16: uint8 [n, 2]."""
    return numbers.to(torch.float16).unsqueeze(1).view(torch.uint8)


def _as_stored(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as they will be read: rounded to float16."""
    return numbers.to(torch.float16).float()


def _columns(x: torch.Tensor, group: int) -> torch.Tensor:
    """Blocks [n, 256] as groups [group, n * 256 / group]."""
    return x.reshape(-1, group).t().contiguous()


def _bytes(columns: torch.Tensor) -> torch.Tensor:
    """Codes of groups, float [group, n * 256 / group], as blocks: uint8 [n, 256]."""
    return columns.to(torch.uint8).t().reshape(-1, 256)


# --- bits -----------------------------------------------------------------------------------------------


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of `bits` bits into bytes, lowest first: [..., 8 / bits, w] -> [..., w]."""
    out = codes[..., 0, :].clone()
    for field in range(1, 8 // bits):
        out |= codes[..., field, :] << bits * field
    return out


def _plane(codes: torch.Tensor, place: int) -> torch.Tensor:
    """Bit `place` of each code: of code 32 b + i it is bit b of byte i: [n, 256] -> [n, 32]."""
    return _packed((codes >> place & 1).view(-1, 8, 32), 1)


def _scale_min(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """The eight 6-bit scales and eight 6-bit minima of a Q4_K or Q5_K block: two of [n, 8] -> [n, 12]."""
    low, high = scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6
    return torch.cat([low, high, scales[:, 4:] & 0x0F | minima[:, 4:] << 4], dim=1)


# --- blocks of 32 ---------------------------------------------------------------------------------------


def _q4_0(x: torch.Tensor) -> list[torch.Tensor]:
    scale = _extreme(x, 1) / -8
    codes = (x * _inverse(scale).unsqueeze(1) + 8.5).clamp_(max=15).to(torch.uint8)
    return [_half(scale), _packed(codes.view(-1, 2, 16), 4)]


def _q5_0(x: torch.Tensor) -> list[torch.Tensor]:
    scale = _extreme(x, 1) / -16
    codes = (x * _inverse(scale).unsqueeze(1) + 16.5).clamp_(max=31).to(torch.uint8)
    return [_half(scale), *_five_bits(codes)]


def _q5_1(x: torch.Tensor) -> list[torch.Tensor]:
    low = x.amin(1) + 0.0  # zero is +0
    scale = _part(x.amax(1) - low + 0.0, 31.0)  # nor is it -0 where zeros of both signs meet
    codes = ((x - low.unsqueeze(1)) * _inverse(scale).unsqueeze(1) + 0.5).clamp_(max=31).to(torch.uint8)
    return [_half(scale), _half(low), *_five_bits(codes)]


def _five_bits(codes: torch.Tensor) -> list[torch.Tensor]:
    """The fifth bits [n, 4], then the nibbles [n, 16], of codes [n, 32]."""
    fifth = _packed((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)
    return [fifth, _packed((codes & 0x0F).view(-1, 2, 16), 4)]


def _q8_0(x: torch.Tensor) -> list[torch.Tensor]:
    scale = _part(x.abs().amax(1), 127.0)
    exact = x * _inverse(scale).unsqueeze(1)
    whole = exact.abs().floor()
    away = whole + ((exact.abs() - whole) * 2).floor()  # C's roundf: halves away from zero
    return [_half(scale), torch.copysign(away, exact).to(torch.int8).view(torch.uint8)]


# --- blocks of 256 --------------------------------------------------------------------------------------

Grid = tuple[float, float, int]
"""The inverse scales that are tried: first, step, number of steps, added to the largest code."""


def _affine(
    x: torch.Tensor, weights: torch.Tensor, top: int, grid: Grid, magnitude: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`make_qkx2_quants`: the scale, minimum and codes in [0, top] that fit each group best.

    `x` and `weights` are [group, n]. For each inverse scale of the `grid` the weights are rounded to codes, and the
    scale and minimum that suit these codes best (weighted least squares) are worked out; those of the smallest
    weighted error are kept (of squares, or of `magnitude`). Returns scale [n], what is subtracted [n], codes.
    """

    def error(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        wrong = codes.mul(scale).add_(low).sub_(x)
        return _sum((wrong.abs_() if magnitude else wrong.square_()).mul_(weights))

    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    sum_w, sum_x = _sum(weights), _sum(weights * x)
    flat = high == low
    inverse = _over(top, high - low)
    scale = _over(1.0, inverse)
    codes = (x - low).mul_(inverse).round_().clamp_(0, top)
    best = error(codes, scale, low)
    first, step, steps = (np.float32(number) for number in grid)
    terms = x.new_empty((len(x), 3, x.shape[1]))
    for i in range(int(steps) + 1):
        inverse = _over(float(first + step * np.float32(i) + np.float32(top)), high - low)
        tried = (x - low).mul_(inverse).round_().clamp_(0, top)
        torch.mul(weights, tried, out=terms[:, 0])
        torch.mul(terms[:, 0], tried, out=terms[:, 1])
        torch.mul(terms[:, 0], x, out=terms[:, 2])
        sum_l, sum_l2, sum_xl = _sum(terms)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        new_scale = torch.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low.clamp_(max=0)
        now = error(tried, new_scale, new_low)
        better = (det > 0) & (now < best)  # False where the group is flat: its errors are NaN
        best = torch.where(better, now, best)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
        codes = torch.where(better, tried, codes)
    return scale.masked_fill_(flat, 0), -low, codes.masked_fill_(flat, 0)


def _symmetric(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`make_qx_quants` with weights x²: the scale and codes in [-top, top) that fit each group best.

    `x` is [group, n]. As `_affine`, without a minimum, over inverse scales around the one that makes the largest
    weight -top. Returns scale [n] and codes + top; of a group of zeros both are 0, as in ggml.
    """
    extreme = _extreme(x, 0)
    zero = extreme.abs() < _TINY
    square = x * x
    cube = square * x
    terms = x.new_empty((len(x), 2, x.shape[1]))
    scale = best = torch.zeros_like(extreme)
    codes = torch.zeros_like(x)
    for i in (0, *range(-9, 0), *range(1, 10)):
        inverse = _over(-float(np.float32(top) + np.float32(0.1) * np.float32(i)), extreme)
        tried = (x * inverse).round_().clamp_(-top, top - 1)
        torch.mul(cube, tried, out=terms[:, 0])
        torch.mul(square, tried, out=terms[:, 1]).mul_(tried)
        sum_xl, sum_l2 = _sum(terms)
        fit = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
        better = torch.ones_like(zero) if i == 0 else (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = torch.where(better, fit, scale)
        best = torch.where(better, fit * sum_xl, best)
        codes = torch.where(better, tried, codes)
    return scale.masked_fill_(zero, 0), codes.add_(top).masked_fill_(zero, 0)


def _descended(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`make_q3_quants` with weights x²: as `_symmetric`, but one code after the other is improved, five times over."""
    extreme = _extreme(x, 0)
    zero = extreme.abs() < _TINY
    square = x * x
    codes = (x * _over(-top, extreme)).round_().clamp_(-top, top - 1)
    sum_xl, sum_l2 = _sum(square * x * codes), _sum(square * codes * codes)
    for _ in range(5):
        for weight, w, code in zip(x, square, codes, strict=True):
            xl, l2 = sum_xl - w * weight * code, sum_l2 - w * code * code
            new = (weight * l2 / xl).round_().clamp_(-top, top - 1)
            new_xl, new_l2 = xl + w * weight * new, l2 + w * new * new
            better = (xl > 0) & (new != code) & (new_l2 > 0)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            code.copy_(torch.where(better, new, code))
            sum_xl = torch.where(better, new_xl, sum_xl)
            sum_l2 = torch.where(better, new_l2, sum_l2)
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0)
    return scale.masked_fill_(zero, 0), codes.add_(top).masked_fill_(zero, 0)


def _recoded(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bottom: int, top: int
) -> torch.Tensor:
    """The codes of x [group, n] under the scales [n] as they are stored, from 0 on; the old ones where a scale is 0."""
    new = ((x + low) / scale).round_().clamp_(bottom, top).sub_(bottom)
    return _bytes(torch.where(scale == 0, codes, new))


def _shared(numbers: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers >= 0 of the groups of each block [n, groups] as codes up to `top`, uint8, and their scale [n]."""
    largest = numbers.amax(1).clamp_(min=0) + 0.0  # zero is +0
    inverse = _inverse(largest, top)
    codes = (numbers * inverse.unsqueeze(1)).round_().clamp_(0, top).to(torch.uint8)
    return codes, _part(largest, top)


def _q2_k(x: torch.Tensor) -> list[torch.Tensor]:
    groups = _columns(x, 16)
    scale, low, codes = _affine(groups, groups.abs(), 3, (-0.5, 0.1, 15), True)
    scales, step = _shared(scale.view(-1, 16), 15)
    minima, min_step = _shared(low.view(-1, 16), 15)
    d = (_as_stored(step).unsqueeze(1) * scales).view(-1)
    m = (_as_stored(min_step).unsqueeze(1) * minima).view(-1)
    quants = _recoded(groups, codes, d, m, 0, 3)
    fields = _packed(quants.view(-1, 2, 4, 32), 2).view(-1, 64)
    return [scales | minima << 4, fields, _half(step), _half(min_step)]


def _q3_k(x: torch.Tensor) -> list[torch.Tensor]:
    groups = _columns(x, 16)
    scale, codes = _descended(groups, 4)
    scale = scale.view(-1, 16)
    inverse = _inverse(_extreme(scale, 1), -32.0)
    stored = (scale * inverse.unsqueeze(1)).round_().clamp_(-32, 31)
    step = _inverse(inverse)
    d = (_as_stored(step).unsqueeze(1) * stored).view(-1)
    quants = _recoded(groups, codes, d, torch.zeros_like(d), -4, 3)
    # a block of zeros has the bytes 0 for its scales, which are read as -32
    six = torch.where(inverse.unsqueeze(1) == 0, 0, stored + 32).to(torch.uint8)
    low, high = _packed((six & 0x0F).view(-1, 2, 8), 4), _packed((six >> 4).view(-1, 4, 4), 2)
    fields = _packed((quants & 3).view(-1, 2, 4, 32), 2).view(-1, 64)
    return [_plane(quants, 2), fields, low, high, _half(step)]


def _q4_k(x: torch.Tensor) -> list[torch.Tensor]:
    head, quants = _four_or_five(x, 15, (-1.0, 0.1, 20))
    return [*head, _packed(quants.view(-1, 4, 2, 32), 4).view(-1, 128)]


def _q5_k(x: torch.Tensor) -> list[torch.Tensor]:
    head, quants = _four_or_five(x, 31, (-0.5, 0.1, 15))
    nibbles = _packed((quants & 0x0F).view(-1, 4, 2, 32), 4).view(-1, 128)
    return [*head, _plane(quants, 4), nibbles]


def _four_or_five(x: torch.Tensor, top: int, grid: Grid) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The scales of a Q4_K or Q5_K block, 16 bytes, and its codes [n, 256]."""
    groups = _columns(x, 32)
    mean = (
        (_sum(groups * groups) / 32).double().sqrt_().float()
    )  # the float32 root of MKL is not always the nearest
    weights = mean + groups.abs()
    scale, low, codes = _affine(groups, weights, top, grid, False)
    scales, step = _shared(scale.view(-1, 8), 63)
    minima, min_step = _shared(low.view(-1, 8), 63)
    d = (_as_stored(step).unsqueeze(1) * scales).view(-1)
    m = (_as_stored(min_step).unsqueeze(1) * minima).view(-1)
    quants = _recoded(groups, codes, d, m, 0, top)
    return [_half(step), _half(min_step), _scale_min(scales, minima)], quants


def _q6_k(x: torch.Tensor) -> list[torch.Tensor]:
    groups = _columns(x, 16)
    scale, codes = _symmetric(groups, 32)
    scale = scale.view(-1, 16)
    largest = _extreme(scale, 1)
    zero = largest.abs() < _TINY
    inverse = _inverse(largest, -128.0).masked_fill_(zero, 0)
    stored = (scale * inverse.unsqueeze(1)).round_().clamp_(-128, 127)
    step = _inverse(inverse)
    d = (_as_stored(step).unsqueeze(1) * stored).view(-1)
    quants = _recoded(groups, codes, d, torch.zeros_like(d), -32, 31).masked_fill_(zero.unsqueeze(1), 0)
    nibbles = _packed((quants & 0x0F).view(-1, 2, 2, 64), 4).view(-1, 128)
    pairs = _packed((quants >> 4).view(-1, 2, 4, 32), 2).view(-1, 64)
    return [nibbles, pairs, stored.to(torch.int8).view(torch.uint8), _half(step)]


_ENCODERS: dict[Kind, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
"""float32 blocks [n, block_weights] to the parts of a block in the order of the file, each uint8 [n, bytes]."""

WRITTEN = (*_ENCODERS, *DENSE)
"""Every tensor type that `encode` makes."""
