"""Compiles the kernels that a model will need, many at a time, while its weights are still being read.

Every kernel is launched once on no rows: what decides its code is the model's shapes, the type and the bucket.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from ragate_engine.config import BLOCK_SIZE, ModelConfig
from ragate_engine.kernels import HeadShape, StepInputs
from ragate_engine.kernels.triton import attention as _attention_op
from ragate_engine.kernels.triton import device, make_kv, rope_write_kv
from ragate_engine.kernels.triton.attention import Work
from ragate_engine.kernels.triton.linear import Packed, best_tile, product
from ragate_engine.kernels.triton.pick import COUNTS, ROW_WORDS, PickWorkspace, choose, out_width
from ragate_engine.kernels.triton.plan import HEADER
from ragate_engine.kernels.triton.rowwise import embed, last_norm, rms_norm

LIKELY = COUNTS[:2]
"""Numbers of alternatives that are asked for most."""


@torch.inference_mode()
def compile_ahead(
    model: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype, buckets: Sequence[int], most_wanted: int
) -> None:
    """Compile for steps of `buckets` rows and up to `most_wanted` wanted ones; a kernel that fails is left to fail
    where it is used. Takes the card's memory for a while: about that of the largest weight and of the logits."""
    card = torch.device("cuda")
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    shapes = [
        (q + 2 * kv, hidden, model.qkv_bias, False, False),
        (hidden, q, False, False, False),
        (2 * inner, hidden, False, True, False),
        (hidden, inner, False, False, False),
        (model.vocab_size, hidden, False, False, True),
    ]
    none = torch.zeros(1, dtype=torch.int32, device=card)
    weights = torch.empty(max(n * k for n, k, *_ in shapes), dtype=dtype, device=card)
    rows = torch.empty(max(buckets) * max(hidden, q, inner), dtype=dtype, device=card)
    logits = torch.empty(most_wanted, model.vocab_size, device=card)
    jobs: dict[object, Callable[[], object]] = {}

    for bucket in buckets:
        for N, K, bias, gated, wide in shapes:
            M = min(bucket, most_wanted) if wide else bucket
            tile = best_tile(M, N, K, gated, wide)
            many = -(-M // tile.rows) * -(-N // tile.columns) > device.programs()
            key = (tile, bias, gated, wide, many, K % tile.inner == 0, K % 16, N % 16)
            x, w = rows[: M * K].view(M, K), Packed(weights[: N * K].view(N, K), gated)
            y, activation = logits[:M] if wide else None, model.activation if gated else None
            jobs.setdefault(key, partial(product, x, w, weights if bias else None, wide, activation, none, y))

    plan = torch.zeros(HEADER, dtype=torch.int32, device=card)
    cos = torch.empty(1, model.head_dim, device=card)
    for layer in {model.window_of(i) is None: i for i in range(model.num_layers)}.values():
        turned = int(model.head_dim * model.rope_of(layer).partial)
        shape = HeadShape(model.num_heads, model.num_kv_heads, model.head_dim, turned)
        cache = make_kv(1, model.num_kv_heads, model.head_dim, kv_dtype, card)
        scale = model.attn_scale if model.attn_scale is not None else model.head_dim**-0.5
        norm = rows if model.qk_norm else None
        window, cap = model.window_of(layer), model.attn_soft_cap
        for bucket in (16, 1024):
            qkv = torch.empty(bucket, q + 2 * kv, dtype=dtype, device=card)
            zeros = torch.zeros(bucket, dtype=torch.int32, device=card)
            for small, big, parts in ((True, False, False), (False, True, False), (False, False, True)):
                work = Work(plan, zeros, torch.empty(1, device=card), small, big, parts)
                step = StepInputs(zeros, zeros, zeros, plan, work, zeros, none, none, none)

                jobs[("attention", window is None, bucket, small, big)] = partial(
                    _attention_op, qkv, cache, step, shape, scale, window, cap
                )
            jobs[("rope", turned)] = partial(
                rope_write_kv, qkv, norm, norm, 1e-5, cos, cos, step, cache, shape
            )

    h = rows[: 16 * hidden].view(16, hidden)
    zeros = torch.zeros(16, dtype=torch.int32, device=card)
    step = StepInputs(zeros, zeros, zeros, plan, None, zeros, none, none, none)
    table = weights[: BLOCK_SIZE * hidden].view(BLOCK_SIZE, hidden)
    jobs["embed"] = lambda: embed(zeros, table, model.embed_scale, step)
    jobs["norm"] = lambda: rms_norm(h, h.clone(), rows, 1e-5, none)
    jobs["first norm"] = lambda: rms_norm(h, None, rows, 1e-5, none)
    jobs["last norm"] = lambda: last_norm(h, h, rows, 1e-5, step)
    workspace = PickWorkspace(16, model.vocab_size, card)
    words = -(-model.vocab_size // 32)
    for count in LIKELY:
        for mask in (None, torch.empty(16, words, dtype=torch.int32, device=card)):
            asked = torch.empty(16, ROW_WORDS, dtype=torch.int32, device=card)
            out = torch.empty(16, out_width(count), dtype=torch.int32, device=card)

            jobs[("choose", count, mask is None)] = partial(
                choose, workspace, logits[:16], asked, mask, out, none, none
            )

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except RuntimeError:  # out of memory or a kernel that does not compile: its user will hear of it
            return

    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1), "ragate-compile") as pool:
        list(pool.map(run, jobs.values()))
    torch.cuda.synchronize()
