"""Logits after every token of a text, by the engine's own kernels: what perplexity and divergence are made of.

The engine's public door gives the logits of the tokens it chooses from alone. Here its runner computes a window in one
step, and what would go into the output head is kept instead: a window's states are small, so those of a whole model can
be kept while its logits, vocabulary wide, are made when they are looked at.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ragate_engine import EngineConfig, SamplingParams
from ragate_engine.config import BLOCK_SIZE, ModelConfig
from ragate_engine.kernels import StepInputs
from ragate_engine.kv import KVCache, block_bytes
from ragate_engine.layers import Linear
from ragate_engine.model import Decoder
from ragate_engine.request import Request, Row, StepPlan
from ragate_engine.runner import Runner
from ragate_engine.weights import Checkpoint


@dataclass(frozen=True)
class Head:
    """The end of a decoder, behind its final norm."""

    linear: Linear
    soft_cap: float | None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """states [n, hidden] -> float32 logits [n, vocab]."""
        with torch.inference_mode():
            found = self.linear(states, None, wide=True)
            cap = self.soft_cap
            return found if cap is None else found.div_(cap).tanh_().mul_(cap)


def logits_of(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], config: EngineConfig | None = None
) -> Iterator[torch.Tensor]:
    """Logits after every token of each window: float32 [n, vocab] each, on the device of `config`, one at a time.

    The kernels, device and dtypes are those of `config`, and where it has adapters, the first is asked; the sizes of
    batch, step and cache are set here. Raises what loading a model raises.
    """
    head, states = states_of(checkpoint, windows, config)
    for part in states:
        yield head.logits(part)


def states_of(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], config: EngineConfig | None = None
) -> tuple[Head, Iterator[torch.Tensor]]:
    """`logits_of` in two halves: the head, and for each window what goes into it, [n, hidden].

    Once the last window is done the model is let go of, but for its head.
    """
    longest = max(map(len, windows))
    runner = Runner(checkpoint, _sized(config or EngineConfig(), checkpoint.config, longest))
    head = Head(runner.decoder.head, checkpoint.config.logit_soft_cap)
    return head, _states(runner, windows)


def _sized(config: EngineConfig, model: ModelConfig, longest: int) -> EngineConfig:
    """`config` for one window at a time, each of them one step."""
    blocks = max(2, -(-longest // BLOCK_SIZE))  # a runner asks for two
    return replace(
        config,
        max_len=blocks * BLOCK_SIZE,
        max_batch=1,
        max_step_tokens=blocks * BLOCK_SIZE,
        kv_bytes=blocks * block_bytes(model, torch.float32),
        cuda_graphs=False,  # a graph that is replayed does not come by here
    )


class _Tap:
    """Stands between a decoder's layers and its head: keeps the states of all rows of a pass, and makes no logits."""

    def __init__(self, decoder: Decoder) -> None:
        self.states: torch.Tensor
        self._forward, self._vocab = decoder.forward, decoder.config.vocab_size
        decoder.forward = self.forward  # type: ignore[method-assign]
        decoder.head = self.head  # type: ignore[assignment]

    def forward(
        self, ids: torch.Tensor, step: StepInputs, kv: KVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The decoder's own pass, with every row wanted."""
        wanted = torch.arange(len(ids), dtype=step.wanted.dtype, device=ids.device)
        return self._forward(ids, replace(step, wanted=wanted, wanted_rows=step.rows), kv)

    def head(
        self, x: torch.Tensor, rows: torch.Tensor | None, wide: bool = False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Keep what the head would get."""
        self.states = x
        return x.new_empty(0, self._vocab)


def _states(runner: Runner, windows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    tap = _Tap(runner.decoder)
    for number, window in enumerate(windows):
        request = Request(number, list(window), len(window), SamplingParams(), None)  # type: ignore[arg-type]
        request.slot = 0
        request.adapter = 0 if runner.adapters else -1
        request.blocks = list(range(-(-len(window) // BLOCK_SIZE)))
        with torch.inference_mode(), runner.steps.entered():
            # no token is chosen: the step stands for a chunk in the middle of a prompt
            runner.steps.launch(StepPlan((Row(request, 0, len(window), False, 0),)))
        yield tap.states[: len(window)]
    runner.close()
    del runner, tap
    let_go()


def let_go() -> None:
    """Give back the memory of engines that nothing refers to: the next one asks the card, not torch, what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
