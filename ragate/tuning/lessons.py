"""One call of a ragas metric with the answer that a good judge gives: prompt, schema, answer with loss weights.

The reason comes before the verdict. It does not depend on the label: it points at the passage's words nearest to the
statement, so that the verdict is decided at its own token and its probability is worth reading. Importing this module
imports ragas (seconds).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ragate.schemas import LEAST_CHARS, MOST_ITEMS, REASON_CHARS, STATEMENT_CHARS, answer_schema
from ragate.tuning.claims import Claim
from ragate.tuning.text import nearest, sentences, window

# after ragate.schemas, which keeps ragas quiet
from ragas.metrics.collections.answer_relevancy.util import (  # isort: skip
    AnswerRelevanceInput,
    AnswerRelevanceOutput,
    AnswerRelevancePrompt,
)
from ragas.metrics.collections.context_precision.util import (  # isort: skip
    ContextPrecisionInput,
    ContextPrecisionOutput,
    ContextPrecisionPrompt,
)
from ragas.metrics.collections.context_recall.util import (  # isort: skip
    ContextRecallInput,
    ContextRecallOutput,
    ContextRecallPrompt,
)
from ragas.metrics.collections.faithfulness.util import (  # isort: skip
    NLIStatementInput,
    NLIStatementOutput,
    NLIStatementPrompt,
    StatementGeneratorInput,
    StatementGeneratorOutput,
    StatementGeneratorPrompt,
)

CALLS = ("nli", "precision", "recall", "statements", "relevancy")

REASON_WORDS = 12
NOTHING_NEAR = "nearest: nothing"

FORCED, REASON, COPIED, FREE, VERDICT = 0.0, 0.03, 0.03, 0.1, 1.0
"""Loss weights: what the grammar forces, a reason, text to repeat, text to find words for, the verdict's digit."""

Pieces = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Lesson:
    """A call and the answer to learn."""

    call: str
    """One of CALLS."""
    prompt: str
    """What the judge sends as the user's message."""
    schema: str
    """The answer's JSON schema."""
    answer: Pieces
    """Pieces of the compact JSON answer with the loss weight of each."""
    source: str
    cluster: str
    label: int | None
    """The verdict; `None` where there are several or none."""
    kinds: tuple[str, ...]
    """How each verdict came about, in order."""

    @property
    def text(self) -> str:
        """The answer as one text."""
        return "".join(piece for piece, _ in self.answer)


def nli(passages: Sequence[str], claims: Sequence[Claim], source: str, cluster: str) -> Lesson:
    """Does each statement follow from the passages? The statements are constants of the schema."""
    context = "\n".join(passages)
    prompt = _NLI.to_string(NLIStatementInput(context=context, statements=[claim.text for claim in claims]))
    pieces: list[tuple[str, float]] = []
    for number, claim in enumerate(claims):
        opening = "},{" if number else '{"statements":[{'
        pieces += [
            (f'{opening}"statement":{_quoted(claim.text)},"reason":', FORCED),
            (f'"{pointer(claim.text, passages)}"', REASON),
            (',"verdict":', FORCED),
            (str(claim.label), VERDICT),
        ]
    pieces.append(("}]}", FORCED))
    return Lesson(
        "nli",
        prompt,
        answer_schema(NLIStatementOutput, prompt).text,
        tuple(pieces),
        source,
        cluster,
        claims[0].label if len(claims) == 1 else None,
        tuple(claim.kind for claim in claims),
    )


def precision(question: str, context: str, answer: str, claim: Claim, source: str, cluster: str) -> Lesson:
    """Was the context useful for the answer? `claim` has the label."""
    given = ContextPrecisionInput(question=question, context=context, answer=answer)
    prompt = _PRECISION.to_string(given)
    pieces = (
        ('{"reason":', FORCED),
        (f'"{pointer(f"{question} {answer}", [context])}"', REASON),
        (',"verdict":', FORCED),
        (str(claim.label), VERDICT),
        ("}", FORCED),
    )
    schema = answer_schema(ContextPrecisionOutput, prompt).text
    return Lesson("precision", prompt, schema, pieces, source, cluster, claim.label, (claim.kind,))


