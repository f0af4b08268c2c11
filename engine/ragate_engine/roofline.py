"""The least work of a step: floating-point operations, bytes of memory, and the time they must take.

Counted: every weight that is read, once a step; the K and V of every context, once; new K and V, written once. Not
counted: activations, which stay in the cache of the card. The embedding table is read by row unless it is the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragate_engine.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a piece of work."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Ceilings:
    """What a machine does: operations and bytes a second, and where those numbers are from."""

    flops: float
    bytes: float
    origin: str

    def seconds(self, work: Work) -> float:
        """The least time for `work`: arithmetic and memory at their best, side by side."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def bound(self, work: Work) -> str:
        """Which of the two is the limit."""
        return "arithmetic" if work.flops / self.flops > work.bytes / self.bytes else "memory"


@dataclass(frozen=True)
class Shape:
    """A model as work: its matrices and its cache. `weight_size` and `kv_size` are bytes a value."""

    config: ModelConfig
    weight_size: float = 2.0
    kv_size: float = 2.0

    @property
    def layer_weights(self) -> int:
        """Values in the matrices of all layers."""
        c = self.config
        attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Values in the output head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def kv_bytes(self) -> float:
        """Bytes of K and V of one token, all layers."""
        return 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim * self.kv_size

    def weights_read(self) -> Work:
        """The bytes of one pass over the weights."""
        return Work(0, self.weight_size * (self.layer_weights + self.head_weights))

    def rows(self, count: float, wanted: float, pairs: float) -> Work:
        """Arithmetic of `count` rows, `wanted` of them with logits, `pairs` (query row, key row) of attention."""
        c = self.config
        dense = 2 * (self.layer_weights * count + self.head_weights * wanted)
        attention = 4 * c.num_layers * c.num_heads * c.head_dim * pairs
        return Work(dense + attention, self.kv_bytes * count)

    def decode(self, batch: int, distinct: int, prompt: int, out: int) -> Work:
        """The whole of `batch` requests: prompts in one pass, then a pass for each token but the first.

        Of the `distinct` prompts each is computed once; of one that was there before only the last row is.
        """
        again = batch - distinct
        work = self.prefill([prompt] * distinct) + self.rows(again, again, again * prompt)
        for context in range(prompt + 1, prompt + out):
            work += self.step(batch, context)
        return work

    def step(self, batch: int, context: float) -> Work:
        """One pass for the next token of `batch` requests, each with `context` tokens before it."""
        read = self.weights_read() + Work(0, self.kv_bytes * batch * context)
        return read + self.rows(batch, batch, batch * context)

    def prefill(self, lengths: Sequence[int]) -> Work:
        """Prompts in one pass, each from its start."""
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return self.weights_read() + self.rows(sum(lengths), len(lengths), pairs)

    def judge(self, prefix: int, own: Sequence[int], out: int, batch: int) -> Work:
        """The judge workload: prefixes computed once each, `own` lengths behind them, `batch` requests at once.

        `own` has one entry a request, four prefixes in turn. A step reads every shared prefix once and each
        request's own tokens once; there are as many steps as full batches need for all the output tokens.
        """
        steps = max(1.0, len(own) / batch) * (out - 1)
        work = self.rows(4 * prefix, 0, 4 * prefix * (prefix + 1) / 2)
        for length in own:
            total = prefix + length
            pairs = total * (total + 1) / 2 - prefix * (prefix + 1) / 2
            work += self.rows(length, 1, pairs)
            decoded = sum(range(total + 1, total + out))
            work += self.rows(out - 1, out - 1, decoded)
            work += Work(0, self.kv_bytes * (decoded - prefix * (out - 1)))
        passes = self.weights_read() + Work(0, self.kv_bytes * 4 * prefix)
        return work + Work(0, passes.bytes * steps)
