"""The gate on real labels: one generator's answers as the baseline, another's as the change, to the same questions.

What people said of the answers is one more score; so the verdict that the gate would reach with people as its judge is
known for each ordered pair, and each judge's verdicts are held against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from ragate.gate.stats import johnson_bounds, sign_flip_p
from ragate.gate.verdict import verdict_of_drop

if TYPE_CHECKING:
    from ragate.gate.verdict import Verdict
    from ragate.judging.asks import Row

LIMIT = 0.05
LEAST = 10
"""Shared questions that a pair must have."""
PEOPLE = "people"
SCORES: dict[str, Callable[[Row], float]] = {
    PEOPLE: lambda row: float(row.label),
    "hard": lambda row: row.hard,
    "soft": lambda row: row.mean,
    "word overlap": lambda row: row.overlap,
}


@dataclass(frozen=True)
class Seen:
    """A pair by one score: the drop from baseline to change, and the gate's verdict with an absolute limit."""

    drop: float
    verdict: Verdict


@dataclass(frozen=True)
class Pair:
    """Two generators over the questions that both answered."""

    base: str
    head: str
    items: int
    seen: Mapping[str, Seen]
    """By score."""


def pairs_of(rows: Sequence[Row], limit: float = LIMIT) -> list[Pair]:
    """Every ordered pair of generators; rows of one cluster are answers to one question."""
    answers: dict[str, dict[str, Row]] = {}
    for row in rows:
        answers.setdefault(row.generator, {})[row.cluster] = row
    found = []
    for base, head in permutations(sorted(answers), 2):
        shared = [cluster for cluster in answers[base] if cluster in answers[head]]
        if len(shared) < LEAST:
            continue
        seen = {
            name: _seen([score(answers[base][c]) - score(answers[head][c]) for c in shared], limit)
            for name, score in SCORES.items()
        }
        found.append(Pair(base, head, len(shared), seen))
    return found


def _seen(drops: Sequence[float], limit: float) -> Seen:
    estimate = johnson_bounds(drops)
    verdict = verdict_of_drop(estimate.mean, estimate.upper, sign_flip_p(drops), limit, "significant")
    return Seen(estimate.mean, verdict)


def summary(pairs: Sequence[Pair]) -> dict[str, dict[str, dict[str, int]]]:
    """Score -> verdict with people as the judge -> verdicts by this score, counted."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for pair in pairs:
        for name, seen in pair.seen.items():
            truth = pair.seen[PEOPLE].verdict
            counts.setdefault(name, {}).setdefault(truth, Counter())[seen.verdict] += 1
    return {name: {t: dict(c) for t, c in by.items()} for name, by in counts.items() if name != PEOPLE}


def lines_of(pairs: Sequence[Pair], judge: str) -> list[str]:
    """A line a score and verdict of people."""
    lines = []
    for name, by_truth in summary(pairs).items():
        who = name if name == "word overlap" else f"{judge}, {name}"
        for truth, counts in sorted(by_truth.items()):
            told = ", ".join(f"{verdict} {n}" for verdict, n in sorted(counts.items()))
            lines.append(f"gate      {who:44} people say {truth} ({sum(counts.values())} pairs): {told}")
    return lines
