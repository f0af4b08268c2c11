"""P(verdict = 1), read off the tokens of a judge's answer. Needs neither ragas nor torch."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate_engine import TokenInfo

LOGPROBS = 8
"""Likeliest tokens to ask for at each place of an answer."""

VERDICT_NAMES = frozenset({"verdict", "attributed", "noncommittal"})
"""Keys of an answer whose value is 0 or 1."""

_KEY_OR_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(?:\s*:\s*(\d))?')


def verdict_probabilities(text: str, tokens: Sequence[TokenInfo]) -> tuple[float | None, ...]:
    """P(verdict = 1) = P(1) / (P(0) + P(1)) for each verdict in a JSON answer, in order, to 6 decimals.

    Read at the token that holds the digit, from its likeliest allowed tokens, each counted by its first
    digit. `None` where no probabilities were recorded.
    """
    found: list[float | None] = []
    position = 0
    for match in _KEY_OR_STRING.finditer(text):
        if match[1] not in VERDICT_NAMES or match[2] is None:
            continue
        at = match.start(2)
        while position + 1 < len(tokens) and tokens[position + 1].start <= at:
            position += 1
        mass = {"0": 0.0, "1": 0.0}
        for token, logprob in tokens[position].top if tokens else ():
            digit = next((c for c in token if c.isdigit()), "")
            if digit in mass:
                mass[digit] += math.exp(logprob)
        total = sum(mass.values())
        found.append(round(mass["1"] / total, 6) if total > 0 else None)
    return tuple(found)
