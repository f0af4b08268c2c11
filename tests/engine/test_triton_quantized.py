"""The quantized linear kernel: what is packed is what was given; through the interpreter every kind is multiplied."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from itertools import product as product_of

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import KINDS, Kind, random_weight

from bench.random_model import TINY

pytest.importorskip("triton")
from ragate_engine.kernels import triton as ops
from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton.quantized import (
    CONSTANT,
    OFFSET,
    PLANES,
    UNPACK_ROWS,
    ZERO,
    PackedQuant,
    Tile,
    _instructions,
    best_tile,
    dequantize,
    fitting,
    pack_quantized,
    packable,
    product,
    quantized,
    run_of,
    segments_of,
    unpack_quantized,
    unpacked,
    walk_of,
)
from ragate_engine.layers import Gated, Keep, Linear
from ragate_engine.quant.tensor import Form, QuantTensor
from ragate_engine.weights import names

kernels = importlib.import_module("ragate_engine.kernels.triton.quantized")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu checks the compiled kernels")
TILES = [Tile(16, 32, 128, 2, 2, few=True), Tile(16, 64, 64, 4, 2), Tile(32, 128, 128, 4, 2)]
BESIDE = {"nothing": CONSTANT, "zero": ZERO, "offset": OFFSET}


def packed_of(weights: list[QuantTensor], gated: bool = False) -> PackedQuant:
    """The one part of weights that are alike."""
    parts = pack_quantized(weights, gated)
    assert parts is not None and len(parts) == 1
    return parts[0]


def half_scales(weight: QuantTensor) -> torch.Tensor:
    """The weights [out, in], in the order of inputs, with scale and offset rounded to bfloat16 and nothing else."""
    codes = weight.codes.double()

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().double().repeat_interleave(weight.group, dim=1)

    scales = spread(weight.scales)
    if weight.offsets is None:
        values = codes * scales
    else:
        zeros = (-weight.offsets / weight.scales).round()
        if torch.equal(-zeros * weight.scales, weight.offsets):
            values = (codes - zeros.double().repeat_interleave(weight.group, dim=1)) * scales
        else:
            values = codes * scales + spread(weight.offsets)
    if weight.order is None:
        return values
    return torch.zeros_like(values).index_copy_(1, weight.order, values)


@pytest.mark.parametrize("width", [256, 160, 96 + 16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_packed_is_the_weight_rounded_once(kind: Kind, width: int) -> None:
    if kind.group and width % kind.group:
        width = 3 * kind.group
    weight = random_weight(kind, 48, width)
    packed = packed_of([weight])
    assert packed.kind == BESIDE[kind.beside]
    expected = half_scales(weight)
    if weight.order is not None:
        expected = expected[:, weight.order]
    assert torch.equal(dequantize(packed), expected.bfloat16())


@pytest.mark.parametrize("bits", PLANES)
def test_words_hold_the_codes_and_little_else(bits: int) -> None:
    packed = packed_of([random_weight(Kind(bits, 128, "zero"), 32, 1024)])
    held = packed.low.nbytes + (packed.high.nbytes if packed.high is not None else 0)
    assert held == 32 * 1024 * bits // 8


@interpreted
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_gives_the_product(kind: Kind) -> None:
    width = 160 if kind.group in (0, 16, 32) else 3 * kind.group
    weight = random_weight(kind, 80, width)
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(80).bfloat16()
    expected = x.double() @ half_scales(weight).T + bias.double()
    for tile in TILES:
        found = product(x, packed_of([weight]), bias, True, None, None, tile=tile)
        assert torch.allclose(found.double(), expected, atol=1e-4), tile


@interpreted
@pytest.mark.parametrize("kind", [Kind(4, 128, "zero"), Kind(5, 32), Kind(6, 16), Kind(8, 0)], ids=str)
def test_segments_are_added(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "segments_of", lambda out, width: 4)
    weight = random_weight(kind, 80, 1280)
    packed = packed_of([weight])
    assert packed.segments == 4 and torch.equal(dequantize(packed), half_scales(weight).bfloat16())
    x = torch.randn(40, 1280, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.double() @ half_scales(weight).T
    for tile in (Tile(16, 32, 128, 4, 2, few=True), Tile(32, 64, 64, 4, 2)):
        for _ in range(2):  # whose turn it is must be forgotten when all have had theirs
            found = product(x, packed, None, True, None, None, tile=tile)
            assert torch.allclose(found.double(), expected, atol=1e-3), tile
    assert packed.done is not None and not packed.done.any()
    with pytest.raises(ValueError, match="too small"):
        product(
            torch.zeros(2000, 1280).bfloat16(), packed, None, True, None, None, tile=Tile(16, 64, 64, 4, 2)
        )


@interpreted
@pytest.mark.parametrize("segments", [1, 4])
def test_very_many_rows_are_multiplied_with_unpacked_weights(
    segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "segments_of", lambda out, width: segments)
    monkeypatch.setattr(kernels, "UNPACK_ROWS", 40)
    weight = random_weight(Kind(4, 32, "offset"), 48, 544)
    packed = packed_of([weight])
    x, bias = torch.randn(40, 544).bfloat16(), torch.randn(48).bfloat16()
    expected = x.double() @ half_scales(weight).T + bias.double()
    y = torch.full((40, 64), 7.0)
    product(x, packed, bias, True, None, torch.tensor([33], dtype=torch.int32), y[:, 8:56])
    error = (y[:33, 8:56].double() - expected[:33]).norm() / expected[:33].norm()
    assert error < 5e-3  # weights rounded to bfloat16
    y[:33, 8:56] = 7.0
    assert torch.equal(y, torch.full((40, 64), 7.0))


@interpreted
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_unpacked_weights_are_what_the_reference_says(kind: Kind) -> None:
    width = 160 if kind.group in (0, 16, 32) else 3 * kind.group
    pair = [random_weight(kind, 48, width, seed) for seed in (1, 2)]
    pair[1] = replace(pair[1], order=pair[0].order)
    single, gated = packed_of(pair[:1]), packed_of(pair, gated=True)
    # interpreted weights are rounded twice: to float32, then by cutting off
    assert torch.allclose(unpacked(single).double(), dequantize(single).double(), rtol=2**-7, atol=1e-6)
    turns = torch.stack([dequantize(packed_of([weight])) for weight in pair], dim=1).flatten(0, 1)
    assert torch.allclose(unpacked(gated).double(), turns.double(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 576), (64, 4128)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.ordered], ids=str)
def test_what_is_compiled_ahead_is_what_is_packed(kind: Kind, shape: tuple[int, int]) -> None:
    from ragate_engine.kernels.triton.ahead import _stand_in

    out, width = shape
    if kind.group and width % kind.group:
        width = width // 128 * 128
    weights = [random_weight(kind, out, width, seed) for seed in (1, 2)]
    form = Form(1, kind.bits, kind.group or width, kind.beside != "nothing")

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    for gated in (False, True):
        real = packed_of(weights, gated)
        packed = _stand_in(empty, form, 2 * out, width, gated)
        assert (packed.low.shape, packed.low.dtype) == (real.low.shape, real.low.dtype)
        assert (packed.high is None) == (real.high is None)
        if packed.high is not None and real.high is not None:
            assert packed.high.shape == real.high.shape
        assert (packed.scales.shape, packed.scales.dtype) == (real.scales.shape, real.scales.dtype)
        assert (packed.bits, packed.group, packed.columns) == (real.bits, real.group, real.columns)
        assert (packed.segments, packed.gated, packed.done is None) == (
            real.segments,
            gated,
            real.done is None,
        )
        # 2 to 8 bits in large groups come with zeros, small ones with offsets: GGUF has them
        assert packed.kind == real.kind or kind.group < 64


@interpreted
def test_unpacking_is_compiled_ahead_on_weights_that_are_there() -> None:
    from ragate_engine.kernels.triton.ahead import _quantized_jobs

    config = replace(TINY, hidden_size=128, intermediate_size=256)
    forms = {name: Form(1, 4, 64, True) for name in names.expected(config)}

    def fake(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(1, dtype=dtype).expand(shape)

    jobs = _quantized_jobs(fake, torch.zeros(1, dtype=torch.int32), config, (16, 4096), forms, False)
    made = [job for _, _, job in jobs if isinstance(job, partial) and job.func is unpacked]
    assert len(made) == 2  # of a gated pair and of the others: other code
    for job in made:
        weights = job()
        assert weights.shape[0] == 16 and not weights.any()
    assert all(bucket == 16 for _, bucket, job in jobs if isinstance(job, partial) and job.func is quantized)


def test_narrow_and_long_weights_are_cut_and_no_others() -> None:
    assert segments_of(4096, 14336) == segments_of(1536, 8960) == segments_of(6144, 4096) == 4
    assert segments_of(1536, 1536) == segments_of(28672, 4096) == segments_of(576, 1536) == 1


@interpreted
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("kind", [Kind(4, 128, "zero"), Kind(6, 16)], ids=str)
def test_gate_and_up_meet(kind: Kind, activation: str) -> None:
    gate, up = (random_weight(kind, 48, 256, seed) for seed in (1, 2))
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    g, u = (x.double() @ half_scales(w).T for w in (gate, up))
    expected = (F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")) * u
    for tile in TILES:
        found = product(x, packed_of([gate, up], gated=True), None, False, activation, None, tile=tile)
        assert torch.allclose(found.double(), expected, atol=1e-2, rtol=1e-2), tile


@interpreted
def test_rows_past_the_count_and_columns_of_others_stay_as_they_are() -> None:
    weights = [random_weight(Kind(4, 32, "offset"), out, 64, seed) for seed, out in enumerate((32, 16))]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[25:] = float("nan")
    y = torch.full((40, 64), 7.0)
    count = torch.tensor([25], dtype=torch.int32)
    product(x, packed_of(weights), None, True, None, count, y[:, 8:56], TILES[0])
    expected = x[:25].double() @ torch.cat([half_scales(w) for w in weights]).T
    assert torch.allclose(y[:25, 8:56].double(), expected, atol=1e-4)
    y[:25, 8:56] = 7.0
    assert torch.equal(y, torch.full((40, 64), 7.0))


def test_weights_of_several_kinds_are_parts_of_one_product() -> None:
    kinds = [Kind(4, 32, "offset"), Kind(4, 32, "offset"), Kind(6, 16), Kind(4, 64, "zero", ordered=True)]
    weights = [random_weight(kind, 16 * (i + 1), 128, i) for i, kind in enumerate(kinds)]
    parts = pack_quantized(weights)
    assert parts is not None
    assert [part.rows for part in parts] == [48, 48, 64]
    exact = torch.cat([half_scales(weight) for weight in weights])
    assert torch.equal(unpack_quantized(parts), exact.bfloat16())
    x, bias = torch.randn(5, 128).bfloat16(), torch.randn(160).bfloat16()
    if not torch.cuda.is_available():
        found = quantized(x, parts, bias, wide=True)
        assert torch.allclose(found.double(), x.double() @ exact.T + bias.double(), atol=1e-4)


def test_a_gated_pair_of_two_kinds_and_what_the_kernel_does_not_take_stay_unpacked() -> None:
    assert (
        pack_quantized([random_weight(Kind(4, 32), 16, 64), random_weight(Kind(8, 32), 16, 64)], gated=True)
        is None
    )
    assert pack_quantized([random_weight(Kind(4, 32), 16, 64), random_weight(Kind(4, 8), 16, 64)]) is None


@pytest.mark.parametrize(
    ("kind", "out", "width", "expected"),
    [
        (Kind(4, 128), 16, 256, True),
        (Kind(4, 8), 16, 256, False),
        (Kind(4, 48), 16, 96, False),
        (Kind(8, 0), 16, 48, True),
        (Kind(4, 128), 24, 128, False),
    ],
)
def test_what_the_kernel_does_not_take_is_named(kind: Kind, out: int, width: int, expected: bool) -> None:
    assert packable(random_weight(kind, out, width)) is expected


def run_ptx(
    text: str, low: int, right: int, high: int, turn: int, scale: float, beside: float, place: int
) -> list[float]:
    """What the instructions make of one pair of words, worked out without a card: the lower half first."""

    def pair(value: float) -> int:
        half = int(torch.tensor(value).bfloat16().view(torch.int16)) & 0xFFFF
        return half << 16 | half

    def halves(word: int) -> torch.Tensor:
        both = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
        return both.view(torch.bfloat16).double()

    registers = {"$1": low, "$2": right << 16 | right, "$3": high, "$4": turn << 16 | turn}
    registers |= {"$5": pair(scale), "$6": pair(beside), "$7": place << 16 | place}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in text.splitlines():
        if line.startswith(("{", "}", ".reg")):
            continue
        operation, rest = line.rstrip(";").split(" ", 1)
        target, *sources = [part.strip() for part in rest.split(",")]
        a, *others = (value(source) for source in sources)
        if operation == "shr.b32":
            found = a >> others[0]
        elif operation == "shl.b32":
            found = a << others[0] & 0xFFFFFFFF
        elif operation == "shf.l.wrap.b32":
            assert a == others[0] and others[1] < 32
            found = (a << others[1] | a >> 32 - others[1]) & 0xFFFFFFFF
        elif operation == "xor.b32":
            found = a ^ others[0]
        elif operation == "and.b32":
            found = a & others[0]
        elif operation == "lop3.b32":
            assert others[2] == 0xEA  # (a & b) | c, from the table 0xf0, 0xcc, 0xaa
            found = a & others[0] | others[1]
        elif operation == "mov.b32":
            found = a
        else:
            x, y = halves(a), halves(others[0])
            results = {
                "sub.rn.bf16x2": lambda x=x, y=y: x - y,
                "mul.rn.bf16x2": lambda x=x, y=y: x * y,
                "fma.rn.bf16x2": lambda x=x, y=y, z=others[-1]: x * y + halves(z),
            }[operation]()
            bits = results.bfloat16().view(torch.int16).to(torch.int32) & 0xFFFF
            found = int(bits[1]) << 16 | int(bits[0])
        registers[target] = found
    return halves(registers["$0"]).tolist()


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("kind", [CONSTANT, ZERO, OFFSET])
@pytest.mark.parametrize("bits", PLANES)
def test_the_instructions_unpack_every_code_in_every_place(bits: int, kind: int, hopper: bool) -> None:
    low, high = PLANES[bits]
    text = _instructions(low, high, kind, hopper)
    scale, zero, offset = 0.0123, (1 << bits) - 2, -0.456
    rounded = torch.tensor(scale).bfloat16().double().item()
    codes = range(1 << bits)
    for plane, share, run in product_of(
        range(16 // low), range(low // high if high else 1), {1, run_of(bits, 16 // low)}
    ):
        place = plane % run * low
        right = plane * low - place
        turn = (low - share * high - right) % 32
        stored = rounded * 2.0 ** (133 - place) / 4
        beside = {
            CONSTANT: -(1 << bits - 1) * rounded / 4,
            ZERO: zero * 2.0 ** (place - 133),
            OFFSET: offset / 4,
        }[kind]
        for first, second in zip(codes, reversed(codes), strict=True):
            words = [0xFFFFFFFF, 0xFFFFFFFF]  # neighbours' bits must not matter
            for half, code in ((0, first), (16, second)):
                fields = ((0, plane * low, low, code), (1, plane * low + share * high, high, code >> low))
                for word, at, width, part in fields:
                    mask = (1 << width) - 1
                    words[word] &= ~(mask << half + at)
                    words[word] |= (part & mask) << half + at
            found = run_ptx(text, words[0], right, words[1], turn, stored, beside, place)
            for code, weight in zip((first, second), found, strict=True):
                if kind == CONSTANT:
                    exact = (code - (1 << bits - 1)) * rounded
                elif kind == ZERO:
                    exact = (code - zero) * rounded
                else:
                    exact = code * rounded + torch.tensor(offset).bfloat16().double().item()
                assert weight * 4 == torch.tensor(exact).bfloat16().item(), (plane, share, run, code)


@pytest.mark.parametrize(
    "kind", [Kind(2, 16, "offset"), Kind(3, 16), Kind(4, 128, "zero"), Kind(8, 32)], ids=str
)
def test_scales_of_any_size_are_stored(kind: Kind) -> None:
    for size in (1.0, 2.0**-30, 2.0**20):
        weight = random_weight(kind, 32, 256)
        offsets = None if weight.offsets is None else weight.offsets * size
        weight = replace(weight, scales=weight.scales * size, offsets=offsets)
        packed = packed_of([weight])
        assert (packed.power > 0) is (size > 1)
        assert torch.equal(dequantize(packed), half_scales(weight).bfloat16())
        if not torch.cuda.is_available():
            x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
            found = product(x, packed, None, True, None, None, tile=TILES[0]).double()
            assert torch.allclose(found, x.double() @ half_scales(weight).T, rtol=1e-3, atol=1e-4 * size)


@interpreted
@pytest.mark.parametrize(
    ("keep", "operation", "tolerance"), [("packed", "quantized", 0.01), ("int8", "int8", 0.03)]
)
def test_a_layers_products_are_those_of_its_weights_however_they_are_kept(
    keep: Keep, operation: str, tolerance: float
) -> None:
    kinds = [Kind(4, 32, "offset"), Kind(4, 32, "offset"), Kind(6, 16)]
    weights = [
        random_weight(kind, out, 64, i) for i, (kind, out) in enumerate(zip(kinds, (48, 16, 16), strict=True))
    ]
    biases = [torch.randn(len(weight.codes)) for weight in weights]
    x = torch.randn(5, 64).bfloat16()
    cpu = torch.device("cpu")
    qkv = Linear(list(weights), biases, ops, torch.bfloat16, cpu, keep)
    assert qkv.kept is not None and qkv.kept.operation == operation
    exact = torch.cat([weight.dequantize() for weight in weights]).double()
    expected = x.double() @ exact.T + torch.cat(biases).bfloat16().double()
    assert (qkv(x, None).double() - expected).norm() < tolerance * expected.norm()
    assert (qkv.weight().double() - exact).norm() < tolerance * exact.norm()
    gated = Gated(weights[0], weights[0], "silu", ops, torch.bfloat16, cpu, keep)
    assert gated.kept is not None and gated.kept.activation == "silu"
    y = x.double() @ weights[0].dequantize().double().T
    expected = F.silu(y) * y
    assert (gated(x, None).double() - expected).norm() < 2 * tolerance * expected.norm()
    mixed = Linear([weights[0], weights[0].dequantize()], [], ops, torch.bfloat16, cpu, keep)
    assert (mixed.kept is None) is (keep == "packed")  # a plain weight is one that only int8 takes


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_tile_is_made_to_fit_the_card(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = walk_of(kind.bits, kind.group or 1536)
    for segments in (1, 4):
        monkeypatch.setattr(kernels, "segments_of", lambda out, width, segments=segments: segments)
        packed = packed_of([random_weight(kind, 64, 1536)])
        monkeypatch.setattr(device, "shared_memory", lambda: 232_448)
        for rows in (1, 10, 40, 300, UNPACK_ROWS - 1):
            tile = best_tile(rows, packed)
            assert tile.stages >= 2
            assert (
                tile.inner % (walk.block * walk.share) == 0
            )  # high bits come with all the words that share them
            assert packed.low.shape[1] * walk.block // segments % tile.inner == 0
            held = 2 * tile.stages * tile.rows * tile.inner * (segments if tile.few else 1)
            assert held < 232_448
        monkeypatch.setattr(device, "shared_memory", lambda: 50_000)
        small = fitting(tile, packed)
        assert small.stages < tile.stages or small.rows < tile.rows