def recall(
    question: str, passages: Sequence[str], claims: Sequence[Claim], source: str, cluster: str
) -> Lesson:
    """Can each sentence of the reference, the claims in a row, be attributed to the passages?"""
    reference = " ".join(claim.text for claim in claims)
    given = ContextRecallInput(question=question, context="\n".join(passages), answer=reference)
    prompt = _RECALL.to_string(given)
    pieces: list[tuple[str, float]] = []
    for number, claim in enumerate(claims):
        pieces += [
            ("},{" if number else '{"classifications":[{', COPIED if number else FORCED),
            ('"statement":', FORCED),
            (f'"{as_statement(claim.text)}"', COPIED),
            (',"reason":', FORCED),
            (f'"{pointer(claim.text, passages)}"', REASON),
            (',"attributed":', FORCED),
            (str(claim.label), VERDICT),
        ]
    pieces += [("}]", COPIED), ("}", FORCED)]
    return Lesson(
        "recall",
        prompt,
        answer_schema(ContextRecallOutput, prompt).text,
        tuple(pieces),
        source,
        cluster,
        claims[0].label if len(claims) == 1 else None,
        tuple(claim.kind for claim in claims),
    )


def statements(question: str, answer: str, source: str, cluster: str) -> Lesson:
    """The answer taken apart: its sentences, so that nothing is lost and nothing is made up."""
    prompt = _STATEMENTS.to_string(StatementGeneratorInput(question=question, answer=answer))
    listed = ",".join(f'"{text}"' for text in statements_of(answer))
    pieces = (('{"statements":', FORCED), (f"[{listed}]", FREE), ("}", FORCED))
    schema = answer_schema(StatementGeneratorOutput, prompt).text
    return Lesson("statements", prompt, schema, pieces, source, cluster, None, ())


def relevancy(question: str, claim: Claim, source: str, cluster: str) -> Lesson:
    """The question that an answer (the claim's text) is for, and whether it evades it (the claim's label)."""
    prompt = _RELEVANCY.to_string(AnswerRelevanceInput(response=claim.text))
    pieces = (
        ('{"question":', FORCED),
        (f'"{as_statement(question)}"', COPIED),
        (',"noncommittal":', FORCED),
        (str(claim.label), VERDICT),
        ("}", FORCED),
    )
    schema = answer_schema(AnswerRelevanceOutput, prompt).text
    return Lesson("relevancy", prompt, schema, pieces, source, cluster, claim.label, (claim.kind,))


_NLI, _PRECISION, _RECALL = NLIStatementPrompt(), ContextPrecisionPrompt(), ContextRecallPrompt()
_STATEMENTS, _RELEVANCY = StatementGeneratorPrompt(), AnswerRelevancePrompt()


def pointer(claim: str, passages: Sequence[str]) -> str:
    """The reason of a verdict, whatever the verdict: the words of the passages nearest to the claim."""
    found = nearest(claim, passages)
    if not found:
        return NOTHING_NEAR
    text = as_statement(f"nearest: {window(found, claim, REASON_WORDS)}")
    return text if len(text) <= REASON_CHARS else text[:REASON_CHARS].rpartition(" ")[0]


def statements_of(answer: str) -> list[str]:
    """The sentences of an answer as the schema allows them: at most MOST_ITEMS, each within STATEMENT_CHARS.

    Too many are joined, the shortest neighbours first; what then is too much is left out at the end.
    """
    found = [part for piece in sentences(answer) for part in _parts(as_statement(piece, cut=False))]
    found = [part for part in found if len(part) >= LEAST_CHARS]
    while len(found) > MOST_ITEMS:
        at = min(range(len(found) - 1), key=lambda i: len(found[i]) + len(found[i + 1]))
        if len(found[at]) + len(found[at + 1]) >= STATEMENT_CHARS:
            break
        found[at : at + 2] = [f"{found[at]} {found[at + 1]}"]
    return found[:MOST_ITEMS]


def as_statement(text: str, *, cut: bool = True) -> str:
    """One line without quotes, backslashes and control characters, cut between words to STATEMENT_CHARS."""
    text = re.sub(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+", "", text.replace('"', "'").replace("\\", "/"))
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text.replace("**", "")).strip()
    return text[: STATEMENT_CHARS + 1].rpartition(" ")[0] if cut and len(text) > STATEMENT_CHARS else text


def _parts(text: str) -> list[str]:
    """A text in parts within STATEMENT_CHARS, cut after the last comma or else the last word that fits."""
    found = []
    while len(text) > STATEMENT_CHARS:
        head = text[:STATEMENT_CHARS]
        at = max(head.rfind(", "), head.rfind("; ")) + 1
        at = at if at > 60 else head.rfind(" ")
        at = at if at > 0 else STATEMENT_CHARS
        found.append(text[:at].strip())
        text = text[at:].strip()
    return [*found, text]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
