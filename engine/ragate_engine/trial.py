"""A trial at the start: a decoder of one layer, of the model's own shapes and random weights, takes a few steps.

It compiles the kernels that serving will call and shows which of them do not (`kernels/fallback.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch

from ragate_engine.config import BLOCK_SIZE, ModelConfig
from ragate_engine.devices import ALONE
from ragate_engine.kv import KVCache
from ragate_engine.layers import Kept
from ragate_engine.lora import Adapter
from ragate_engine.model import Decoder
from ragate_engine.request import Completion, Request, Row, SamplingParams, Status, StepPlan
from ragate_engine.steps import Steps
from ragate_engine.weights import names

if TYPE_CHECKING:
    from ragate_engine.grammar import GrammarState

ROWS = (60, 1)
"""Rows of the steps: a prompt, and a single new token."""
VOCAB = 1024


def small_model(model: ModelConfig) -> ModelConfig:
    """One layer of `model` of each kind that it has (sliding or not), with a small vocabulary."""
    windows = {model.window_of(i) is not None: model.window_of(i) for i in range(model.num_layers)}
    return replace(
        model,
        num_layers=len(windows),
        window_layers=tuple(windows) if model.window is not None else (),
        vocab_size=min(model.vocab_size, VOCAB),
    )


def try_kept(ops: ModuleType, kept: Sequence[Kept], device: torch.device) -> None:
    """Multiply with weights of each kind and shape that was not unpacked, in the numbers of rows that take other tiles.

    Raises whatever the operations raise.
    """
    seen = set()
    for weights in kept:
        parts = weights.weights if isinstance(weights.weights, tuple) else (weights.weights,)
        plain = [v for part in parts for v in vars(part).values() if not isinstance(v, torch.Tensor)]
        kind = (
            weights.operation,
            *plain,
            *(len(t) for part in parts for t in vars(part).values() if isinstance(t, torch.Tensor)),
        )
        if kind in seen or not hasattr(ops, weights.operation):
            continue
        seen.add(kind)
        for rows in (1, 16, 60, 200, 1000, 2048):
            x = torch.ones(rows, weights.width, dtype=torch.bfloat16, device=device)
            count = torch.full((1,), rows, dtype=torch.int32, device=device)
            getattr(ops, weights.operation)(x, weights.weights, None, weights.activation, count)


def run_steps(
    model: ModelConfig,
    ops: ModuleType,
    dtype: torch.dtype,
    device: torch.device,
    steps_of: Callable[[Decoder, KVCache, int, int, int], Steps],
    rows: Sequence[int] = ROWS,
    adapters: Sequence[Adapter] = (),
) -> None:
    """Run a step for each of `rows`, as one sequence that grows, and choose a token after each.

    `steps_of(decoder, kv, max_batch, max_step_tokens, max_len)` makes what runs steps; with `adapters`, which are of
    `model`, the steps are the first one's. Raises whatever the operations raise.
    """
    small = small_model(model)
    length = sum(rows) + 1
    blocks = -(-length // BLOCK_SIZE)
    shapes = names.expected(small)

    def load(name: str) -> torch.Tensor:
        return torch.full(shapes[name], 1e-2, dtype=dtype, device=device)

    decoder = Decoder(small, load, ops, dtype, device, blocks * BLOCK_SIZE, adapters=adapters)
    kv = KVCache(small, blocks, ops, dtype, device)
    steps = steps_of(decoder, kv, 1, max(max(rows), BLOCK_SIZE), blocks * BLOCK_SIZE)
    future: Future[Completion] = Future()
    params = SamplingParams(max_tokens=len(rows), logprobs=1)
    request = Request(0, [1] * rows[0], rows[0], params, future, Status.RUNNING, slot=0)
    request.adapter = 0 if adapters else -1
    request.blocks = list(range(blocks))
    with torch.inference_mode(), steps.entered():
        for i, count in enumerate(rows):
            if i:
                request.tokens += [1] * count
                request.grammar = cast("GrammarState", object())  # the choice comes later then, under a mask
            row = Row(request, request.computed, count, wants_logits=True, epoch=request.epoch)
            flight = steps.launch(StepPlan((row,)))
            request.computed += count
            flight.valid = [True] * len(flight.rows)
            everything = steps.masks(1)
            everything[:] = -1
            steps.choose(flight, [0] * len(flight.rows), everything)
            steps.read(flight)
    if device.type == "cuda":
        with ALONE:
            torch.cuda.synchronize(device)
