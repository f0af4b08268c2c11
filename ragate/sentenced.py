"""ragas' faithfulness over an answer's own sentences: the judge says what holds, and cuts nothing up itself.

Importing this module imports ragas (seconds).
"""

from __future__ import annotations

from ragate.judging.sentences import even_parts, sentences_of
from ragate.metrics import keep_quiet
from ragate.schemas import MOST_ITEMS

keep_quiet()

from ragas.metrics.collections import Faithfulness  # noqa: E402
from ragas.metrics.collections.faithfulness.util import NLIStatementOutput  # noqa: E402


class SentenceFaithfulness(Faithfulness):  # type: ignore[misc]
    """`ragas.metrics.collections.Faithfulness` with another first step; prompt, schema and score are ragas'."""

    async def _create_statements(self, question: str, response: str) -> list[str]:
        found = sentences_of(response)
        if not found:
            raise ValueError("the answer is blank: it has no sentence to judge")
        return found

    async def _create_verdicts(self, statements: list[str], context: str) -> NLIStatementOutput:
        """As few calls as judges are trained for, one after the other: their order is that of the answer."""
        judged = []
        for part in even_parts(statements, MOST_ITEMS):
            judged += (await super()._create_verdicts(list(part), context)).statements
        return NLIStatementOutput(statements=judged)
