"""Why an item scored as it did, in the judge's own words, and what kind of failure that is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ragate.gate.baseline import SAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ragate.report.rows import ItemRow
    from ragate.run import Claim, Score

    Scores = Mapping[tuple[str, str], Score]
    """(item id, metric) -> score."""

POOR = 0.5
"""A score below this is poor whatever it was before."""
FALLEN = 0.2
"""A score that fell by this much did so for a reason; less may be the judge's wording."""
LIKE = 0.5
"""A sentence that has this share of a claim's words is what the claim most likely rests on."""
SEARCHED = 20_000
"""Characters of a context that are searched for such a sentence."""


class Why(NamedTuple):
    """The judge's reason behind the largest change of an item, or behind its lowest score."""

    metric: str
    claim: str
    """What was judged: a statement, `context 3`, ...; may be empty."""
    reason: str


class FailureClass(NamedTuple):
    """A kind of failure, and what usually helps."""

    key: str
    title: str
    means: str
    advice: str


CLASSES = (
    FailureClass(
        "retrieval",
        "Retrieval miss",
        "the contexts do not hold what the reference says, or the useful ones come late",
        "look at chunking, k, the embedding model and the query: the text may be cut apart or ranked too low",
    ),
    FailureClass(
        "unsupported",
        "Unsupported claim",
        "the answer says what the contexts do not",
        "tell the model to answer from the contexts alone, lower its temperature, or take a stronger one",
    ),
    FailureClass(
        "off-topic",
        "Off-topic answer",
        "the answer fits another question",
        "look at the prompt, and at what a rewriting of the question made of it",
    ),
    FailureClass(
        "refusal",
        "Refusal",
        "the answer commits itself to nothing",
        "rightly so where the contexts lack the answer; else soften the instruction to refuse",
    ),
    FailureClass(
        "error",
        "No score",
        "the system gave no answer, or the judge's came to nothing",
        "see the error in the item; `ragate eval` judges it again",
    ),
)


def classes_of(row: ItemRow, scores: Scores) -> tuple[str, ...]:
    """Keys of `CLASSES` that an item belongs to: its score fell clearly, or is poor, for that reason."""
    found: set[str | None] = set()
    for cell in row.cells:
        if cell.state != "ok":
            found.add("error")
        elif (cell.drop or 0.0) >= FALLEN - SAME or (cell.value is not None and cell.value < POOR):
            found.add(_class_of(cell.metric, scores.get((row.item.id, cell.metric))))
    return tuple(each.key for each in CLASSES if each.key in found)


def _class_of(metric: str, score: Score | None) -> str | None:
    if metric == "answer_relevance":
        claims = score.claims if score else ()
        return "refusal" if claims and all(claim.verdict != 1 for claim in claims) else "off-topic"
    return {
        "faithfulness": "unsupported",
        "context_recall": "retrieval",
        "context_precision": "retrieval",
    }.get(metric)


def why(row: ItemRow, scores: Scores, before: Scores | None = None) -> Why | None:
    """What the judge said where the item changed most, else where it is poor; `None` where there is nothing to say.

    With the scores of `before`, a claim that the judge used to hold for goes ahead of one that never did.
    """
    changed = [cell for cell in row.cells if cell.drop]
    errors = [cell for cell in row.cells if cell.error and cell.state != "ok"]
    poor = [cell for cell in row.cells if cell.value is not None and cell.value < POOR]
    if changed:
        fell = [cell for cell in changed if (cell.drop or 0.0) > 0]
        cell = max(fell or changed, key=lambda c: abs(c.drop or 0.0))
    elif errors:
        return Why(errors[0].metric, "", errors[0].error or "")
    elif poor:
        cell = min(poor, key=lambda c: c.value or 0.0)
    else:
        return None
    score = scores.get((row.item.id, cell.metric))
    old = (before or {}).get((row.item.id, cell.metric))
    claims, olds = (each.claims if each else () for each in (score, old))
    return said(cell.metric, claims, olds, better=(cell.drop or 0.0) < 0)


def said(
    metric: str, claims: Sequence[Claim], old: Sequence[Claim] = (), *, better: bool = False
) -> Why | None:
    """What the judge said against an answer, or for it where that got `better`; `None` where it gave no reason."""
    if metric == "answer_relevance":
        lowest = min(claims, key=lambda c: (c.verdict, c.similarity or 0.0), default=None)
        if lowest is None or better:
            return None
        if lowest.verdict != 1:
            return Why(metric, "", lowest.reason or "the answer commits itself to nothing")
        return Why(metric, "", f"it would rather answer: {lowest.text}") if lowest.text else None
    were = {_name(claim): claim.verdict for claim in old}
    fitting = [claim for claim in claims if claim.reason and (claim.verdict == 1) == better]
    turned = [claim for claim in fitting if were.get(_name(claim), claim.verdict) != claim.verdict]
    found = next(iter(turned or fitting), None)
    return Why(metric, _name(found), found.reason) if found else None


def _name(claim: Claim) -> str:
    return claim.text or (f"context {claim.context + 1}" if claim.context is not None else "")


class Passages:
    """The sentences of an item's contexts, to be searched for what a claim rests on."""

    def __init__(self, contexts: Sequence[str]) -> None:
        self._sentences = [
            (place, sentence.strip(), _content(sentence))
            for place, context in enumerate(contexts)
            for sentence in re.split(r"(?<=[.!?])\s+|\n+", context[:SEARCHED])
            if sentence.strip()
        ]

    def closest(self, claim: str) -> tuple[int, str] | None:
        """(index of the context, sentence) with most of the claim's words; `None` where none has half of them."""
        words = _content(claim)
        if not words:
            return None
        share, place, sentence = max(
            ((len(words & found) / len(words), -place, text) for place, text, found in self._sentences),
            key=lambda one: one[:2],
            default=(0.0, 0, ""),
        )
        return (-place, sentence) if share >= LIKE else None


def _content(text: str) -> set[str]:
    """The words that carry meaning: the longer ones and the numbers, cut to a stem of six letters."""
    return {word[:6] for word in re.findall(r"\w+", text.casefold()) if len(word) > 3 or word.isdigit()}
