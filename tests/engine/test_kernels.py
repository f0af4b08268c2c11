"""Every kernel of every backend against plain float64 formulas, and the bits of a row against its company."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ragate_engine.kernels import HeadShape, StepInputs, cpu, reference


def interpreted_triton():
    """The Triton kernels through the interpreter, where triton is installed (tests/conftest.py asks for it)."""
    try:
        from ragate_engine.kernels import triton
    except ImportError:
        return []
    return [triton]


EXACT = [reference, *([cpu] if cpu.available() else [])]
BACKENDS = [*EXACT, *interpreted_triton()]
backends = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.NAME)
# the interpreter multiplies with numpy, whose order is not the card's: tests/gpu checks Triton's bits
exact_backends = pytest.mark.parametrize("ops", EXACT, ids=lambda ops: ops.NAME)


def test_this_machine_has_the_c_kernels() -> None:
    assert cpu.available(), "no C compiler: the rest of this file checks the reference kernels only"


@backends
@pytest.mark.parametrize(("inner", "outer"), [(576, 1536), (1536, 576), (64, 16), (40, 27), (16, 1)])
def test_linear_is_the_matrix_product_for_any_row_count(ops, inner: int, outer: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outer, inner), torch.randn(outer), torch.randn(130, inner)
    packed = ops.pack_linear(weight)
    full = ops.linear(x, packed, bias)
    expected = x.double() @ weight.double().T + bias
    assert (full - expected).norm() / expected.norm() < 1e-6
    for first, rows in (
        [] if ops not in EXACT else [(0, 1), (3, 1), (7, 2), (0, 12), (64, 13), (0, 97), (1, 129)]
    ):
        part = ops.linear(x[first : first + rows].contiguous(), packed, bias)
        assert torch.equal(part, full[first : first + rows])


@backends
@pytest.mark.parametrize("width", [576, 40, 7])
def test_rms_norm_adds_the_residual_and_normalizes(ops, width: int) -> None:
    torch.manual_seed(1)
    h, x, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width)
    summed = h + x
    y = ops.rms_norm(h, x, weight, 1e-5)
    assert torch.equal(h, summed)
    wide = summed.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(y.double(), expected, atol=1e-6)
    assert torch.equal(ops.rms_norm(summed[2:3].clone(), None, weight, 1e-5), y[2:3])


@backends
@pytest.mark.parametrize(("activation", "width"), [("silu", 64), ("gelu_tanh", 64), ("silu", 21)])
def test_gated_products_meet_in_the_activation(ops, activation: str, width: int) -> None:
    torch.manual_seed(2)
    x, gate, up = torch.randn(5, 48), torch.randn(width, 48), torch.randn(width, 48)
    x[3:] *= 200  # far into both tails of the activation
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    f = torch.nn.functional
    acted = f.silu(g) if activation == "silu" else f.gelu(g, approximate="tanh")
    found = ops.gated(x, ops.pack_gated(gate, up), activation)
    assert torch.allclose(found.double(), acted * u, rtol=2e-5, atol=1e-4)


@backends
@pytest.mark.parametrize(("activation", "width"), [("silu", 64), ("gelu_tanh", 1100), ("silu", 21)])
def test_an_activation_apart_from_its_product_is_the_same(ops, activation: str, width: int) -> None:
    torch.manual_seed(2)
    both = torch.randn(5, 2 * width) * torch.tensor([1, 1, 1, 50, 50])[:, None]
    g, u = both.double().chunk(2, dim=1)
    f = torch.nn.functional
    acted = f.silu(g) if activation == "silu" else f.gelu(g, approximate="tanh")
    found = ops.act_mul(both, activation, torch.float32)
    assert torch.allclose(found.double(), acted * u, rtol=2e-5, atol=1e-4)
    if ops is not cpu:  # which knows float32 alone
        count = torch.tensor([3], dtype=torch.int32)
        narrow = ops.act_mul(both, activation, torch.float16, count)
        assert torch.equal(narrow[:3], found[:3].half())


@backends
def test_a_token_that_is_still_being_sampled_comes_from_the_pool(ops) -> None:
    table = torch.randn(30, 40)
    empty = torch.empty(0, dtype=torch.int32)
    step = StepInputs(*[empty] * 4, work=None, wanted=empty, sampled=torch.tensor([4, 29], dtype=torch.int32))
    ids = torch.tensor([7, -2, 0, -1], dtype=torch.int32)
    assert torch.equal(ops.embed(ids, table, 0.5, step), table[[7, 29, 0, 4]] * 0.5)


@backends
def test_the_norm_of_wanted_rows_is_the_norm_of_those_rows(ops) -> None:
    h, x, weight = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    empty = torch.empty(0, dtype=torch.int32)
    step = StepInputs(*[empty] * 4, work=None, wanted=torch.tensor([4, 1]))
    found = ops.last_norm(h, x, weight, 1e-5, step)
    assert torch.equal(found, ops.rms_norm(h.clone(), x, weight, 1e-5)[[4, 1]])


class Sequences:
    """Random sequences with their KV in blocks scattered over a pool; `shared` leading blocks are common to all."""

    def __init__(
        self, ops, lengths: list[int], shape: HeadShape, shared: int = 0, junk: float = float("nan")
    ) -> None:
        torch.manual_seed(3)
        self.ops, self.shape, self.lengths = ops, shape, lengths
        counts = [-(-n // 16) for n in lengths]
        pool = torch.randperm(sum(counts) + 3).tolist()
        common = [pool.pop() for _ in range(shared)]
        self.tables = [common + [pool.pop() for _ in range(c - shared)] for c in counts]
        self.kv = ops.make_kv(
            sum(counts) + 3, shape.kv_heads, shape.head_dim, torch.float32, torch.device("cpu")
        )
        self.kv.k.fill_(junk)
        self.kv.v.fill_(junk)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        head = torch.randn(shared * 16, width)
        self.qkv = [torch.cat([head, torch.randn(n - shared * 16, width)]) for n in lengths]
        angles = torch.arange(max(lengths))[:, None] * (0.3 ** torch.arange(shape.rotary_dim // 2))
        self.cos, self.sin = angles.cos(), angles.sin()

    def step(self, rows: list[tuple[int, int, int]], groups: list[list[int]]) -> StepInputs:
        """Inputs for `rows` of (sequence, start, count)."""
        width = max(map(len, self.tables))
        tables = np.zeros((len(self.tables), width), np.int32)
        for i, table in enumerate(self.tables):
            tables[i, : len(table)] = table
        position = np.concatenate([np.arange(start, start + count) for _, start, count in rows])
        owner = np.concatenate([np.full(count, i) for i, _, count in rows])
        slots = tables[owner, position // 16] * 16 + position % 16
        tensors = [
            torch.from_numpy(np.ascontiguousarray(a, np.int32))
            for a in (position, slots, owner, tables, groups)
        ]
        return StepInputs(*tensors, wanted=torch.empty(0, dtype=torch.int32))

    def run(self, rows, groups, norms=(None, None), window=None, cap=None) -> torch.Tensor:
        step = self.step(rows, groups)
        qkv = torch.cat([self.qkv[i][start : start + count] for i, start, count in rows]).contiguous()
        self.ops.rope_write_kv(qkv, *norms, 1e-6, self.cos, self.sin, step, self.kv, self.shape)
        return self.ops.attention(qkv, self.kv, step, self.shape, 0.2, window, cap)

    def expected(self, i: int, norms=(None, None), window=None, cap=None) -> torch.Tensor:
        """Attention over the whole sequence i, by the book, in float64."""
        s, n = self.shape, self.lengths[i]
        heads = self.qkv[i].double().view(n, -1, s.head_dim)
        q, k, v = heads.split([s.heads, s.kv_heads, s.kv_heads], 1)

        def turn(x, norm):
            if norm is not None:
                x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
            a, b = x[..., : s.rotary_dim].chunk(2, -1)
            c, z = self.cos[:n, None].double(), self.sin[:n, None].double()
            return torch.cat([a * c - b * z, b * c + a * z, x[..., s.rotary_dim :]], -1)

        q, k = turn(q, norms[0]), turn(k, norms[1])
        k, v = (x.repeat_interleave(s.heads // s.kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.2
        if cap:
            scores = cap * torch.tanh(scores / cap)
        at = torch.arange(n)
        seen = at[None] <= at[:, None]
        if window:
            seen &= at[None] > at[:, None] - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def pieces(rows: list[tuple[int, int, int]]) -> list[list[int]]:
    """Groups of one piece of up to 16 positions each, nothing shared beyond the row's own sequence."""
    groups, at = [], 0
    for _, start, count in rows:
        first = start
        while first < start + count:
            n = min(start + count, (first // 16 + 1) * 16) - first
            groups.append([at, n, (first + 1) // 16])
            at, first = at + n, first + n
    return groups


SHAPES = [HeadShape(9, 3, 64, 64), HeadShape(4, 4, 16, 16), HeadShape(8, 1, 80, 40), HeadShape(14, 2, 64, 64)]


@exact_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (20, None), (37, 15.0)])
def test_attention_equals_the_textbook(ops, shape: HeadShape, window: int | None, cap: float | None) -> None:
    sequences = Sequences(ops, [1, 300, 33, 16], shape)  # single tokens come first, as the runner sorts
    rows = [(i, 0, n) for i, n in enumerate(sequences.lengths)]
    norms = (torch.rand(shape.head_dim) + 0.5, torch.rand(shape.head_dim) + 0.5)
    out = sequences.run(rows, pieces(rows), norms, window, cap)
    expected = torch.cat([sequences.expected(i, norms, window, cap) for i in range(4)])
    assert torch.allclose(out.double(), expected, atol=2e-5)


@exact_backends
def test_attention_bits_do_not_depend_on_chunks_or_on_who_shares_the_batch(ops) -> None:
    shape = HeadShape(9, 3, 64, 64)
    sequences = Sequences(ops, [300, 290], shape)
    whole = sequences.run([(0, 0, 300)], pieces([(0, 0, 300)]))
    chunked = []
    for start in range(0, 300, 37):
        rows = [(1, min(start, 289), 1), (0, start, min(37, 300 - start))]
        chunked.append(sequences.run(rows, pieces(rows))[1:])
    assert torch.equal(torch.cat(chunked), whole)
    one_by_one = [sequences.run([(0, i, 1)], pieces([(0, i, 1)])) for i in range(270, 300)]
    assert torch.equal(torch.cat(one_by_one), whole[270:])


@exact_backends
def test_reading_shared_blocks_once_changes_no_bit(ops) -> None:
    sequences = Sequences(ops, [200, 180, 165], HeadShape(9, 3, 64, 64), shared=9)
    rows = [(i, 0, n) for i, n in enumerate(sequences.lengths)]
    sequences.run(rows, pieces(rows))
    last = [(i, n - 1, 1) for i, n in enumerate(sequences.lengths)]
    apart = sequences.run(last, pieces(last))
    together = sequences.run(last, [[0, 3, 9]])
    assert torch.equal(apart, together)


@backends
def test_pick_takes_the_likeliest_allowed_token_and_the_lowest_of_equals(ops) -> None:
    logits = torch.randn(4, 100)
    logits[0, 70] = logits[0, 30] = 9.0
    logits[1, 99] = 50.0
    allowed = torch.ones(4, 128, dtype=torch.bool)
    allowed[1, 99] = False
    allowed[2, :] = False
    mask = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32).copy())
    ids, lse = ops.pick(logits, mask)
    assert ids[0] == 30
    assert ids[1] == int(logits[1, :99].argmax())
    assert ids[2] == -1
    assert torch.allclose(lse.double(), logits.double().logsumexp(-1), atol=1e-5)


