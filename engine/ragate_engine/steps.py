"""What a step brings (`Chosen`), and `HostSteps`: steps that run where they are launched, without graphs.

`HostSteps` serves the CPU's kernels and the reference kernels of any device; `card.py` serves the card's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ragate_engine import sampling
from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import StepInputs
from ragate_engine.kv import KVCache
from ragate_engine.model import Decoder
from ragate_engine.request import Row, StepPlan

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """What was chosen for each row that wanted it: W rows, n alternatives."""

    ids: list[int]
    """The token, -1 where the mask allows none."""
    logits: list[float]
    """Its logit."""
    lse: list[float]
    """Log-sum-exp over all tokens; NaN or infinite where the logits are damaged."""
    top_ids: Ints
    """[W, n] likeliest allowed tokens, best first; -1 where there are fewer."""
    top_logits: Floats
    """[W, n] their logits."""


@dataclass(eq=False)
class Flight:
    """A step that was launched."""

    rows: list[Row]
    """Those that want a token chosen, in the order of their results."""
    valid: list[bool]
    """Whether what is chosen for a row is its request's next token."""


class Steps(Protocol):
    """Runs steps on a device, in the order in which they are launched, for one thread, in inference mode."""

    def entered(self) -> AbstractContextManager[object]:
        """What the thread that runs steps must be in."""

    def launch(self, plan: StepPlan) -> Flight:
        """Queue the forward pass of a step."""

    def masks(self, count: int) -> Ints:
        """Where to write the masks of the next choice: int32 [count, ceil(vocab / 32)], bit i of word w for token
        32 w + i."""

    def choose(self, flight: Flight, mask_of: Sequence[int], masks: Ints) -> None:
        """Queue the choice of a token for each row of `flight`.

        Row i may take the tokens of `masks[mask_of[i]]` (what `masks` gave, filled), all where that is -1.
        """

    def read(self, flight: Flight) -> Chosen:
        """Wait for what was chosen."""


def step_rows(
    rows: Sequence[Row], starts: Ints, counts: Ints
) -> tuple[npt.NDArray[np.int64], Ints, Ints, Ints]:
    """Per row of the pass: ids [M] (-1 - slot where a token is still being sampled), positions [M] and index of its
    request [M]; and per request of `rows` its last row [R]."""
    ends = np.cumsum(counts, dtype=np.int32)
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    position = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - (ends - counts), counts)
    ids: list[int] = []
    for row in rows:
        tokens = row.request.tokens
        if row.count == 1:
            ids.append(tokens[row.start] if row.start < len(tokens) else -1 - row.request.slot)
            continue
        known = tokens[row.start : row.start + row.count]
        ids.extend(known)
        if len(known) < row.count:
            ids.append(-1 - row.request.slot)
    return np.array(ids, np.int64), position, owner, ends - 1


def adapters_of(rows: Sequence[Row], owner: Ints) -> Ints | None:
    """The adapter of each row of the pass [M], where `owner` [M] says whose it is; `None` where there are none."""
    found = np.array([row.request.adapter for row in rows], np.int32)
    return found[owner] if (found >= 0).any() else None


class HostSteps:
    """Forward and choice run at once, in the caller's thread."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        kernels: ModuleType,
        max_batch: int,
        device: torch.device,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.kernels = kernels
        self.device = device
        self.sampled = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self._logits: dict[Flight, torch.Tensor] = {}
        self._chosen: dict[Flight, Chosen] = {}

    def entered(self) -> AbstractContextManager[object]:
        """Nothing special."""
        return nullcontext()

    def launch(self, plan: StepPlan) -> Flight:
        """Run the forward pass."""
        rows = sorted(plan.rows, key=lambda row: (row.count > 1, row.request.blocks))
        starts = np.array([row.start for row in rows], np.int32)
        counts = np.array([row.count for row in rows], np.int32)
        tables = np.zeros((len(rows), max(len(row.request.blocks) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            tables[i, : len(row.request.blocks)] = row.request.blocks
        ids, position, owner, last = step_rows(rows, starts, counts)
        slots = tables[owner, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        wanting = [i for i, row in enumerate(rows) if row.wants_logits]
        adapters = adapters_of(rows, owner)
        step = StepInputs(
            positions=self._put(position),
            slots=self._put(slots),
            row_table=self._put(owner),
            tables=self._put(tables),
            work=self.kernels.plan_attention(starts, counts, tables),
            wanted=self._put(last[wanting].astype(np.int64)),
            sampled=self.sampled,
            adapters=None if adapters is None else self._put(adapters),
        )
        flight = Flight([rows[i] for i in wanting], [])
        self._logits[flight] = self.decoder.forward(self._put(ids), step, self.kv)
        return flight

    def _put(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def masks(self, count: int) -> Ints:
        """Fresh ones."""
        return np.empty((count, -(-self.decoder.config.vocab_size // 32)), np.int32)

    def choose(self, flight: Flight, mask_of: Sequence[int], masks: Ints) -> None:
        """Pick, or sample, each row's token."""
        logits = self._logits.pop(flight)
        rows, count = flight.rows, 0
        if rows:
            count = min(max(row.request.params.logprobs for row in rows), logits.shape[1])
        allowed = np.full((len(rows), -(-logits.shape[1] // 32)), -1, np.int32)
        for i, line in enumerate(mask_of):
            if line >= 0:
                allowed[i] = masks[line]
        if not rows:
            self._chosen[flight] = Chosen(
                [], [], [], np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
            )
            return
        bits = self._put(allowed)
        picked, lse = self.kernels.pick(logits, bits)
        picked = picked.long()
        for i, row in enumerate(rows):
            params = row.request.params
            if params.temperature > 0 and flight.valid[i] and picked[i] >= 0 and lse[i].isfinite():
                values = logits[i].cpu().numpy()
                open_to = sampling.allowed_tokens(allowed[i], len(values))
                picked[i] = sampling.sample(values, open_to, params, row.start + row.count)
        chosen = logits.gather(1, picked.clamp(min=0)[:, None])[:, 0]
        # a request that ended has no slot any more, and its old one may be another's
        kept = [i for i, row in enumerate(rows) if flight.valid[i] and row.request.slot >= 0]
        self.sampled[[rows[i].request.slot for i in kept]] = picked[kept].clamp(min=0)
        top_ids, top_logits = (
            (t.cpu().numpy() for t in self.kernels.likeliest(logits, bits, count))
            if count
            else (np.empty((len(rows), 0), np.int32), np.empty((len(rows), 0), np.float32))
        )
        self._chosen[flight] = Chosen(picked.tolist(), chosen.tolist(), lse.tolist(), top_ids, top_logits)

    def read(self, flight: Flight) -> Chosen:
        """What `choose` made."""
        return self._chosen.pop(flight)
