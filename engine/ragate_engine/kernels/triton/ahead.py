"""Compiles the kernels that a model will need, many at a time, while its weights are still being read.

Every kernel is launched once on no rows: what decides its code is the model's shapes, the type and the bucket. Those
of small steps come first; the others are compiled while the engine already answers. Where a model is new to this
machine, child processes compile side by side first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from ragate_engine.config import BLOCK_SIZE, ModelConfig
from ragate_engine.devices import hash_triton
from ragate_engine.kernels import HeadShape, StepInputs
from ragate_engine.kernels.triton import attention, device, make_kv, rope_write_kv
from ragate_engine.kernels.triton.attention import Work
from ragate_engine.kernels.triton.children import Children, Job, Marker, compile_only
from ragate_engine.kernels.triton.linear import PREFETCH_BYTES, Packed, best_tile, prefetches, product
from ragate_engine.kernels.triton.pick import COUNTS, ROW_WORDS, PickWorkspace, choose, out_width
from ragate_engine.kernels.triton.plan import HEADER, ROWS, WANTED
from ragate_engine.kernels.triton.quantized import (
    OFFSET,
    PLANES,
    UNPACK_ROWS,
    ZERO,
    PackedQuant,
    product_unpacked,
    quantized,
    segments_of,
    unpacked,
    walk_of,
)
from ragate_engine.kernels.triton.quantized import best_tile as best_quantized_tile
from ragate_engine.kernels.triton.rowwise import act_mul, embed, last_norm, rms_norm
from ragate_engine.lora import ProductShape
from ragate_engine.quant.tensor import Form
from ragate_engine.weights import names

FIRST_BUCKET = 64
"""Kernels for steps of up to so many rows come first."""
ATTENTION_BUCKETS = (16, 1024)
"""One bucket of each kind that attention has tiles for."""
LIKELY = COUNTS[:2]
"""Numbers of alternatives that are asked for most."""


class AheadCompiler:
    """Compiles in threads of its own from the moment it is made."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        buckets: Sequence[int],
        most_wanted: int,
        forms: Mapping[str, Form] | None = None,
        adapted: frozenset[ProductShape] = frozenset(),
    ) -> None:
        """For steps of `buckets` rows and up to `most_wanted` wanted ones, with caches of `kv_dtype`.

        `forms` says how each tensor is stored, where weights are multiplied as they are stored; `adapted` what
        adapters add to which products.
        """
        # in an order of its own: a set's changes from process to process, and the marker is made of it
        self._arguments = (model, dtype, kv_dtype, buckets, most_wanted, forms, tuple(sorted(adapted)))
        self._ready = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ragate-compile", daemon=True)
        self._thread.start()

    def wait_for_first(self) -> None:
        """Until the kernels of small steps are there."""
        self._ready.wait()

    def stop(self) -> None:
        """Leave what has not begun, and wait for the rest."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        children = None
        try:
            hash_triton()
            capability = torch.cuda.get_device_capability()
            marker = Marker(
                capability, self._arguments, *map(Path.read_text, sorted(Path(__file__).parent.glob("*.py")))
            )
            with torch.inference_mode():
                if not marker.found():
                    children = self._children(capability)
                first, rest = _jobs(torch.device("cuda"), *self._arguments)
                attempt = partial(_attempt, self._stopped)
                with ThreadPoolExecutor(max(2, os.cpu_count() or 1), "ragate-compile") as pool:
                    if children is not None:
                        children.wait(range(len(first)), self._stopped)
                    list(pool.map(attempt, first))
                    self._ready.set()
                    if children is not None:
                        children.wait(range(len(first) + len(rest)), self._stopped)
                    list(pool.map(attempt, rest))
            if not self._stopped.is_set():
                marker.leave()
        except (RuntimeError, OSError):  # no memory, say: then kernels compile where they are used
            return
        finally:
            self._ready.set()
            if children is not None:
                children.close()

    def _children(self, capability: tuple[int, int]) -> Children | None:
        """Processes that compile the same launches, made on tensors that are not on the card."""
        device.programs(), device.shared_memory()  # children cannot ask the card
        first, rest = _jobs(torch.device("cpu"), *self._arguments)
        with suppress(OSError):
            return Children([*first, *rest], partial(compile_only, capability))
        return None


def _attempt(stopped: threading.Event, job: Job) -> None:
    if stopped.is_set():
        return
    with torch.inference_mode(), suppress(Exception):  # a kernel that fails is left to fail where it is used
        job()


def _jobs(
    card: torch.device,
    model: ModelConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    buckets: Sequence[int],
    most_wanted: int,
    forms: Mapping[str, Form] | None = None,
    adapted: Sequence[ProductShape] = (),
) -> tuple[list[Job], list[Job]]:
    """Launches on no rows: what small steps need, and the rest; the costliest to compile come first."""
    plan = torch.zeros(HEADER, dtype=torch.int32, device=card)
    # the very places that steps take them from: Triton compiles for how addresses are aligned
    none, none_wanted = plan[ROWS : ROWS + 1], plan[WANTED : WANTED + 1]
    room = torch.empty(PREFETCH_BYTES, dtype=torch.uint8, device=card)

    def fake(kind: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor that no kernel will read: a large one has no memory of its own."""
        count = 1
        for size in shape:
            count *= size
        items = room.view(kind)
        return items[:count].view(shape) if count <= len(items) else items[0].expand(shape)

    first: dict[object, Job] = {}
    rest: dict[object, Job] = {}
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    cos = torch.empty(1, model.head_dim, dtype=torch.float32, device=card)
    scale = model.attn_scale if model.attn_scale is not None else model.head_dim**-0.5
    cache = make_kv(1, model.num_kv_heads, model.head_dim, kv_dtype, card)
    for layer in {model.window_of(i) is None: i for i in range(model.num_layers)}.values():
        turned = int(model.head_dim * model.rope_of(layer).partial)
        shape = HeadShape(model.num_heads, model.num_kv_heads, model.head_dim, turned)
        window, cap = model.window_of(layer), model.attn_soft_cap
        for bucket in ATTENTION_BUCKETS:
            qkv = fake(dtype, bucket, q + 2 * kv)
            zeros = torch.zeros(bucket, dtype=torch.int32, device=card)
            for kinds in ((True, False, False), (False, True, False), (False, False, True)):
                work = Work(plan, zeros, torch.empty(1, dtype=torch.float32, device=card), *kinds)
                step = StepInputs(zeros, zeros, zeros, plan, work, zeros, none, none_wanted, none)
                jobs = first if bucket <= FIRST_BUCKET else rest
                jobs[("attention", window is None, bucket, kinds)] = partial(
                    attention, qkv, cache, step, shape, scale, window, cap
                )
        norm = fake(dtype, model.head_dim) if model.qk_norm else None
        first[("rope", turned)] = partial(
            rope_write_kv, fake(dtype, 16, q + 2 * kv), norm, norm, 1e-5, cos, cos, step, cache, shape
        )

    apart = any("gate" in product.leaves for product in adapted)
    shapes = [
        (q + 2 * kv, hidden, model.qkv_bias, False, False),
        (hidden, q, False, False, False),
        (2 * inner, hidden, False, not apart, apart),
        (hidden, inner, False, False, False),
    ]
    if forms is not None:
        shapes = []
        for key, bucket, job in _quantized_jobs(fake, none, model, buckets, forms, apart):
            (first if bucket <= FIRST_BUCKET else rest).setdefault(key, job)
    for _, outer, columns, width in adapted:
        shapes += [(columns, width, False, False, True), (outer, columns, False, False, True)]
    head = (model.vocab_size, hidden, False, False, True)
    for bucket in buckets:
        for measures in [*shapes, head]:
            N, K, bias, gated, wide = measures
            last = measures is head
            M = min(bucket, most_wanted) if last else bucket
            tile = best_tile(M, N, K, gated, wide)
            ahead = prefetches(M, N, K, dtype.itemsize)
            # which count is read matters too: one lies at a multiple of 16 bytes, the other does not
            key = (tile, ahead, bias, gated, wide, last, K % tile.inner == 0, K % 16, N % 16)
            if key in first or key in rest:
                continue
            x, w = fake(dtype, M, K), Packed(fake(dtype, N, K), gated)
            y, activation = fake(torch.float32, M, N) if wide else None, model.activation if gated else None
            job = partial(
                product,
                x,
                w,
                fake(dtype, N) if bias else None,
                wide,
                activation,
                none_wanted if last else none,
                y,
            )
            (first if bucket <= FIRST_BUCKET else rest)[key] = job

    h, weight = fake(dtype, 16, hidden), fake(dtype, hidden)
    zeros = torch.zeros(16, dtype=torch.int32, device=card)
    step = StepInputs(zeros, zeros, zeros, plan, None, zeros, none, none_wanted, none)
    first["embed"] = partial(embed, zeros, fake(dtype, BLOCK_SIZE, hidden), model.embed_scale, step)
    first["norm"] = partial(rms_norm, h, h, weight, 1e-5, none)
    first["first norm"] = partial(rms_norm, h, None, weight, 1e-5, none)
    if apart:
        both = fake(torch.float32, 16, 2 * inner)
        first["activation"] = partial(act_mul, both, model.activation, dtype, none)
    first["last norm"] = partial(last_norm, h, h, weight, 1e-5, step)
    workspace = PickWorkspace(16, model.vocab_size, card)
    logits = fake(torch.float32, 16, model.vocab_size)
    for count in LIKELY:
        for masked in (False, True):
            asked = torch.zeros(16, ROW_WORDS, dtype=torch.int32, device=card)
            out = torch.empty(16, out_width(count), dtype=torch.int32, device=card)
            mask = fake(torch.int32, 16, -(-model.vocab_size // 32)) if masked else None
            first[("choose", count, masked)] = partial(
                choose, workspace, logits, asked, mask, out, none, none_wanted
            )
    return list(first.values()), list(rest.values())


def _quantized_jobs(
    fake: Callable[..., torch.Tensor],
    none: torch.Tensor,
    model: ModelConfig,
    buckets: Sequence[int],
    forms: Mapping[str, Form],
    apart: bool,
) -> list[tuple[object, int, Job]]:
    """What decides the code, the bucket and the launch of each product with weights that stay as they are stored.

    A zero and an offset look alike in a header: small groups, as in GGUF files, are taken to have offsets. `apart`:
    gate and up end in float32, before their activation.
    """
    shapes = names.expected(model)
    jobs: dict[object, tuple[object, int, Job]] = {}
    for layer in range(model.num_layers):
        for leaves in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            stored = [
                (forms.get(f"layers.{layer}.{leaf}"), shapes[f"layers.{layer}.{leaf}"]) for leaf in leaves
            ]
            for form, run in groupby(stored, lambda each: each[0] and replace(each[0], size=0)):
                if form is None or form.bits not in PLANES:
                    continue
                sizes = [shape for _, shape in run]
                rows, width = sum(size[0] for size in sizes), sizes[0][1]
                if rows % 16 or width % 16 or form.group < 16:
                    continue
                wide = apart and leaves[0] == "gate"
                gated, bias = leaves[0] == "gate" and not apart, leaves[0] == "q" and model.qkv_bias
                packed = _stand_in(fake, form, rows, width, gated)
                for bucket in buckets:
                    tile = best_quantized_tile(bucket, packed)
                    code = tile if bucket < UNPACK_ROWS else "unpacked"
                    key = (
                        "quantized",
                        code,
                        form,
                        packed.segments,
                        gated,
                        wide,
                        bias,
                        packed.columns % tile.inner == 0,
                    )
                    x = fake(torch.bfloat16, bucket, width)
                    offset = fake(torch.bfloat16, rows) if bias else None
                    activation = model.activation if gated else None
                    if bucket < UNPACK_ROWS:
                        launch: Job = partial(quantized, x, (packed,), offset, activation, none, wide)
                    else:
                        # unpacking does not ask for a count of rows: it gets weights that are there, a tile of them
                        few = _stand_in(partial(_zeros, none.device), form, 16, width, gated)
                        jobs.setdefault(key[2:], (key[2:], bucket, partial(unpacked, few)))
                        w = fake(torch.bfloat16, rows, width)
                        launch = partial(_with_unpacked, x, w, packed, offset, wide, activation, none)
                    jobs.setdefault(key, (key, bucket, launch))
    return list(jobs.values())


def _with_unpacked(
    x: torch.Tensor,
    w: torch.Tensor,
    packed: PackedQuant,
    bias: torch.Tensor | None,
    wide: bool,
    activation: str | None,
    none: torch.Tensor,
) -> None:
    kind = torch.float32 if wide else x.dtype
    y = torch.empty(len(x), len(w) // (1 + packed.gated), dtype=kind, device=x.device)
    product_unpacked(x, w, packed, bias, wide, activation, none, y)


def _zeros(card: torch.device, kind: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=kind, device=card)


def _stand_in(
    fake: Callable[..., torch.Tensor], form: Form, rows: int, width: int, gated: bool
) -> PackedQuant:
    """A weight [rows, width] for kernels that have nothing to do; its tensors are made by `fake`."""
    low, high = PLANES[form.bits]
    walk = walk_of(form.bits, form.group)
    segments = 1 if gated else segments_of(rows, width)
    blocks = -(-width // (segments * walk.step)) * segments * walk.step // walk.block
    words = walk.groups if form.beside or walk.groups == 1 else walk.groups // 2
    sets = -(-blocks * walk.block // form.group) if walk.groups == 1 else blocks
    kind = (OFFSET if form.group <= 32 else ZERO) if form.beside else 0
    return PackedQuant(
        fake(torch.int16, rows // 16, blocks, 256),
        fake(torch.int16, rows // 16, blocks * high // low, 256) if high else None,
        fake(
            torch.int64 if form.beside or walk.groups > 1 else torch.int32,
            rows // 16,
            sets,
            -(-words // 2),
            8,
            min(words, 2),
        ),
        form.bits,
        form.group,
        kind,
        width,
        segments=segments,
        done=fake(torch.int32, 64) if segments > 1 else None,
        gated=gated,
    )