@backends
def test_likeliest_lists_the_best_allowed_tokens_the_lowest_id_first_among_equals(ops) -> None:
    logits = torch.randn(3, 100)
    logits[0, [90, 20, 55, 77, 60]] = 7.0
    allowed = torch.ones(3, 128, dtype=torch.bool)
    allowed[1, 50:] = False
    allowed[2, :] = False
    allowed[2, [4, 8]] = True
    mask = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32).copy())
    ids, values = ops.likeliest(logits, mask, 4)
    assert ids[0].tolist() == [20, 55, 60, 77]
    assert ids[1].tolist() == logits[1, :50].argsort(descending=True)[:4].tolist()
    assert sorted(ids[2, :2].tolist()) == [4, 8] and ids[2, 2:].tolist() == [-1, -1]
    assert torch.equal(values[1], logits[1, ids[1].long()])


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
def test_the_kernel_threads_survive_growth_and_a_fork() -> None:
    """More threads while in use, then a fork: neither hangs, both give the same bits."""
    code = (
        "import os, torch; from ragate_engine.kernels import cpu\n"
        "x = torch.randn(64, 256); p = cpu.pack_linear(torch.randn(512, 256)); y = cpu.linear(x, p, None)\n"
        "for n in (2, 3, 4, 2):\n"
        "    cpu.set_threads(n)\n"
        "    assert all(torch.equal(cpu.linear(x, p, None), y) for _ in range(200))\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(cpu.linear(x, p, None), y) else 1)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
def test_avx2_and_avx512_builds_give_the_same_bits(tmp_path, monkeypatch) -> None:
    """The build for the plainest CPU we take against the one for this CPU, on one whole attention and product."""
    if len(cpu._targets()) < 3:
        pytest.skip("this CPU has one target only")
    import ctypes

    plain = cpu.build(cpu.SOURCE, [["-mavx2", "-mfma"]], tmp_path)
    assert plain is not None

    def everything() -> list[torch.Tensor]:
        torch.manual_seed(5)
        x, w = torch.randn(29, 576), cpu.pack_linear(torch.randn(200, 576))
        y = cpu.linear(x, w, None)
        sequences = Sequences(cpu, [150], HeadShape(9, 3, 64, 64))
        attended = sequences.run([(0, 0, 150)], pieces([(0, 0, 150)]))
        mask = torch.full((29, 7), -1, dtype=torch.int32)
        return [
            y,
            attended,
            cpu.act_mul(y, "silu"),
            cpu.rms_norm(y.clone(), None, torch.randn(200), 1e-5),
            *cpu.pick(y, mask),
        ]

    here = everything()
    library = ctypes.CDLL(str(plain))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    assert all(torch.equal(a, b) for a, b in zip(here, everything(), strict=True))
