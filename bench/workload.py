"""The requests that engines are timed on, as token ids: the judge workload, and points of decode and prefill.

One judge request = the long prefix of its metric (instruction, schema, examples: shared by every case) + the case's
own text; the answer has a fixed length, so that every engine does the same work. The generator is the one that the
peer's figures were made with: the same ids, number for number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Prompt = list[int]
METRICS = 4


@dataclass(frozen=True)
class Sizes:
    """How much of each kind of work; the default is what the peer's figures were made with."""

    decode_batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    decode_prompt: int = 64
    decode_out: int = 256
    prefill_requests: int = 16
    prefill_prompt: int = 1000
    cases: int = 250
    prefix: int = 1200
    own: tuple[int, int] = (200, 700)
    judge_out: int = 128
    warm_up_cases: int = 8


FULL = Sizes()
SMALL = Sizes(
    decode_batches=(1, 4),
    decode_prompt=20,
    decode_out=6,
    prefill_requests=2,
    prefill_prompt=40,
    cases=3,
    prefix=40,
    own=(10, 30),
    judge_out=4,
    warm_up_cases=1,
)
"""Seconds on a CPU with a tiny model: it shows that everything runs, and no speed."""


def judge_prompts(
    cases: int, vocab: int, prefix: int = FULL.prefix, own: tuple[int, int] = FULL.own, seed: int = 0
) -> list[Prompt]:
    """Four prompts a case, one for each metric's shared prefix; `own` bounds the length of a case's text."""
    rng = random.Random(seed)

    def tokens(count: int) -> Prompt:
        return [rng.randrange(100, vocab - 100) for _ in range(count)]

    heads = [tokens(prefix) for _ in range(METRICS)]
    prompts: list[Prompt] = []
    for _ in range(cases):
        body = tokens(rng.randint(*own))
        prompts += [head + body for head in heads]
    return prompts


def warm_up(vocab: int, sizes: Sizes = FULL) -> list[Prompt]:
    """A little of the judge workload, of another seed."""
    return judge_prompts(sizes.warm_up_cases, vocab, sizes.prefix, sizes.own, seed=9)


def judge(vocab: int, sizes: Sizes = FULL) -> list[Prompt]:
    """The judge workload itself: 1,000 requests."""
    return judge_prompts(sizes.cases, vocab, sizes.prefix, sizes.own)


def decode(batch: int, vocab: int, sizes: Sizes = FULL) -> list[Prompt]:
    """`batch` short prompts: the heads of the judge prompts, so at most four different ones."""
    if batch < METRICS:
        return [list(range(100, 100 + sizes.decode_prompt))] * batch
    prompts = judge_prompts(batch // METRICS, vocab, sizes.prefix, sizes.own, seed=batch)
    return [prompt[: sizes.decode_prompt] for prompt in prompts][:batch]


def prefill(vocab: int, sizes: Sizes = FULL) -> list[Prompt]:
    """Prompts of which nothing is shared, to be answered with one token."""
    length = sizes.prefill_prompt
    prompts = judge_prompts(sizes.prefill_requests, vocab, sizes.prefix, (length, length), seed=3)
    return [prompt[-length:] for prompt in prompts][::METRICS]
