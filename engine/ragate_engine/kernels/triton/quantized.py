"""y = x W^T for a quantized W, whose codes become bfloat16 in the registers that feed the tensor cores.

Shapes: x [M, K], W [N, K], y [M, N]. Moves at least the codes, N K bits / 8 bytes; does 2 M N K operations.
Plan: the product is computed transposed, W x^T, since the left operand of a warp's product may come from registers.
Words lie in memory as the tensor cores want their codes: 16 bytes of one thread are its share of 16 rows and some
columns, so that no code changes its thread. Two codes are unpacked at once by shift and mask: bits 0 to 7 of a bfloat16
are the number q 2^-133 (the subnormal ones and the first exponent have one step), and the stored scale makes up for
that. Then q * scale + offset or (q - zero) * scale, rounded once. Codes of few bits need no shift each, where their
group's scale makes up for their place as well. What the largest scale leaves no room for is made up for in the end.
Bits: one chain of 16-wide products along K, as in the plain product, whose bits these are. A weight that is narrow and
long has too few rows to keep the card busy: its K is cut into SEGMENTS, of one chain each, that are added in their
order. What cuts it is its shape, never the number of rows of x:
- up to 16 rows (`_few`): bound by unpacking. Rows of W have a warp of their own, or one for each segment;
- up to 2,047 (`_many`): programs of a tile and a segment, whose weights go from registers to the tensor cores;
- more: the weights are unpacked first (`unpacked`), for so many rows the cheapest, and the plain product's kernel, or
  `_summed` where there are segments, does the rest.

Words: of LOW = 4 or 2 bits of each code, P = 16 / LOW planes of 16 columns are a block. Word (g, t, c, h, e) of a block
is of row 8 h + g and has bits i LOW of column 16 i + 8 c + 2 t + e. What is above the low bits (HIGH = 0, 1, 2 or 4
bits) lies in words of its own, of LOW / HIGH blocks each: those of block q have bit i LOW + q HIGH of column i. Scales
of rows g and 8 + g share an int32, and so does what stands beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton.linear import Packed, _act_mul
from ragate_engine.kernels.triton.linear import product as plain_product
from ragate_engine.quant.tensor import QuantTensor

PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
"""LOW and HIGH of codes by their bits."""
CONSTANT, ZERO, OFFSET = 0, 1, 2
"""What stands beside a scale: nothing (zero is half the range), the zero, the offset."""
LEAST = 133
"""2^-LEAST is the bfloat16 whose bits are 1."""


@dataclass(frozen=True)
class PackedQuant:
    """A quantized weight [N, K] as the kernels read it."""

    low: torch.Tensor
    """int16 [N / 16, blocks, 256]."""
    high: torch.Tensor | None
    """int16 [N / 16, blocks LOW / HIGH, 256]."""
    scales: torch.Tensor
    """[N / 16, sets, loads, 8, 1 or 2]: bfloat16 of row g and of row 8 + g are 4 bytes; a word is such a pair of scales
    and the pair beside it, or two pairs of scales, int64, or the only pair of scales, int32. A set is of one group, or
    of the groups of a block where it has several. Rows lie side by side, so that a load leaves no gaps."""
    bits: int
    group: int
    kind: int
    columns: int
    """K."""
    power: int = 0
    """Codes and scales make W / 2^power."""
    segments: int = 1
    """S: segment s begins at column s K' / S, K' being the columns of all blocks."""
    done: torch.Tensor | None = None
    """int32, zeros: how many segments of each tile are done, while a product runs."""
    order: torch.Tensor | None = None
    """int64 [K]: column j meets input order[j]."""
    gated: bool = False
    """Rows are 8 of gate, 8 of up, and so on."""

    @property
    def rows(self) -> int:
        """N."""
        return 16 * self.low.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.nbytes for part in (self.low, self.high, self.scales) if part is not None)


def packable(weight: QuantTensor) -> bool:
    """Whether the kernels take `weight`; what they do not take is served dense."""
    out, width = weight.shape
    power_of_two = weight.group & (weight.group - 1) == 0
    cut = weight.group >= 16 and (power_of_two or weight.group == width)
    return weight.bits in PLANES and out % 16 == 0 and width % 16 == 0 and cut


SEGMENTS = 4
"""Of a narrow and long weight."""
STEP = 128
"""K is padded to whole steps of so many columns in each segment, or of as many as share words of high bits."""
UNPACK_ROWS = 2048
"""From so many rows on the weights are unpacked first."""


@triton.constexpr_function
def run_of(bits, groups):
    """How many planes of a block with so many groups one shift unpacks: codes that fit in 8 bits side by side, each
    plane with scales of its own."""
    low, _ = PLANES[bits]
    return (8 - bits) // low + 1 if groups == 16 // low else 1


class Walk(NamedTuple):
    """How K is walked."""

    block: int
    """B = 16 P, columns of a block."""
    share: int
    """Blocks that share words of high bits."""
    groups: int
    """Groups of a block, 1 where a group is no smaller."""

    @property
    def step(self) -> int:
        """Columns of a step."""
        return max(STEP, self.block * self.share)


def walk_of(bits: int, group: int) -> Walk:
    """The walk for codes of one kind."""
    low, high = PLANES[bits]
    block = 256 // low
    return Walk(block, low // high if high else 1, max(1, block // group))


def segments_of(out: int, width: int) -> int:
    """Into how many segments the K = `width` of a weight with `out` rows is cut."""
    return SEGMENTS if out <= 8192 and width >= 4096 else 1


def pack_quantized(weights: list[QuantTensor], gated: bool = False) -> tuple[PackedQuant, ...] | None:
    """Prepare weights [out_i, in] for one product, or a gate and an up; `None` where the kernels do not take them.

    Neighbours of one kind share a part; the parts' columns follow each other in the result.
    """
    if not all(packable(weight) for weight in weights):
        return None
    runs = [[weights[0]]]
    for weight in weights[1:]:
        if _alike(runs[-1][0], weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    if gated and len(runs) > 1:
        return None
    return tuple(_pack(run, gated) for run in runs)


def _alike(one: QuantTensor, other: QuantTensor) -> bool:
    """Whether one launch can multiply both."""
    if (one.bits, one.group, one.offsets is None) != (other.bits, other.group, other.offsets is None):
        return False
    if one.order is None or other.order is None:
        return one.order is other.order
    return torch.equal(one.order, other.order)


def _pack(weights: list[QuantTensor], gated: bool) -> PackedQuant:
    """Weights that are alike, one below the other; the two of a gated pair in turns of 8 rows."""
    first = weights[0]
    bits, group = first.bits, first.group
    low, high = PLANES[bits]
    walk = walk_of(bits, group)
    signed = 1 << (bits - 1) if first.offsets is None else 0

    def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
        if not gated:
            return torch.cat(parts)
        return torch.stack([part.unflatten(0, (-1, 8)) for part in parts], dim=1).flatten(0, 2)

    scales = stacked([w.scales for w in weights])
    kind, beside = CONSTANT, None
    if first.offsets is not None:
        kind, beside = OFFSET, stacked([w.offsets for w in weights if w.offsets is not None])
        zeros = torch.round(-beside / torch.where(scales == 0, 1, scales))
        if torch.equal(-zeros * scales, beside) and bool(((zeros >= 0) & (zeros < 1 << bits)).all()):
            kind, beside = ZERO, zeros
    codes = stacked([w.codes for w in weights]).to(torch.int16) + signed
    segments = 1 if gated else segments_of(*codes.shape)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (segments * walk.step)))
    # [N / 16, h, g, blocks, planes, c, t, e]
    fields = codes.unflatten(1, (-1, walk.block // 16, 2, 4, 2)).unflatten(0, (-1, 2, 8))
    mask = (1 << low) - 1
    lows = _words([(fields[:, :, :, :, i] & mask) << i * low for i in range(walk.block // 16)])
    highs = None
    if high:
        share = low // high
        above = (fields >> low).unflatten(3, (-1, share)).transpose(4, 5).flatten(4, 5)
        highs = _words([above[:, :, :, :, i] << i * high for i in range(16 // high)])
    sets = -(-codes.shape[1] // max(group, walk.block))
    scales = scales.bfloat16()
    power = min(max(0, math.frexp(float(scales.abs().max()))[1] + LEAST - 128), 127)
    factors = _factors(bits, group, power, scales.shape[1], codes.device)
    parts = [(scales * factors).bfloat16()]
    if beside is not None:
        parts.append(
            (beside.bfloat16() * (1 / factors / 2.0**power if kind == ZERO else 2.0**-power)).bfloat16()
        )
    pairs = torch.stack([_pairs(part, sets, walk.groups) for part in parts], dim=4).flatten(3)
    done = None
    if segments > 1:  # tiles of no fewer than 64 rows and columns
        done = torch.zeros(-(-len(codes) // 64) * (UNPACK_ROWS // 64), dtype=torch.int32, device=codes.device)
    if pairs.shape[3] > 1:
        pairs = pairs.contiguous().view(torch.int64)
    pairs = pairs.unflatten(3, (-1, min(2, pairs.shape[3]))).transpose(2, 3).contiguous()
    return PackedQuant(
        lows, highs, pairs, bits, group, kind, first.shape[1], power, segments, done, first.order, gated
    )


def _factors(bits: int, group: int, power: int, groups: int, device: torch.device) -> torch.Tensor:
    """What a row's scales are stored with, by where their codes stand: float64 [groups]."""
    low, _ = PLANES[bits]
    run = run_of(bits, walk_of(bits, group).groups)
    places = [i % (16 // low) % run * low for i in range(groups)]
    return torch.tensor([2.0 ** (LEAST - power - at) for at in places], dtype=torch.float64, device=device)


def _words(fields: list[torch.Tensor]) -> torch.Tensor:
    """Fields of a word each in its place, int16 [N / 16, h, g, blocks, c, t, e] -> [N / 16, blocks, g t c h e]."""
    word = fields[0]
    for field in fields[1:]:
        word = word | field
    return word.permute(0, 3, 2, 5, 4, 1, 6).flatten(2).contiguous()


def _pairs(values: torch.Tensor, sets: int, groups: int) -> torch.Tensor:
    """bfloat16 [N, groups of K] -> those of rows g and 8 + g as int32 [N / 16, sets, 8, groups of a set]."""
    padded = torch.nn.functional.pad(values, (0, sets * groups - values.shape[1]))
    halves = padded.view(torch.int16).to(torch.int32).unflatten(0, (-1, 2, 8)).unflatten(3, (-1, groups))
    pairs: torch.Tensor = halves[:, 0] & 0xFFFF | halves[:, 1] << 16
    return pairs.transpose(1, 2)


def dequantize(packed: PackedQuant) -> torch.Tensor:
    """The reference: the bfloat16 weights [N, K] that the kernels multiply with, in the packed order of rows."""
    low, high = PLANES[packed.bits]
    share = walk_of(packed.bits, packed.group).share

    def fields_of(words: torch.Tensor, bits: int) -> torch.Tensor:
        """[N / 16, blocks, g t c h e] -> [N / 16, h, g, blocks, fields, c, t, e]."""
        each = words.to(torch.int32).unflatten(2, (8, 4, 2, 2, 2)).permute(0, 5, 2, 1, 4, 3, 6)
        return torch.stack([each >> i * bits & (1 << bits) - 1 for i in range(16 // bits)], dim=4)

    codes = fields_of(packed.low, low)
    if packed.high is not None:
        above = fields_of(packed.high, high).unflatten(4, (-1, share)).transpose(4, 5).flatten(3, 4)
        codes = codes + (above << low)
    codes = codes.flatten(3).flatten(0, 2)[:, : packed.columns]

    def halves(pairs: torch.Tensor) -> torch.Tensor:
        """[N / 16, sets, 8, words] -> float64 [N, groups of K]."""
        each = torch.stack([pairs, pairs >> 16], dim=1).to(torch.int16).view(torch.bfloat16)
        return each.transpose(2, 3).flatten(3).flatten(0, 2).double()

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(packed.group, dim=1)[:, : packed.columns]

    pairs = packed.scales.transpose(2, 3).flatten(3).view(torch.int32)
    scales = halves(pairs if packed.kind == CONSTANT else pairs[..., ::2])
    factors = _factors(packed.bits, packed.group, packed.power, scales.shape[1], scales.device)
    scales = spread(scales / factors)
    if packed.kind == CONSTANT:
        return ((codes - (1 << packed.bits - 1)) * scales).bfloat16()
    beside = halves(pairs[..., 1::2]) * 2.0**packed.power
    if packed.kind == ZERO:
        return ((codes - spread(beside * factors)) * scales).bfloat16()
    return (codes * scales + spread(beside)).bfloat16()


def unpack_quantized(parts: tuple[PackedQuant, ...]) -> torch.Tensor:
    """The bfloat16 weights [out, in] of a product that is no gated pair, their columns in the order of inputs."""
    weights = []
    for part in parts:
        weight = dequantize(part)
        if part.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, part.order, weight)
        weights.append(weight)
    return torch.cat(weights)


class Tile(NamedTuple):
    """How a product is cut: rows and columns of a tile, columns of W a step, warps, pipeline stages, which kernel."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    few: bool = False


@triton.constexpr_function
def _instructions(LOW, HIGH, KIND, HOPPER):
    """PTX of two neighbouring weights, all operands in pairs: $0 from low words $1 shifted right by $2, high words $3
    turned left by $4, scales $5, and $6 beside them; the code then stands at bit $7.

    Cards before Hopper know bfloat16 only in fused steps, which round the same differences and products."""
    low, high = (1 << LOW) - 1, ((1 << HIGH) - 1) << LOW
    code = ["and.b32 s, $2, 31;", "shr.b32 t, $1, s;", "and.b32 s, $7, 31;"]
    code += [f"shl.b32 v, {low << 16 | low:#x}, s;", "and.b32 t, t, v;"]
    if HIGH > 0:
        code += [f"shl.b32 v, {high << 16 | high:#x}, s;", "and.b32 s, $4, 31;"]
        code += ["shf.l.wrap.b32 u, $3, $3, s;", "lop3.b32 t, u, v, t, 0xea;"]
    if KIND != 1:
        code += ["fma.rn.bf16x2 $0, t, $5, $6;"]
    elif HOPPER:
        code += ["sub.rn.bf16x2 t, t, $6;", "mul.rn.bf16x2 $0, t, $5;"]
    else:
        code += ["mov.b32 u, 0x3f803f80;", "xor.b32 v, $6, 0x80008000;", "fma.rn.bf16x2 t, t, u, v;"]
        code += ["mov.b32 v, 0x80008000;", "fma.rn.bf16x2 $0, t, $5, v;"]
    return "{\n.reg .b32 t, u, s, v;\n" + "\n".join(code) + "\n}"


@triton.jit
def _scales(
    at, T: tl.constexpr, LOW: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """A set's scales and what stands beside them from `at` [T * 8, 1], bfloat16 [T * 8, 1, GROUPS, 1, 1, 2, 1].

    Two words at most are loaded at once and then chosen by their group: which register that is, is known in advance.
    A load of more has more elements than threads: the compiler would not repeat it in the layout of the codes.
    """
    WORDS: tl.constexpr = GROUPS if KIND > 0 or GROUPS == 1 else GROUPS // 2
    scale = tl.zeros((T * 8, 1, GROUPS, 1, 1, 1, 1), tl.int32)
    beside = scale
    if WORDS == 1:
        scale, beside = _chosen(scale, beside, tl.load(at), 0, GROUPS, KIND)
    else:
        for i in tl.static_range(0, WORDS, 2):
            one, other = tl.split(tl.load(at + (8 * i + tl.arange(0, 2)[None, :])))
            scale, beside = _chosen(scale, beside, one, i, GROUPS, KIND)
            scale, beside = _chosen(scale, beside, other, i + 1, GROUPS, KIND)
    if KIND == 0 and ASM > 0:  # the scale by -zero, which is a code at its place
        RUN: tl.constexpr = run_of(BITS, GROUPS)
        place = tl.arange(0, GROUPS).reshape(1, 1, GROUPS, 1, 1, 1, 1) % RUN * LOW
        zero = 0x8000 | (1 << BITS - 1) << place
        beside = tl.inline_asm_elementwise(
            "{\n.reg .b32 none;\nmov.b32 none, 0x80008000;\nfma.rn.bf16x2 $0, $1, $2, none;\n}",
            "=r,r,r",
            [scale, tl.broadcast_to(zero << 16 | zero, scale.shape)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return _halves(scale, ASM), _halves(beside, ASM)


@triton.jit
def _chosen(scale, beside, word, i: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr):
    """Pairs of scales and what is beside them, with what word `i` of a set holds in its place."""
    group = tl.arange(0, GROUPS).reshape(1, 1, GROUPS, 1, 1, 1, 1)
    word = word.reshape(scale.shape[0], 1, 1, 1, 1, 1, 1)
    first = word.to(tl.int32)
    if KIND > 0:
        scale = tl.where(group == i, first, scale)
        beside = tl.where(group == i, (word >> 32).to(tl.int32), beside)
    elif GROUPS == 1:
        scale = tl.where(group == i, first, scale)
    else:
        scale = tl.where(group == 2 * i, first, scale)
        scale = tl.where(group == 2 * i + 1, (word >> 32).to(tl.int32), scale)
    return scale, beside


@triton.jit
def _halves(pairs, ASM: tl.constexpr):
    """bfloat16 of rows g (lower half) and 8 + g along dimension 5; interpreted float32, since the interpreter makes
    nothing of subnormal bfloat16."""
    h = tl.arange(0, 2).reshape(1, 1, 1, 1, 1, 2, 1)
    if ASM == 0:
        return tl.where(h == 0, pairs << 16, pairs >> 16 << 16).to(tl.float32, bitcast=True)
    return tl.where(h == 0, pairs, pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _weights(
    low, high, scale, beside, T: tl.constexpr, FIRST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    GROUPS: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One block of T tiles of 16 rows: words [T * 32, 8] and what `_scales` gives -> bfloat16 [T, 16, B]. FIRST is the
    first of the block's bits in its high words.

    The order of dimensions is what lets the compiler leave every code in its register. Interpreted the weights stay
    float32: the interpreter neither rounds to bfloat16 nor multiplies it."""
    P: tl.constexpr = 16 // LOW
    shape: tl.constexpr = [T * 8, 4, GROUPS, P // GROUPS, 2, 2, 2]
    RUN: tl.constexpr = run_of(BITS, GROUPS)
    plane = tl.arange(0, P).reshape(1, 1, GROUPS, P // GROUPS, 1, 1, 1)
    place = plane % RUN * LOW
    right = plane * LOW - place
    turn = (LOW - FIRST - right) & 31
    low = tl.broadcast_to(low.reshape(T * 8, 4, 1, 1, 2, 2, 2), shape)
    high = tl.broadcast_to(high.reshape(T * 8, 4, 1, 1, 2, 2, 2), shape)
    scale = tl.broadcast_to(scale, shape)
    beside = tl.broadcast_to(beside, shape)
    if ASM > 0:
        words: tl.constexpr = _instructions(LOW, HIGH, KIND, ASM > 1)
        right = tl.broadcast_to(right.to(tl.int16), shape)
        turn = tl.broadcast_to(turn.to(tl.int16), shape)
        place = tl.broadcast_to(place.to(tl.int16), shape)
        value = tl.inline_asm_elementwise(
            words,
            "=r,r,r,r,r,r,r,r",
            [low, right, high, turn, scale, beside, place],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        code = (low.to(tl.int32) >> plane * LOW) & ((1 << LOW) - 1)
        if HIGH > 0:
            code += ((high.to(tl.int32) >> plane * LOW + FIRST) & ((1 << HIGH) - 1)) << LOW
        value = code.to(tl.float32)
        unit = (1 << place).to(tl.float32) * 2.0**-133
        scale = scale * unit
        if KIND == 0:
            value = (value - 2 ** (BITS - 1)) * scale
        elif KIND == 1:
            value = (value - beside / unit) * scale
        else:
            value = value * scale + beside
    # [T, g, t, planes, c, h, e] -> [T, h, g, planes, c, t, e]
    value = value.reshape(T, 8, 4, P, 2, 2, 2).permute(0, 5, 1, 3, 4, 2, 6)
    return value.reshape(T, 16, 16 * P)


@triton.jit
def _in_order(parts):
    """[A, B, 4] -> [A, B], added from the first to the last."""
    even, odd = tl.split(parts.reshape(parts.shape[0], parts.shape[1], 2, 2))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0 + s1 + s2 + s3


@triton.jit
def _settled(acc, ASM: tl.constexpr):
    """`acc` itself, as something that was used: the compiler must wait for the products that make it.

    It would otherwise let them run on into the next step, whose weights are unpacked into the registers they read.
    """
    if ASM > 0:
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc


@triton.jit
def _store(
    acc, post, bias, y, m, n, M, N, stride, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """The tile of y whose transpose is `acc` [BN, BM] times `post`, from row m and column n on."""
    acc *= post
    rows = m + tl.arange(0, BM)
    columns = n + tl.arange(0, BN)
    at = y + rows[:, None].to(tl.int64) * stride
    if HAS_BIAS:
        acc += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1))
        acc = _act_mul(gate, up, GELU).reshape(BN // 2, BM)
        columns = n // 2 + tl.arange(0, BN // 2)
        N = N // 2
    tl.store(
        at + columns[None, :], acc.T.to(y.dtype.element_ty), (rows[:, None] < M) & (columns < N)[None, :]
    )


@triton.jit(do_not_specialize=["M"])
def _few(
    x, low, high, scales, post, bias, y, count, M, N, K, SPAN, stride, BM: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, BLOCKS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, COUNTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program has BN rows of W. Where there are segments, each of its warps has one, and they meet in the end."""
    B: tl.constexpr = 256 // LOW
    Q: tl.constexpr = LOW // HIGH if HIGH > 0 else 1
    R: tl.constexpr = BN // 16
    T: tl.constexpr = R * S
    # words of a row in a set of scales; blocks that share a set
    WORDS: tl.constexpr = GROUPS if KIND > 0 or GROUPS == 1 else GROUPS // 2
    ALIKE: tl.constexpr = GROUP // B if GROUP > B else 1
    m = tl.program_id(1) * BM
    each = tl.arange(0, T * 32)
    lane = each % 32
    segment = each // 32 % S
    tile = tl.minimum(tl.program_id(0) * R + each // (32 * S), N // 16 - 1)
    blocks = SPAN // B
    low_at = low + (tile * S + segment) * (blocks * 256)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # the weights do not wait for the kernel before: their first 4 KB go to the L2 cache now
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [low_at + tl.minimum(lane * 64, blocks * 256 - 64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
        if m >= M:
            return
    word = tl.arange(0, 8)[None, :]
    low_at = (low_at + lane * 8)[:, None] + word
    high_at = high + ((tile * S + segment) * (blocks // Q * 256) + lane * 8)[:, None] + word
    sets = tl.cdiv(S * SPAN, GROUP) if GROUPS == 1 else S * blocks
    line = tl.arange(0, T * 8)
    line_segment = line // 8 % S
    line_tile = tl.minimum(tl.program_id(0) * R + line // (8 * S), N // 16 - 1)
    scale_at = scales + (line_tile * (8 * sets) * WORDS + line % 8 * (2 if WORDS > 1 else 1))[:, None]
    rows = m + tl.arange(0, BM)
    ks = tl.arange(0, B)
    if S == 1:
        at = rows[:, None].to(tl.int64) * K + ks[None, :]
        inside = (rows < M)[:, None]
        column = ks[None, :]
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        column = (tl.arange(0, S) * SPAN)[:, None, None] + ks[None, None, :]
        at = rows[None, :, None].to(tl.int64) * K + column
        inside = (rows < M)[None, :, None]
        acc = tl.zeros((S, BN, BM), tl.float32)
    x_at = x + at
    for b in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        for i in tl.static_range(BLOCKS):
            words = tl.load(low_at + (b + i) * 256)
            if HIGH == 0:
                above = words
            elif i % Q == 0:
                above = tl.load(high_at + (b + i) // Q * 256)
            if i % ALIKE == 0:
                block = line_segment * blocks + b + i
                set_at = block * B // GROUP if GROUPS == 1 else block
                scale, beside = _scales(
                    scale_at + (set_at * (8 * WORDS))[:, None], T, LOW, GROUPS, KIND, BITS, ASM
                )
            w = _weights(words, above, scale, beside, T, i % Q * HIGH, LOW, HIGH, GROUPS, KIND, BITS, ASM)
            if EVEN:
                a = tl.load(x_at + (b + i) * B, inside, 0.0)
            else:
                a = tl.load(x_at + (b + i) * B, inside & ((b + i) * B + column < K), 0.0)
            if ASM == 0:  # the interpreter multiplies no bfloat16
                a = a.to(tl.float32)
            if S == 1:
                acc = tl.dot(w.reshape(BN, B), a.T, acc, input_precision="ieee")
            else:
                w = w.reshape(R, S, 16, B).permute(1, 0, 2, 3).reshape(S, BN, B)
                acc = tl.dot(w, a.permute(0, 2, 1), acc, input_precision="ieee")
    if S > 1:
        acc = _in_order(acc.permute(1, 2, 0))
    _store(acc, post, bias, y, m, tl.program_id(0) * BN, M, N, stride, BM, BN, HAS_BIAS, GATED, GELU)


@triton.jit(do_not_specialize=["M"])
def _many(
    x, low, high, scales, post, bias, y, count, sums, done, M, N, K, SPAN, stride, BM: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, BLOCKS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr, COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has BM rows of x, BN of W and one segment; the memory accelerator brings x.

    Segments of a tile hand their sum on, the first to the second and so forth; programs of earlier segments begin
    first, so that none waits for one that cannot begin. `done` counts the segments of each tile, 0 before and after.
    """
    B: tl.constexpr = 256 // LOW
    Q: tl.constexpr = LOW // HIGH if HIGH > 0 else 1
    T: tl.constexpr = BN // 16
    WORDS: tl.constexpr = GROUPS if KIND > 0 or GROUPS == 1 else GROUPS // 2
    ALIKE: tl.constexpr = GROUP // B if GROUP > B else 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
    # tiles of rows side by side share a tile of weights in the L2 cache
    tiles_m = tl.cdiv(M, BM)
    tiles = tiles_m * tl.cdiv(N, BN)
    if tl.program_id(0) >= tiles * S:
        return
    segment = tl.program_id(0) // tiles
    own = tl.program_id(0) % tiles
    m = own % tiles_m * BM
    n = own // tiles_m * BN
    each = tl.arange(0, T * 32)
    lane = each % 32
    tile = tl.minimum(n // 16 + each // 32, N // 16 - 1)
    blocks = SPAN // B
    word = tl.arange(0, 8)[None, :]
    low_at = low + (tile * (S * blocks * 256) + lane * 8)[:, None] + word
    high_at = high + (tile * (S * blocks // Q * 256) + lane * 8)[:, None] + word
    sets = tl.cdiv(S * SPAN, GROUP) if GROUPS == 1 else S * blocks
    line = tl.arange(0, T * 8)
    line_tile = tl.minimum(n // 16 + line // 8, N // 16 - 1)
    scale_at = scales + (line_tile * (8 * sets) * WORDS + line % 8 * (2 if WORDS > 1 else 1))[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(segment * blocks, segment * blocks + blocks, BLOCKS, num_stages=STAGES):
        for i in tl.static_range(BLOCKS):
            words = tl.load(low_at + (b + i) * 256)
            if HIGH == 0:
                above = words
            elif i % Q == 0:
                above = tl.load(high_at + (b + i) // Q * 256)
            if i % ALIKE == 0:
                set_at = (b + i) * B // GROUP if GROUPS == 1 else b + i
                scale, beside = _scales(scale_at + set_at * (8 * WORDS), T, LOW, GROUPS, KIND, BITS, ASM)
            w = _weights(words, above, scale, beside, T, i % Q * HIGH, LOW, HIGH, GROUPS, KIND, BITS, ASM)
            a = x.load([m, (b + i) * B])
            if ASM == 0:
                a = a.to(tl.float32)
            acc = _settled(tl.dot(w.reshape(BN, B), a.T, acc, input_precision="ieee"), ASM)
    if S > 1:
        sum_at = sums + own * (BN * BM) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        if segment > 0:
            while tl.atomic_add(done + own, 0, sem="acquire") != segment:
                pass
            tl.debug_barrier()
            acc = tl.load(sum_at, cache_modifier=".cg") + acc
        if segment < S - 1:
            tl.store(sum_at, acc)
            tl.debug_barrier()
            tl.atomic_xchg(done + own, segment + 1, sem="release")
            return
        tl.atomic_xchg(done + own, 0, sem="relaxed")
    _store(acc, post, bias, y, m, n, M, N, stride, BM, BN, HAS_BIAS, GATED, GELU)


@triton.jit(do_not_specialize=["M"])
def _summed(
    x, w, bias, y, count, M, N, K, SPAN, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    S: tl.constexpr, COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The product with unpacked weights [N, K], in segments."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
    tiles_m = tl.cdiv(M, BM)
    if tl.program_id(0) >= tiles_m * tl.cdiv(N, BN):
        return
    # 8 tiles of rows side by side share a tile of weights in the L2 cache
    tiles_n = tl.cdiv(N, BN)
    group = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    m = (group * 8 + (tl.program_id(0) % (8 * tiles_n)) % height) * BM
    n = (tl.program_id(0) % (8 * tiles_n)) // height * BN
    total = tl.zeros((BM, BN), tl.float32)
    for segment in range(S):
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(segment * SPAN, segment * SPAN + SPAN, BK, num_stages=STAGES):
            a, b = x.load([m, k]), w.load([n, k])
            if ASM == 0:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        total += acc
    _store(total.T, 1.0, bias, y, m, n, M, N, stride, BM, BN, HAS_BIAS, False, False)


@triton.jit
def _dense(
    low, high, scales, post, w, N, K, columns, BN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr, BLOCKS: tl.constexpr,
    GATED: tl.constexpr, RAISED: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weights themselves, bfloat16 [N, K]: BN rows and a step of columns a program."""
    B: tl.constexpr = 256 // LOW
    Q: tl.constexpr = LOW // HIGH if HIGH > 0 else 1
    T: tl.constexpr = BN // 16
    WORDS: tl.constexpr = GROUPS if KIND > 0 or GROUPS == 1 else GROUPS // 2
    ALIKE: tl.constexpr = GROUP // B if GROUP > B else 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    each = tl.arange(0, T * 32)
    lane = each % 32
    tile = tl.minimum(tl.program_id(1) * T + each // 32, N // 16 - 1)
    blocks = columns // B
    b = tl.program_id(0) * BLOCKS
    word = tl.arange(0, 8)[None, :]
    low_at = low + (tile * (blocks * 256) + lane * 8)[:, None] + word
    high_at = high + (tile * (blocks // Q * 256) + lane * 8)[:, None] + word
    sets = tl.cdiv(columns, GROUP) if GROUPS == 1 else blocks
    line = tl.arange(0, T * 8)
    line_tile = tl.minimum(tl.program_id(1) * T + line // 8, N // 16 - 1)
    scale_at = scales + (line_tile * (8 * sets) * WORDS + line % 8 * (2 if WORDS > 1 else 1))[:, None]
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < N)[:, None]
    if GATED:  # 8 of gate and 8 of up become gate 0, up 0, gate 1, up 1, ...
        rows = rows // 16 * 16 + rows % 8 * 2 + rows // 8 % 2
    at = w + rows[:, None].to(tl.int64) * K
    for i in tl.static_range(BLOCKS):
        words = tl.load(low_at + (b + i) * 256)
        if HIGH == 0:
            above = words
        elif i % Q == 0:
            above = tl.load(high_at + (b + i) // Q * 256)
        if i % ALIKE == 0:
            set_at = (b + i) * B // GROUP if GROUPS == 1 else b + i
            scale, beside = _scales(scale_at + set_at * (8 * WORDS), T, LOW, GROUPS, KIND, BITS, ASM)
        part = _weights(words, above, scale, beside, T, i % Q * HIGH, LOW, HIGH, GROUPS, KIND, BITS, ASM)
        column = (b + i) * B + tl.arange(0, B)
        part = part.reshape(BN, B)
        if RAISED:
            part = part.to(tl.float32) * post
        tl.store(at + column[None, :], part.to(tl.bfloat16), inside & (column < K)[None, :])


def unpacked(packed: PackedQuant) -> torch.Tensor:
    """What the kernels multiply with, bfloat16 [N, K]; rows of a gated pair take turns."""
    low, high = PLANES[packed.bits]
    walk = walk_of(packed.bits, packed.group)
    N, K = packed.rows, packed.columns
    columns = packed.low.shape[1] * walk.block
    w = torch.empty(N, K, dtype=torch.bfloat16, device=packed.low.device)
    _dense[(columns // walk.step, triton.cdiv(N, 64))](
        packed.low, packed.low if packed.high is None else packed.high, packed.scales, 2.0**packed.power, w, N, K,
        columns, 64, low, high, packed.bits, packed.group, walk.groups, packed.kind, walk.step // walk.block,
        packed.gated, packed.power > 0, device.ASM, device.PDL, num_warps=4, **device.launch(),
    )  # fmt: skip
    return w


def best_tile(M: int, packed: PackedQuant) -> Tile:
    """The tile for x [M, K] and a weight, by measurement on the H200: it never changes a bit.

    What counts with few rows is that all programs are on the card at once, and then how far ahead they load: of tiles
    with the stages that they need, the first that has room for them.
    """
    cut = packed.segments > 1
    wide = packed.rows > 192 * device.programs()
    walk = walk_of(packed.bits, packed.group)
    step = walk.block * walk.share
    height = 8 if M <= 8 else 16
    tiles: tuple[tuple[Tile, int], ...]
    if M <= 16 and cut:
        tiles = (
            (Tile(height, 16, 256, packed.segments, 5, True), 3),
            (Tile(height, 16, 128, packed.segments, 5, True), 4),
            (Tile(height, 32, 256, packed.segments, 3, True), 2),
        )
    elif M <= 8:
        wider = Tile(8, 64, 512, 2, 3, True) if packed.bits <= 3 else Tile(8, 32, 256, 2, 4, True)
        return fitting(wider if wide else Tile(8, 16, 256, 1, 4, True), packed)
    elif M <= 16 and wide:
        tiles = (
            (Tile(16, 64, 256, 2, 4, True), 4),
            (Tile(16, 64, 128, 2, 6, True), 5),
            (Tile(16, 32, 256, 2, 3, True), 2),
        )
    elif M <= 16:
        return fitting(Tile(16, 32, 256, 2, 3, True), packed)
    elif M <= 64:
        tiles = ((Tile(64, 128 if wide else 64, 128, 4, 4), 2),)
    elif M <= 256 and not cut and packed.rows <= 64 * device.programs():
        return fitting(Tile(64, 64, 128, 4, 3), packed)
    elif step > 64 and (M <= 512 or packed.bits > 4):
        return fitting(Tile(128, 64, 128, 4, 3) if step == 128 else Tile(64, 128, 256, 4, 2), packed)
    elif M <= 256 and cut:
        return fitting(Tile(128, 64, 64, 4, 4), packed)
    elif M <= 512:
        return fitting(Tile(256 if M > 128 else 128, 64, 64, 4, 3), packed)
    else:
        return fitting(Tile(128, 128, 64, 4, 3), packed)
    for tile, stages in tiles:
        programs = triton.cdiv(M, tile.rows) * triton.cdiv(packed.rows, tile.columns)
        most = 4
        if not tile.few:
            programs, most = programs * packed.segments, 2 if wide else 3
        found = fitting(tile, packed, min(triton.cdiv(programs, device.programs()), most))
        if found.stages >= stages:
            break
    return found


def fitting(tile: Tile, packed: PackedQuant, together: int = 1) -> Tile:
    """`tile` with whole steps of the weight's walk, and as much of it as leaves room for so many on a multiprocessor,
    or for fewer where that would leave none of a pipeline.

    None of it changes a bit.
    """
    walk = walk_of(packed.bits, packed.group)
    segments = packed.segments if tile.few else 1
    inner = max(tile.inner, walk.block * walk.share)
    while packed.low.shape[1] * walk.block // packed.segments % inner:
        inner //= 2
    row = packed.scales.shape[2] * packed.scales.shape[4] * packed.scales.element_size()
    words = 2 * packed.bits * inner + 8 * row * max(1, inner // max(packed.group, walk.block))
    words *= segments * tile.columns // 16
    while True:
        # each program takes a kilobyte, and x for the tensor cores is held for a step longer than words
        room = (device.shared_memory() + 1024) // together - 1152
        rows = 2 * segments * tile.rows * inner
        stages = (room + words + (rows if tile.few else 0)) // (words + rows)
        if stages >= 2 or (together == 1 and tile.rows <= 16):
            return tile._replace(inner=inner, stages=min(tile.stages, stages))
        if together > 1:
            together -= 1
        else:
            tile = tile._replace(rows=tile.rows // 2)


def product(
    x: torch.Tensor,
    packed: PackedQuant,
    bias: torch.Tensor | None,
    wide: bool,
    activation: str | None,
    rows: torch.Tensor | None,
    y: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x [M, K] bfloat16 times the packed weight; rows past `rows` (int32 [1]) may be left as they are."""
    M, K = x.shape
    N, S = packed.rows, packed.segments
    if packed.order is not None:
        x = x[:, packed.order]
    if y is None:
        y = torch.empty(
            M, N // 2 if packed.gated else N, dtype=torch.float32 if wide else x.dtype, device=x.device
        )
    if tile is None and M >= UNPACK_ROWS:
        return product_unpacked(x, unpacked(packed), packed, bias, wide, activation, rows, y)
    low, high = PLANES[packed.bits]
    walk = walk_of(packed.bits, packed.group)
    tile = fitting(tile, packed) if tile else best_tile(M, packed)
    span = packed.low.shape[1] * walk.block // S
    gelu = activation is not None and activation != "silu"
    tiles_m, tiles_n = triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns)
    operands = (
        packed.low, packed.low if packed.high is None else packed.high, packed.scales, 2.0**packed.power,
        x if bias is None else bias, y, x if rows is None else rows,
    )  # fmt: skip
    sizes = (
        M, N, K, span, y.stride(0), tile.rows, tile.columns, S, tile.inner // walk.block, low, high, packed.bits,
        packed.group, walk.groups, packed.kind,
    )  # fmt: skip
    options = (
        rows is not None, bias is not None, packed.gated, gelu, tile.stages, device.ASM, device.PDL,
    )  # fmt: skip
    if tile.few:
        _few[(tiles_n, tiles_m)](
            x, *operands, *sizes, S * span == K, *options, num_warps=tile.warps, **device.launch()
        )
    else:
        sums = y
        if packed.done is not None:
            if tiles_m * tiles_n > len(packed.done):
                raise ValueError(
                    f"tiles of {tile.rows} x {tile.columns} are too small for a weight in segments"
                )
            sums = torch.empty(
                tiles_m * tiles_n * tile.rows * tile.columns, dtype=torch.float32, device=y.device
            )
        x = TensorDescriptor(x, [M, K], [x.stride(0), 1], [tile.rows, walk.block])
        _many[(S * tiles_m * tiles_n,)](
            x, *operands, sums, y if packed.done is None else packed.done, *sizes, *options, num_warps=tile.warps,
            **device.launch(),
        )  # fmt: skip
    return y


def product_unpacked(
    x: torch.Tensor,
    w: torch.Tensor,
    packed: PackedQuant,
    bias: torch.Tensor | None,
    wide: bool,
    activation: str | None,
    rows: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    """`product` for very many rows: with `w`, which is `packed` unpacked."""
    if packed.segments == 1 and y.is_contiguous():
        return plain_product(x, Packed(w, packed.gated), bias, wide, activation, rows, y)
    M, K = x.shape
    N, S = len(w), packed.segments
    span = packed.low.shape[1] * walk_of(packed.bits, packed.group).block // S
    BM, BN = (128, 256) if S > 1 else (256, 128)
    _summed[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
        TensorDescriptor(x, [M, K], [x.stride(0), 1], [BM, 64]), TensorDescriptor(w, [N, K], [K, 1], [BN, 64]),
        x if bias is None else bias, y, x if rows is None else rows, M, N, K, span, y.stride(0), BM, BN, 64, S,
        rows is not None, bias is not None, 3, device.ASM, device.PDL, num_warps=8, **device.launch(),
    )  # fmt: skip
    return y


def quantized(
    x: torch.Tensor,
    parts: tuple[PackedQuant, ...],
    bias: torch.Tensor | None,
    activation: str | None = None,
    rows: torch.Tensor | None = None,
    wide: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] -> [M, sum of N] (in `out` if given), in float32 when `wide`; `activation` is of a gated pair."""
    if len(parts) == 1:
        return product(x, parts[0], bias, wide, activation, rows, out)
    if out is None:
        width = sum(part.rows for part in parts)
        out = torch.empty(len(x), width, dtype=torch.float32 if wide else x.dtype, device=x.device)
    at = 0
    for part in parts:
        end = at + part.rows
        product(x, part, bias[at:end] if bias is not None else None, wide, None, rows, out[:, at:end])
        at = end
    return out
