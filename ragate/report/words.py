"""How a metric and its claims are spoken of in reports."""

from __future__ import annotations

from typing import NamedTuple


class MetricWords(NamedTuple):
    """How a metric and its claims are spoken of."""

    title: str
    asks: str
    yes: str
    no: str
    claim: str


WORDS = {
    "context_precision": MetricWords(
        "Context precision",
        "Are the useful contexts ranked first?",
        "useful",
        "not useful",
        "Retrieved context",
    ),
    "context_recall": MetricWords(
        "Context recall",
        "Do the contexts cover the reference answer?",
        "covered",
        "not covered",
        "Sentence of the reference",
    ),
    "faithfulness": MetricWords(
        "Faithfulness",
        "Do the contexts support what the answer says?",
        "supported",
        "unsupported",
        "Statement of the answer",
    ),
    "answer_relevance": MetricWords(
        "Answer relevance",
        "Does the answer address the question?",
        "committal",
        "noncommittal",
        "Question that the answer would answer",
    ),
}


def words_of(metric: str) -> MetricWords:
    """The words for a metric; plain ones for one that is not known."""
    title = metric.replace("_", " ").capitalize()
    return WORDS.get(metric) or MetricWords(title, "", "yes", "no", "Claim")
