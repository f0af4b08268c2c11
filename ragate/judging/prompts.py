"""ragas' own prompts and output models for what a judge is asked about a labelled answer.

Importing this module imports ragas (seconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ragate.judging.asks import Ask, Call
from ragate.judging.labelled import Labelled, Subject
from ragate.judging.sentences import even_parts, sentences_of
from ragate.metrics import keep_quiet
from ragate.schemas import MOST_ITEMS

keep_quiet()

from ragas.metrics.collections.context_precision.util import (  # noqa: E402
    ContextPrecisionInput,
    ContextPrecisionOutput,
    ContextPrecisionPrompt,
)
from ragas.metrics.collections.faithfulness.util import (  # noqa: E402
    NLIStatementInput,
    NLIStatementOutput,
    NLIStatementPrompt,
    StatementGeneratorInput,
    StatementGeneratorOutput,
    StatementGeneratorPrompt,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

MODELS: dict[Call, type[BaseModel]] = {
    "statements": StatementGeneratorOutput,
    "nli": NLIStatementOutput,
    "precision": ContextPrecisionOutput,
}
"""ragas' output model of each call."""


def nli_asks(item: Labelled, statements: Sequence[str]) -> list[Ask]:
    """Are these statements supported by the item's contexts? As few calls as the schema allows."""
    prompt = NLIStatementPrompt()
    context = "\n".join(item.contexts)  # as ragas joins them
    return [
        _ask(item, "nli", i, prompt.to_string(NLIStatementInput(context=context, statements=list(part))))
        for i, part in enumerate(even_parts(statements, MOST_ITEMS))
    ]


def statements_ask(item: Labelled) -> Ask:
    """Which statements does the answer make?"""
    data = StatementGeneratorInput(question=item.question, answer=item.answer)
    return _ask(item, "statements", 0, StatementGeneratorPrompt().to_string(data))


def precision_asks(item: Labelled) -> list[Ask]:
    """Was this context useful for the answer? One call a context."""
    prompt = ContextPrecisionPrompt()
    return [
        _ask(
            item,
            "precision",
            i,
            prompt.to_string(
                ContextPrecisionInput(question=item.question, context=context, answer=item.answer)
            ),
        )
        for i, context in enumerate(item.contexts)
    ]


def asks_of(item: Labelled, subject: Subject) -> list[Ask]:
    """All calls for an item, the answer cut into sentences by us."""
    return nli_asks(item, sentences_of(item.answer)) if subject == "faithfulness" else precision_asks(item)


def _ask(item: Labelled, call: Call, part: int, prompt: str) -> Ask:
    return Ask(id=f"{item.id}/{call}/{part}", item=item.id, call=call, part=part, prompt=prompt)
