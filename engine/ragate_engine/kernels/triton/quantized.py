"""y = x W^T for a quantized W, whose codes become bfloat16 in the registers that feed the tensor cores.

Shapes: x [M, K], W [N, K], y [M, N]. Moves at least the codes, N K bits / 8 bytes; does 2 M N K operations.
Plan: the product is computed transposed, W x^T, since the left operand of a warp group's product may come from
registers. Codes lie in 16-bit words so that two neighbouring ones are unpacked at once: shift, mask, and an exponent
laid over them (0x4300 | q is 128 + q in bfloat16), then (q - zero) * scale or q * scale + offset, rounded once. A row's
bits are those of the plain product with these bfloat16 weights: one chain of 16-wide products along K, for every tile
and row count.

Words: of LOW = 4 or 2 bits of each code, P = 16 / LOW codes a word: bits i LOW of word (c, j) are the low bits of
column P W c + W i + j, where W columns side by side share a group. What is above the low bits (HIGH = 0, 1, 2 or 4
bits) lies in words of its own, of Q = LOW / HIGH chunks each, a chunk being P W columns. Where a chunk has several
groups, the scales of a block of chunks come in one tile and are told apart in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton.linear import _act_mul
from ragate_engine.quant.tensor import QuantTensor

PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
"""LOW and HIGH of codes by their bits."""
WIDEST = 32
"""W at most."""
CONSTANT, ZERO, OFFSET = 0, 1, 2
"""What stands beside a scale: nothing (zero is half the range), the zero, the offset."""


@dataclass(frozen=True)
class PackedQuant:
    """A quantized weight [N, K] as the kernel reads it."""

    low: torch.Tensor
    """int16 [N, K' LOW / 16]; K' is K rounded up to whole words."""
    high: torch.Tensor | None
    """int16 [N, K' HIGH / 16]."""
    scales: torch.Tensor
    """bfloat16 [groups, N], or [N, groups] where a chunk has several; with a zero or offset int32, the scale's bits in
    the lower half."""
    bits: int
    group: int
    kind: int
    columns: int
    """K."""
    order: torch.Tensor | None = None
    """int64 [K]: column j meets input order[j]."""
    gated: bool = False
    """Rows are 8 of gate, 8 of up, and so on."""


def packable(weight: QuantTensor) -> bool:
    """Whether the kernel takes `weight`; what it does not take is served dense."""
    out, width = weight.shape
    power_of_two = weight.group & (weight.group - 1) == 0
    cut = weight.group >= 16 and (power_of_two or weight.group == width)
    return weight.bits in PLANES and out % 16 == 0 and width % 16 == 0 and cut


class Blocks(NamedTuple):
    """How K is walked."""

    width: int
    """W, columns of a plane."""
    planes: int
    """P, planes of a chunk."""
    share: int
    """Q, chunks that share words of high bits."""
    groups: int
    """Groups of a chunk."""
    chunks: int
    """Chunks of a block, whose scales come together where they have several groups."""


def blocks_of(bits: int, group: int, kind: int) -> Blocks:
    """The walk for codes of one kind."""
    low, high = PLANES[bits]
    width, planes, share = min(WIDEST, group & -group), 16 // low, low // high if high else 1
    groups = max(1, planes * width // group)
    # the memory accelerator moves no less than 16 bytes
    together = 16 // (groups * (2 if kind == CONSTANT else 4)) if groups > 2 else 1
    return Blocks(width, planes, share, groups, max(share, together))


def pack_quantized(weights: list[QuantTensor], gated: bool = False) -> tuple[PackedQuant, ...] | None:
    """Prepare weights [out_i, in] for one product, or a gate and an up; `None` where the kernel does not take them.

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
            kind, beside = ZERO, zeros + (128 if bits < 8 else 0)
    walk = blocks_of(bits, group, kind)
    codes = stacked([w.codes for w in weights]).to(torch.int16) + signed
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (walk.planes * walk.width * walk.chunks)))
    words = codes.unflatten(1, (-1, walk.planes, walk.width))
    mask = (1 << low) - 1
    lows = _word([(words[:, :, i] & mask) << i * low for i in range(walk.planes)])
    highs = None
    if high:
        above = (words >> low).unflatten(1, (-1, walk.share)).flatten(2, 3)
        highs = _word([above[:, :, i] << i * high for i in range(walk.share * walk.planes)])
    groups = -(-codes.shape[1] // group)
    packed = _halves_of(scales, groups)
    if beside is not None:
        packed = packed.to(torch.int32) & 0xFFFF | _halves_of(beside, groups).to(torch.int32) << 16
    if walk.groups <= 2:
        packed = packed.T
    packed = packed.contiguous()
    if kind == CONSTANT:
        packed = packed.view(torch.bfloat16)
    return PackedQuant(lows, highs, packed, bits, group, kind, first.shape[1], first.order, gated)


def _word(fields: list[torch.Tensor]) -> torch.Tensor:
    """Fields of a word each in its place, int16 [N, words, W] -> [N, words W]."""
    word = fields[0]
    for field in fields[1:]:
        word = word | field
    return word.flatten(1).contiguous()


def _halves_of(values: torch.Tensor, groups: int) -> torch.Tensor:
    """float32 [N, groups of K] -> the bits of bfloat16 as int16 [N, groups], zeros behind."""
    return torch.nn.functional.pad(values, (0, groups - values.shape[1])).bfloat16().view(torch.int16)


def dequantize(packed: PackedQuant) -> torch.Tensor:
    """The reference: the bfloat16 weights [N, K] that the kernel multiplies with, in the packed order of rows."""
    low, high = PLANES[packed.bits]
    walk = blocks_of(packed.bits, packed.group, packed.kind)
    words = packed.low.to(torch.int32).unflatten(1, (-1, walk.width))
    codes = torch.stack([words >> i * low & (1 << low) - 1 for i in range(walk.planes)], dim=2).flatten(1)
    if packed.high is not None:
        words = packed.high.to(torch.int32).unflatten(1, (-1, walk.width))
        fields = [words >> i * high & (1 << high) - 1 for i in range(walk.share * walk.planes)]
        codes += torch.stack(fields, dim=2).flatten(1) << low
    codes = codes[:, : packed.columns]

    def spread(halves: torch.Tensor) -> torch.Tensor:
        values = halves.to(torch.int16).view(torch.bfloat16)
        if walk.groups <= 2:
            values = values.T
        return values.repeat_interleave(packed.group, dim=1)[:, : packed.columns].double()

    if packed.kind == CONSTANT:
        values = (codes - (1 << packed.bits - 1)) * spread(packed.scales.view(torch.int16))
    else:
        scales, beside = spread(packed.scales), spread(packed.scales >> 16)
        if packed.kind == ZERO:
            values = (codes - (beside - (128 if packed.bits < 8 else 0))) * scales
        else:
            values = codes * scales + beside
    return values.bfloat16()


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
    """Rows and columns of a tile, warps, pipeline stages, programs of a multiprocessor."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1


@triton.constexpr_function
def _instructions(LOW, HIGH, SHIFT, FIELD, KIND, CONST):
    """PTX of two neighbouring weights: $0 from words $1 and $2, scales $3 and what is beside them $4, all in pairs."""
    mask = (1 << LOW) - 1
    code = [f"shr.b32 t, $1, {SHIFT};"]
    exponent = 0x4300
    if HIGH in (1, 2):
        above = ((1 << HIGH) - 1) << LOW
        move = f"shr.b32 u, $2, {FIELD - LOW};" if FIELD >= LOW else f"shl.b32 u, $2, {LOW - FIELD};"
        code += [
            move,
            f"and.b32 u, u, {above << 16 | above:#x};",
            f"lop3.b32 t, t, {mask << 16 | mask:#x}, u, 0xea;",
            f"or.b32 t, t, {exponent << 16 | exponent:#x};",
        ]
    else:
        code += [f"lop3.b32 t, t, {mask << 16 | mask:#x}, {exponent << 16 | exponent:#x}, 0xea;"]
    if HIGH == 4:
        # 0x4500 | h is 2048 + 16 h; the sum of both halves is exact below 256
        code += [
            f"shr.b32 u, $2, {FIELD};",
            "lop3.b32 u, u, 0x000f000f, 0x45004500, 0xea;",
            f"mov.b32 c, {_pair(2048 + CONST)};",
            "sub.rn.bf16x2 u, u, c;",
            "add.rn.bf16x2 t, t, u;",
        ]
        code += ["sub.rn.bf16x2 t, t, $4;"] if KIND == 1 else []
    elif KIND == 1:
        code += ["sub.rn.bf16x2 t, t, $4;"]
    else:
        code += [f"mov.b32 c, {_pair(CONST)};", "sub.rn.bf16x2 t, t, c;"]
    code += ["fma.rn.bf16x2 $0, t, $3, $4;" if KIND == 2 else "mul.rn.bf16x2 $0, t, $3;"]
    return "{\n.reg .b32 t, u, c;\n" + "\n".join(code) + "\n}"


@triton.constexpr_function
def _pair(value):
    """A small whole number as two equal bfloat16, in hexadecimal."""
    mantissa, exponent = value, 127 + 7
    while mantissa >= 256:
        mantissa, exponent = mantissa // 2, exponent + 1
    while mantissa < 128:
        mantissa, exponent = mantissa * 2, exponent - 1
    bits = exponent << 7 | mantissa - 128
    return f"{bits << 16 | bits:#x}"


@triton.jit
def _weights(
    low, high, scale, beside, PLANE: tl.constexpr, FIELD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The weights of one plane: words [BN, W], scales and what stands beside them [BN] -> bfloat16 [BN, W].

    Interpreted they stay float32: the interpreter neither rounds to bfloat16 nor multiplies it."""
    scale = tl.broadcast_to(scale[:, None], low.shape)
    beside = tl.broadcast_to(beside[:, None], low.shape)
    if ASM:
        CONST: tl.constexpr = 128 + (2 ** (BITS - 1) if KIND == 0 else 0)
        words: tl.constexpr = _instructions(LOW, HIGH, PLANE * LOW, FIELD, KIND, CONST)
        operands = [low, high, scale, beside]
        value = tl.inline_asm_elementwise(
            words, "=r,r,r,r,r", operands, dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        code = (low.to(tl.int32) >> (PLANE * LOW)) & ((1 << LOW) - 1)
        if HIGH > 0:
            code += ((high.to(tl.int32) >> FIELD) & ((1 << HIGH) - 1)) << LOW
        value = code.to(tl.float32)
        if KIND == 0:
            value = (value - 2 ** (BITS - 1)) * scale.to(tl.float32)
        elif KIND == 1:
            value = (value + (128 if BITS < 8 else 0) - beside.to(tl.float32)) * scale.to(tl.float32)
        else:
            value = value * scale.to(tl.float32) + beside.to(tl.float32)
    return value


@triton.jit
def _halves(pair):
    """The two bfloat16 of an int32."""
    lower = (pair & 0xFFFF).to(tl.int16, bitcast=False).to(tl.bfloat16, bitcast=True)
    upper = (pair >> 16).to(tl.int16, bitcast=False).to(tl.bfloat16, bitcast=True)
    return lower, upper


@triton.jit
def _column(tile, INDEX: tl.constexpr, DIGITS: tl.constexpr):
    """Column INDEX of [BN, 2 ** DIGITS], found digit by digit without leaving the registers."""
    for digit in tl.static_range(DIGITS):
        even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 2, 2))
        tile = odd if (INDEX >> digit) & 1 else even
    return tile.reshape(tile.shape[0])


@triton.jit(do_not_specialize=["M"])
def _quantized(
    x, low, high, scales, bias, y, count, M, N, K, stride, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNTED: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 16 // LOW
    Q: tl.constexpr = LOW // HIGH if HIGH > 0 else 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if COUNTED:
        M = tl.load(count)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # tiles of rows side by side share a tile of weights in the L2 cache
        m = (tile % tiles_m) * BM
        n = (tile // tiles_m) * BN
        acc = tl.zeros((BN, BM), tl.float32)
        for b in tl.range(0, tl.cdiv(K, P * W * CHUNKS), num_stages=STAGES):
            if COLUMNS > 0:
                pairs = scales.load([n, b * (1 << COLUMNS)])
            for q in tl.static_range(CHUNKS):
                c = b * CHUNKS + q
                words = low.load([n, c * W])
                if HIGH == 0:
                    above = words
                elif q % Q == 0:
                    above = high.load([n, c // Q * W])
                for i in tl.static_range(P):
                    if i * W % GROUP == 0:
                        if COLUMNS > 0:
                            pair = _column(pairs, (q * P + i) * W // GROUP, COLUMNS)
                        else:
                            pair = scales.load([(c * P + i) * W // GROUP, n]).reshape(BN)
                        if KIND == 0:
                            scale, beside = pair, pair
                        else:
                            scale, beside = _halves(pair)
                    part = _weights(
                        words, above, scale, beside, i, (q % Q * P + i) * HIGH, LOW, HIGH, KIND, BITS, ASM
                    )
                    # planes side by side: joined in pairs, the last pair first
                    if i == 0:
                        p0 = part
                    elif i == 1:
                        p1 = part
                    elif i == 2:
                        p2 = part
                    elif i == 3:
                        p3 = part
                    elif i == 4:
                        p4 = part
                    elif i == 5:
                        p5 = part
                    elif i == 6:
                        p6 = part
                    else:
                        p7 = part
                planes = tl.join(tl.join(p0, p2), tl.join(p1, p3))
                if P == 8:
                    planes = tl.join(planes, tl.join(tl.join(p4, p6), tl.join(p5, p7)))
                    weights = planes.permute(0, 4, 2, 3, 1).reshape(BN, P * W)
                else:
                    weights = planes.permute(0, 2, 3, 1).reshape(BN, P * W)
                inputs = x.load([m, c * P * W])
                if not ASM:  # the interpreter multiplies no bfloat16
                    weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
                acc = tl.dot(weights, inputs.T, acc, input_precision="ieee")
        columns = n + tl.arange(0, BN)
        if HAS_BIAS:
            acc += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1))
            y.store([m, n // 2], _act_mul(gate, up, GELU).reshape(BN // 2, BM).T.to(y.dtype))
        elif WIDE:
            rows = m + tl.arange(0, BM)
            at = y + rows[:, None].to(tl.int64) * stride + columns[None, :]
            tl.store(at, acc.T, (rows[:, None] < M) & (columns < N)[None, :])
        else:
            y.store([m, n], acc.T.to(y.dtype))


def best_tile(M: int, N: int, gated: bool) -> Tile:
    """The tile for x [M, K] and W [N, K]: it never changes a bit. Not yet tuned on a card."""
    if M <= 16:  # unpacking takes the time: single warps spend least on anything else
        narrow = 64 * device.programs() >= N
        return Tile(16, 16 if narrow else 32, 1, 6, 6)
    if M <= 64:
        return Tile(64, 64, 4, 4, 2)
    return Tile(128, 128, 8, 3)


def fitting(tile: Tile, walk: Blocks, kind: int, gated: bool, wide: bool) -> Tile:
    """`tile` made to suit how K is walked: none of it changes a bit.

    A row of scales is moved to a place of its own, which must begin at a multiple of 128 bytes; and all that is on its
    way must fit the card's shared memory.
    """
    size = 2 if kind == CONSTANT else 4
    if walk.groups <= 2 and tile.columns * size < 128:
        tile = tile._replace(columns=128 // size, warps=max(tile.warps, 128 // size // 16))
    words = walk.chunks + (walk.chunks // walk.share if walk.share > 1 else walk.chunks)
    while True:
        rows = 2 * tile.rows * walk.planes * walk.width * walk.chunks
        others = tile.columns * (2 * walk.width * words + size * walk.groups * walk.chunks)
        out = tile.rows * tile.columns * (4 if wide else 1 if gated else 2)
        if tile.stages * rows + (tile.stages - 1) * others + out + 1024 <= device.shared_memory():
            return tile
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.rows > 16:
            tile = tile._replace(rows=tile.rows // 2)
        else:
            return tile


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
    N = packed.low.shape[0]
    out = N // 2 if packed.gated else N
    if packed.order is not None:
        x = x[:, packed.order]
    if y is None:
        y = torch.empty(M, out, dtype=torch.float32 if wide else x.dtype, device=x.device)
    low, high = PLANES[packed.bits]
    walk = blocks_of(packed.bits, packed.group, packed.kind)
    tile = fitting(tile or best_tile(M, N, packed.gated), walk, packed.kind, packed.gated, wide)
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    words = [tile.columns, walk.width]
    together = walk.groups * walk.chunks if walk.groups > 2 else 0
    gelu = activation is not None and activation != "silu"
    _quantized[(min(device.programs() * tile.programs, tiles),)](
        TensorDescriptor(x, [M, K], [x.stride(0), 1], [tile.rows, walk.planes * walk.width]),
        TensorDescriptor(packed.low, list(packed.low.shape), [packed.low.shape[1], 1], words),
        x if packed.high is None
        else TensorDescriptor(packed.high, list(packed.high.shape), [packed.high.shape[1], 1], words),
        TensorDescriptor(packed.scales, list(packed.scales.shape), [packed.scales.shape[1], 1],
                         [tile.columns, together] if together else [1, tile.columns]),
        bias if bias is not None else x,
        y if wide
        else TensorDescriptor(y, [M, out], [y.stride(0), 1], [tile.rows, tile.columns // (2 if packed.gated else 1)]),
        rows if rows is not None else x, M, N, K, y.stride(0), tile.rows, tile.columns, walk.width, low, high,
        packed.bits, packed.group, packed.kind, walk.chunks, together.bit_length() - 1 if together else 0,
        rows is not None, bias is not None, packed.gated, gelu, wide, tile.stages,
        device.COMPILED, device.PDL, num_warps=tile.warps, **device.launch(),
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
        width = sum(part.low.shape[0] for part in parts)
        out = torch.empty(len(x), width, dtype=torch.float32 if wide else x.dtype, device=x.device)
    at = 0
    for part in parts:
        end = at + part.low.shape[0]
        product(x, part, bias[at:end] if bias is not None else None, wide, None, rows, out[:, at:end])
        at = end
    return out
