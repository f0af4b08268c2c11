"""On the card: the compiled Triton kernels against float64, the bits of a row in any company, and whole models.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card; a GGUF file is taken from RAGATE_TEST_MODEL.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from ragate_engine import Completion, Engine, EngineConfig, SamplingParams
from ragate_engine.kernels import HeadShape, StepInputs, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")]
CARD = torch.device("cuda")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("inner", "outer"), [(1536, 2048), (8960, 1536), (1536, 151936), (576, 1536), (40, 27)]
)
def test_linear_is_right_and_its_rows_keep_their_bits(inner: int, outer: int) -> None:
    from ragate_engine.kernels import triton as ops

    torch.manual_seed(0)
    x = torch.randn(1000, inner, device=CARD, dtype=torch.bfloat16)
    w = torch.randn(outer, inner, device=CARD, dtype=torch.bfloat16)
    full = ops.linear(x, ops.pack_linear(w), None)
    assert error(full, x.double() @ w.double().T) < 4e-3
    for first, rows in [(0, 1), (5, 1), (3, 16), (0, 17), (100, 64), (0, 65), (9, 300), (0, 999)]:
        assert torch.equal(
            ops.linear(x[first : first + rows].contiguous(), w, None), full[first : first + rows]
        )


@pytest.mark.parametrize("shape", [HeadShape(9, 3, 64, 64), HeadShape(12, 2, 128, 128), HeadShape(32, 8, 128, 128),
                                   HeadShape(4, 1, 256, 256), HeadShape(8, 8, 80, 40)], ids=str)  # fmt: skip
@pytest.mark.parametrize(("window", "cap"), [(None, None), (300, None), (None, 30.0)])
def test_attention_is_right_and_its_rows_keep_their_bits(
    shape: HeadShape, window: int | None, cap: float | None
) -> None:
    from ragate_engine.kernels import triton as ops

    torch.manual_seed(1)
    length = 1100
    blocks = -(-length // 16)
    table = torch.randperm(blocks + 5)[:blocks].int()
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    fresh = torch.randn(length, width, device=CARD, dtype=torch.bfloat16)
    angles = torch.arange(length)[:, None] * (0.7 ** torch.arange(shape.rotary_dim // 2))
    cos, sin = angles.cos().to(CARD), angles.sin().to(CARD)
    norms = [torch.rand(shape.head_dim, device=CARD, dtype=torch.bfloat16) + 0.5 for _ in range(2)]

    def run(kernels, k, v, first: int, count: int) -> torch.Tensor:
        position = torch.arange(first, first + count)
        slots = table.long()[position // 16] * 16 + position % 16
        groups, at = [], first
        while at < first + count:
            n = min(first + count, (at // 16 + 1) * 16) - at
            groups.append([at - first, n, (at + 1) // 16])
            at += n
        one = int(count == 1)
        step = StepInputs(
            *(t.int().to(CARD) for t in (position, slots, torch.zeros(count), table[None], torch.tensor(groups))),
            singles=one, single_groups=one,
        )  # fmt: skip
        qkv = fresh[first : first + count].clone()
        kernels.rope_write_kv(qkv, *norms, 1e-6, cos, sin, step, k, v, shape)
        return kernels.attention(qkv, k, v, step, shape, shape.head_dim**-0.5, window, cap)

    caches = {
        ops: reference.make_kv(blocks + 5, shape.kv_heads, shape.head_dim, torch.bfloat16, CARD)
        for ops in (ops, reference)
    }
    for k, v in caches.values():
        k.fill_(float("nan")), v.fill_(float("nan"))
    whole = run(ops, *caches[ops], 0, length)
    assert error(whole, run(reference, *caches[reference], 0, length).double()) < 1e-2
    for first, count in [(0, 37), (37, 512), (549, 1), (550, 64), (614, 486)]:
        assert torch.equal(run(ops, *caches[ops], first, count), whole[first : first + count])
    for first in (0, 15, 16, 700, 1099):
        assert torch.equal(run(ops, *caches[ops], first, 1), whole[first : first + 1])


def test_rowwise_kernels_are_right() -> None:
    from ragate_engine.kernels import triton as ops

    torch.manual_seed(2)
    for width in (576, 1536, 4096):
        h = torch.randn(33, width, device=CARD, dtype=torch.bfloat16)
        x, w = torch.randn_like(h), torch.rand(width, device=CARD, dtype=torch.bfloat16)
        mine, theirs = h.clone(), h.clone()
        y, z = ops.rms_norm(mine, x, w, 1e-5), reference.rms_norm(theirs, x, w, 1e-5)
        assert torch.equal(mine, theirs)
        assert error(y, z.double()) < 4e-3
        assert torch.equal(ops.rms_norm(h[4:5].clone(), x[4:5], w, 1e-5), y[4:5])
        for activation in ("silu", "gelu_tanh"):
            gate_up = torch.randn(9, 2 * width, device=CARD, dtype=torch.bfloat16)
            assert (
                error(ops.act_mul(gate_up, activation), reference.act_mul(gate_up, activation).double())
                < 4e-3
            )
    logits = torch.randn(70, 151936, device=CARD)
    logits[3, 500] = logits[3, 90000] = 40.0
    mask = torch.randint(-(2**31), 2**31 - 1, (70, 4748), device=CARD, dtype=torch.int32)
    mask[3] = -1
    mask[5] = 0
    ids, lse = ops.pick(logits, mask)
    expected_ids, expected_lse = reference.pick(logits, mask)
    assert torch.equal(ids.long(), expected_ids.long())
    assert int(ids[3]) == 500 and int(ids[5]) == -1
    assert torch.allclose(lse, expected_lse, atol=1e-4)


def answers(engine: Engine) -> list[Completion]:
    rng = random.Random(0)
    heads = [[rng.randrange(100, 30000) for _ in range(n)] for n in (300, 500, 64)]
    requests = []
    for i in range(200):
        prompt = [*heads[i % 3], *(rng.randrange(100, 30000) for _ in range(rng.randrange(1, 400)))]
        temperature = 0.7 if i % 5 == 0 else 0.0
        requests.append(
            (
                prompt,
                SamplingParams(max_tokens=rng.randrange(1, 24), logprobs=2, temperature=temperature, seed=i),
            )
        )
    futures = [engine.submit(*request) for request in requests]
    return [future.result(timeout=600) for future in futures]


def test_bits_of_200_requests_do_not_depend_on_their_company() -> None:
    path = os.environ.get("RAGATE_TEST_MODEL")
    if not path:
        pytest.skip("RAGATE_TEST_MODEL names no GGUF file")
    seen = {}
    for name, settings in {
        "batch 256": dict(max_batch=256, max_step_tokens=2048),
        "alone": dict(max_batch=1, max_step_tokens=2048),
        "chunks of 64": dict(max_batch=64, max_step_tokens=64),
        "no cache": dict(max_batch=256, max_step_tokens=1024, prefix_cache=False),
    }.items():
        with Engine.load(path, EngineConfig(device="cuda", **settings)) as engine:
            completions = answers(engine)
            if name == "batch 256":
                again = answers(engine)  # the cache is warm now
                assert [(c.text, c.tokens) for c in again] == [(c.text, c.tokens) for c in completions]
            seen[name] = [(c.text, c.tokens, c.finish) for c in completions]
    first = seen.pop("batch 256")
    for name, other in seen.items():
        different = [i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a != b]
        assert different == [], f"{name}: {len(different)} of 200 requests differ"
