"""The four ragas metrics as a table: what each needs of an item, its ragas class, how its calls are read."""

from __future__ import annotations

import json
import math
import os
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ragate.errors import ConfigError
from ragate.judging.sentences import WAY, even_parts, sentences_of
from ragate.run import Claim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ragate.journal import CallEntry
    from ragate.run import ItemRecord

    Vectors = Callable[[str], Sequence[float]]
    """Embedding of a text that a metric has embedded before."""


Statements = Literal["judge", "sentences"]
"""What cuts an answer into statements: the judge, as ragas has it, or `sentences_of`."""
INPUT_MARK = "Now perform the same with the following input\ninput: "
"""In a ragas prompt, instruction, schema and examples come before it and the item after it."""


@dataclass(frozen=True)
class JudgedCall:
    """A call as one metric saw it: the ragas output model it filled, the prompt, what the journal keeps."""

    model: str
    prompt: str
    entry: CallEntry


@dataclass
class Record:
    """What happened while one metric scored one item; `ragate.judge` adds each call."""

    metric: str
    item: str
    calls: list[JudgedCall] = field(default_factory=list)


RECORD: ContextVar[Record | None] = ContextVar("ragate_record", default=None)
"""The score being made in this task: labels every call that ragas makes on its behalf."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    ragas: str
    """Class in `ragas.metrics.collections`."""
    needs: tuple[str, ...]
    """Fields of an item."""
    claims: Callable[[Record, ItemRecord, Vectors], tuple[Claim, ...]]
    calls: Callable[[int, str], int]
    """Calls for an item with this many contexts and this answer: the estimate behind the progress bar."""
    embeds: bool = False
    cut: str | None = None
    """How an answer becomes statements where the judge does not cut it up itself: part of the fingerprint."""

    def missing(self, item: ItemRecord) -> str | None:
        """The first field this metric needs and `item` lacks, or `None`."""
        return next((name for name in self.needs if not getattr(item, name)), None)

    def row(self, item: ItemRecord) -> dict[str, Any]:
        """The keyword arguments of ragas' `ascore` for `item`."""
        values = {name: getattr(item, name) for name in self.needs}
        return {_RAGAS_NAMES[k]: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def scorer(self, llm: Any, embeddings: Any = None) -> Any:
        """ragas' own metric object over our judge. Imports ragas (seconds)."""
        keep_quiet()
        if self.cut:
            from ragate.sentenced import SentenceFaithfulness

            return SentenceFaithfulness(llm)
        from ragas.metrics import collections

        parts = {"llm": llm, "embeddings": embeddings} if self.embeds else {"llm": llm}
        return getattr(collections, self.ragas)(**parts)


_RAGAS_NAMES = {
    "question": "user_input",
    "answer": "response",
    "contexts": "retrieved_contexts",
    "reference": "reference",
}


def keep_quiet() -> None:
    """Switch off the telemetry of ragas and its dependencies; must run before ragas is imported."""
    for name, value in (
        ("RAGAS_DO_NOT_TRACK", "true"),
        ("LANGSMITH_TRACING", "false"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ):
        os.environ[name] = value


def value_of(score: float) -> float | None:
    """ragas' score within [0, 1], or `None` for NaN.

    Only answer relevance can leave it: a mean of cosines may be below 0 or 1e-16 above 1.
    """
    return None if math.isnan(score) else min(max(score, 0.0), 1.0)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine of the angle between two vectors."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def _statements(record: Record, model: str, list_name: str, verdict_name: str) -> tuple[Claim, ...]:
    """The claims of the record's calls for `model`, whose output is a list of {statement, reason, verdict}."""
    return tuple(
        Claim(
            text=judged["statement"],
            verdict=judged[verdict_name],
            probability=probability,
            reason=judged["reason"],
        )
        for call in record.calls
        if call.model == model
        for judged, probability in zip(
            json.loads(call.entry.output)[list_name], call.entry.verdicts, strict=True
        )
    )


def _faithfulness(record: Record, item: ItemRecord, vectors: Vectors) -> tuple[Claim, ...]:
    return _statements(record, "NLIStatementOutput", "statements", "verdict")


def _sentence_calls(contexts: int, answer: str) -> int:
    from ragate.schemas import MOST_ITEMS

    return max(1, len(even_parts(sentences_of(answer), MOST_ITEMS)))


def _context_recall(record: Record, item: ItemRecord, vectors: Vectors) -> tuple[Claim, ...]:
    return _statements(record, "ContextRecallOutput", "classifications", "attributed")


def _context_precision(record: Record, item: ItemRecord, vectors: Vectors) -> tuple[Claim, ...]:
    claims = []
    for index, call in enumerate(record.calls):
        judged, (probability,) = json.loads(call.entry.output), call.entry.verdicts
        claims.append(
            Claim(
                text="",
                verdict=judged["verdict"],
                probability=probability,
                reason=judged["reason"],
                context=index,
            )
        )
    return tuple(claims)


def _answer_relevance(record: Record, item: ItemRecord, vectors: Vectors) -> tuple[Claim, ...]:
    claims = []
    for entry in {call.entry.key: call.entry for call in record.calls}.values():  # equal prompts: one claim
        judged, (evasive,) = json.loads(entry.output), entry.verdicts
        claims.append(
            Claim(
                text=judged["question"],
                verdict=int(not judged["noncommittal"]),
                probability=None if evasive is None else round(1 - evasive, 6),
                similarity=round(cosine(vectors(item.question), vectors(judged["question"])), 6),
            )
        )
    return tuple(claims)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="context_precision",
            ragas="ContextPrecision",
            needs=("question", "reference", "contexts"),
            claims=_context_precision,
            calls=lambda contexts, answer: contexts,
        ),
        Metric(
            name="context_recall",
            ragas="ContextRecall",
            needs=("question", "contexts", "reference"),
            claims=_context_recall,
            calls=lambda contexts, answer: 1,
        ),
        Metric(
            name="faithfulness",
            ragas="Faithfulness",
            needs=("question", "answer", "contexts"),
            claims=_faithfulness,
            calls=lambda contexts, answer: 2,
        ),
        Metric(
            name="answer_relevance",
            ragas="AnswerRelevancy",
            needs=("question", "answer"),
            claims=_answer_relevance,
            calls=lambda contexts, answer: 3,
            embeds=True,
        ),
    )
}


def way_of(fingerprint: Mapping[str, str]) -> Statements:
    """What cut the answers up in a run with this fingerprint."""
    return "sentences" if "statements" in fingerprint else "judge"


def metrics_named(names: Iterable[str], statements: Statements = "judge") -> tuple[Metric, ...]:
    """The rows for `names`, in that order and each once; ragas' spelling `answer_relevancy` is understood.

    With `statements` by sentences faithfulness takes those of the answer. Raises ConfigError for an unknown name or for
    none at all.
    """
    chosen: dict[str, Metric] = {}
    for name in names:
        metric = METRICS.get("answer_relevance" if name == "answer_relevancy" else name)
        if metric is None:
            raise ConfigError(f"metrics: there is no metric {name!r}; choose from {', '.join(METRICS)}")
        if statements == "sentences" and metric.name == "faithfulness":
            metric = replace(metric, cut=WAY, calls=_sentence_calls)
        chosen[metric.name] = metric
    if not chosen:
        raise ConfigError(f"metrics: none named; choose from {', '.join(METRICS)}")
    return tuple(chosen.values())
