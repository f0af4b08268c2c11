"""The data of one request: what is asked (`SamplingParams`), what runs (`Request`), what comes back (`Completion`)."""

from __future__ import annotations

import codecs
import enum
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ragate_engine.blocks import ROOT
from ragate_engine.errors import ConfigError

if TYPE_CHECKING:
    from ragate_engine.grammar import GrammarState


MAX_LOGPROBS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Greedy unless `temperature` is above 0; the same `seed` gives the same tokens."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: str | None = None
    """A JSON schema, as JSON text, that the output must match."""
    logprobs: int = 0
    """Record the log-probabilities of this many likeliest allowed tokens at each step."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3):  # also refuses NaN
            raise ConfigError(f"temperature must be 0 or between 0.001 and 1000, got {self.temperature}")
        if self.logprobs > MAX_LOGPROBS:
            raise ConfigError(f"logprobs must be at most {MAX_LOGPROBS}, got {self.logprobs}")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ConfigError("stop must be a list of strings that are not empty")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0 or self.logprobs < 0:
            raise ConfigError("top_k and logprobs must not be negative")


class TokenInfo(NamedTuple):
    """One token of a completion.

    `start` is its character offset in `Completion.text`; `forced` tokens were the only ones the grammar
    allowed and were never sampled: they have no `logprob` and no `top`.
    """

    id: int
    start: int
    forced: bool = False
    logprob: float | None = None
    """Natural log of the token's probability among all tokens, before any mask."""
    top: tuple[tuple[str, float], ...] = ()
    """Likeliest *allowed* tokens as (text, logprob), best first."""


@dataclass(frozen=True)
class Completion:
    """The end of a request."""

    text: str
    tokens: tuple[TokenInfo, ...]
    finish: str
    """`stop` (end token, stop string or grammar complete) or `length` (max_tokens or the window reached)."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""


class Status(enum.Enum):
    """Where a request is. Moves: WAITING -> RUNNING -> (WAITING when preempted | FINISHED)."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A sequence being computed: `tokens` are wanted, the first `computed` have their KV in blocks.

    There is no prefill and no decode: computed catches up with wanted, and where it does a token is sampled.
    """

    id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    future: Future[Completion]
    status: Status = Status.WAITING
    adapter: int = -1
    """The place of its adapter among the engine's; -1 is the base alone."""
    root: bytes = ROOT
    """Where its chain of block hashes begins: another one for each adapter."""
    computed: int = 0
    """Tokens whose KV is in blocks, or will be by the steps that were launched."""
    pending: int = 0
    """Tokens that launched steps will bring: at most 1 when a step is planned."""
    epoch: int = 0
    """Raised by a preemption: what steps of an earlier epoch bring is dropped (it will come again, the same)."""
    slot: int = -1
    """Its place among the running requests; -1 while it waits."""
    committed: int = 0
    """Full blocks that were offered to the prefix cache."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Chain hash of each full block of `tokens`, as far as it has been worked out."""
    cached_tokens: int = 0
    preempted: bool = False
    rows_lost: int = 0
    """Rows that were computed when it was last preempted."""
    grammar: GrammarState | None = None
    output: list[TokenInfo] = field(default_factory=list)
    text: str = ""
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    """Turns the bytes of output tokens into `text`; holds back half a character."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.status is Status.FINISHED

    @property
    def missing(self) -> int:
        """Tokens wanted but not computed, one that is still being sampled included."""
        return len(self.tokens) + self.pending - self.computed


@dataclass(slots=True)
class Row:
    """A request's share of one step: compute tokens [start, start + count)."""

    request: Request
    start: int
    count: int
    wants_logits: bool
    """The step reaches the last wanted token, so that the next one can be chosen."""
    epoch: int

    @property
    def current(self) -> bool:
        """Whether a token chosen after this row is still the next one of its request."""
        request = self.request
        return (
            request.status is Status.RUNNING
            and request.epoch == self.epoch
            and self.start + self.count == len(request.tokens)
        )


@dataclass(frozen=True)
class StepPlan:
    """The rows of one forward pass."""

    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Rows of the pass, all requests together."""
        return sum(row.count for row in self.rows)


@dataclass
class Usage:
    """Counters since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0
    """Prompt tokens sent."""
    prompt_tokens_cached: int = 0
    """Of those, taken from the prefix cache."""
    tokens_out: int = 0
    tokens_forced: int = 0
    """Of those, dictated by the grammar and never sampled."""
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    rows_recomputed: int = 0
    """Rows computed again after a preemption."""
    kv_slots_held: int = 0
    """Slots (token places) of blocks in use, summed over the steps."""
    kv_slots_unused: int = 0
    """Of those, not holding a token."""
    kv_slots_contiguous: int = 0
    """What an allocator would hold that reserves prompt + max_tokens of every running request, shares nothing."""
    kv_slots_contiguous_unused: int = 0
    """Of those, not holding a token."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the engine's thread by phase: load, plan, launch, wait (for the device), choose."""
