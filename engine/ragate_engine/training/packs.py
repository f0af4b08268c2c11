"""Which examples are computed together: those that begin alike share the tokens of their beginning.

Prompts of one kind have hundreds of fixed tokens in common. A pack computes such a prefix once, and each of its members
goes on from there: the sums are those of every example alone, so packing changes speed and rounding, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate_engine.training.recipe import Example


@dataclass(frozen=True)
class Pack:
    """Examples with the first `prefix` tokens in common; each has at least one token of its prompt beyond it."""

    prefix: int
    members: tuple[int, ...]
    """Places in the list of examples, longest example first."""

    def tokens(self, examples: Sequence[Example]) -> int:
        """Tokens that are computed."""
        return self.prefix + sum(examples[i].length - self.prefix for i in self.members)


def share(examples: Sequence[Example]) -> list[Pack]:
    """Every example in one pack.

    Where prompts part, their branches stay in one pack with what all share, or are packed each for itself: whichever
    saves more tokens.
    """
    prompts = [np.array(example.prompt) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt)
    common = [_common(prompts[a], prompts[b]) for a, b in zip(order, order[1:], strict=False)]
    _, found = _best(common, 0, len(order))
    return [
        Pack(prefix, tuple(sorted(order[start:stop], key=lambda i: (-examples[i].length, i))))
        for prefix, start, stop in found
    ]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that two prompts share, short of the last of either, whose output predicts the answer."""
    size = min(len(a), len(b)) - 1
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _best(common: Sequence[int], start: int, stop: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens saved, and (prefix, start, stop) of each pack, for the sorted prompts `start` to `stop`.

    `common[i]` tokens are shared by the prompts i and i + 1; a run of prompts shares the least of its own.
    """
    if stop - start == 1:
        return 0, [(0, start, stop)]
    depth = min(common[start : stop - 1])
    cuts = [start, *(i + 1 for i in range(start, stop - 1) if common[i] == depth), stop]
    parts = [_best(common, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    together, apart = (stop - start - 1) * depth, sum(saved for saved, _ in parts)
    if apart > together:
        return apart, [pack for _, packs in parts for pack in packs]
    return together, [(depth, start, stop)]


def passes(examples: Sequence[Example], limit: int) -> list[list[Pack]]:
    """The packs of `examples` in forward passes of at most `limit` tokens, or of one example where that is longer."""
    found: list[list[Pack]] = []
    room = 0
    for pack in share(examples):
        for piece in _cut(pack, examples, limit):
            size = piece.tokens(examples)
            if size > room:
                found.append([])
                room = limit
            found[-1].append(piece)
            room -= size
    return found


def _cut(pack: Pack, examples: Sequence[Example], limit: int) -> list[Pack]:
    """`pack` in pieces that fit, its longest members together."""
    pieces: list[list[int]] = []
    room = 0
    for i in pack.members:
        own = examples[i].length - pack.prefix
        if own > room:
            pieces.append([])
            room = limit - pack.prefix
        pieces[-1].append(i)
        room -= own
    return [Pack(pack.prefix if len(piece) > 1 else 0, tuple(piece)) for piece in pieces]
