"""What a judge is asked about a labelled answer, and what it said, as data: needs neither ragas nor a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from ragate.errors import RunError
from ragate.judging.labelled import Labelled, Subject
from ragate.judging.overlap import content_words, overlap
from ragate.run import Frozen

Call = Literal["statements", "nli", "precision"]
"""ragas' prompts: cut an answer into statements, judge statements by the contexts, judge one context."""


SMALLEST = 1e-6
"""What a P is at least in a product: probabilities come with 6 decimals."""
CALLS: dict[Subject, Call] = {"faithfulness": "nli", "relevance": "precision"}
"""The call that judges what is labelled."""


class Ask(Frozen):
    """One call to be made."""

    id: str
    """Unique among the asks of a file."""
    item: str
    call: Call
    part: int
    """Which of the item's calls of this kind; of `precision`, which context."""
    prompt: str
    """ragas' own text: the user's message."""


class Said(Frozen):
    """One verdict of the judge."""

    text: str
    """The statement, or the context."""
    verdict: int
    probability: float
    """P(verdict = 1); the verdict itself where the judge gives no probabilities."""
    reason: str


Key = tuple[Call, str, int]
"""Which verdicts: of which call, item and part."""


class Heard(NamedTuple):
    """What a judge said to many asks."""

    said: dict[Key, tuple[Said, ...]]
    failed: dict[str, str]
    """Item -> why a call of it has no answer."""


class Row(Frozen):
    """One labelled thing, an answer or a context, with all that was found about it; higher scores speak for label 1."""

    id: str
    label: int
    soft: float
    """P(verdict = 1): of an answer the product over its statements, as if they were independent: all must hold."""
    least: float
    """The least P over the statements: at 0.5, the judge's own verdict on the whole answer."""
    mean: float
    """Mean of P over the statements."""
    hard: float
    """Share of verdicts 1, as ragas scores an answer."""
    overlap: float
    """Share of content words found: the answer's in the contexts, or the context's in the answer."""
    brevity: float
    """Minus the number of content words."""
    generator: str
    cluster: str
    question: str
    answer: str
    said: tuple[Said, ...]


def said_of(call: Call, output: str, verdicts: Sequence[float | None], text: str = "") -> tuple[Said, ...]:
    """The verdicts in an answer of the judge; `text` is the context of a `precision` call. Raises ValueError."""
    data = json.loads(output)
    judged = data["statements"] if call == "nli" else [{"statement": text, **data}]
    return tuple(
        Said(
            text=each["statement"],
            verdict=each["verdict"],
            probability=each["verdict"] if probability is None else probability,
            reason=each["reason"],
        )
        for each, probability in zip(judged, verdicts, strict=True)
    )


def answer_row(item: Labelled, said: Sequence[Said]) -> Row:
    """The row of an answer's faithfulness. Raises RunError where nothing was judged."""
    if not said or item.faithful is None:
        raise RunError(f"item {item.id}: nothing was judged, or there is no label to hold it against")
    return Row(
        id=item.id,
        label=item.faithful,
        soft=math.prod(max(each.probability, SMALLEST) for each in said),
        least=min(each.probability for each in said),
        mean=sum(each.probability for each in said) / len(said),
        hard=sum(each.verdict for each in said) / len(said),
        overlap=overlap(item.answer, item.contexts),
        brevity=-float(len(content_words(item.answer))),
        generator=item.generator,
        cluster=item.cluster,
        question=item.question,
        answer=item.answer,
        said=tuple(said),
    )


def context_row(item: Labelled, index: int, said: Said) -> Row:
    """The row of one context's usefulness; its group, for AUROC within, is the item. Raises RunError: no label."""
    if item.context_relevant is None:
        raise RunError(f"item {item.id}: there is no label of its contexts to hold a verdict against")
    context = item.contexts[index]
    return Row(
        id=f"{item.id}#{index}",
        label=item.context_relevant[index],
        soft=said.probability,
        least=said.probability,
        mean=said.probability,
        hard=said.verdict,
        overlap=overlap(item.answer, [context]),
        brevity=-float(len(content_words(context))),
        generator=item.id,
        cluster=item.cluster,
        question=item.question,
        answer=item.answer,
        said=(said,),
    )


def rows_of(
    items: Sequence[Labelled], subject: Subject, said: Mapping[Key, Sequence[Said]]
) -> tuple[list[Row], list[str]]:
    """(rows in the items' order, ids of what has no verdict); `said` has the verdicts.

    An answer needs all its parts: `said` must hold none of an item of which one failed.
    """
    call = CALLS[subject]
    parts: dict[str, list[int]] = {}
    for kind, name, part in sorted(said):
        if kind == call:
            parts.setdefault(name, []).append(part)
    rows: list[Row] = []
    missing: list[str] = []
    for item in items:
        found = parts.get(item.id, [])
        if subject == "faithfulness":
            if found:
                rows.append(answer_row(item, [each for part in found for each in said[call, item.id, part]]))
            else:
                missing.append(item.id)
            continue
        rows += [context_row(item, part, said[call, item.id, part][0]) for part in found]
        missing += [f"{item.id}#{i}" for i in range(len(item.contexts)) if i not in found]
    return rows, missing
