"""Word overlap: the share of a text's content words that the contexts hold. A judge worth its time beats it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_COMMON = """
a about above after again all also am an and any are as at based be because been before being between
both but by can could did do does doing down during each few for from further given had has have having
he her here hers him his how i if in into is it its it's just may me might more most must my no nor not
of off on once only or other our out over own passage passages provided same shall she should so some
such than that the their them then there these they this those through to too under until up very was we
were what when where which while who whom why will with would you your
"""
_STOP = frozenset(_COMMON.split())
"""Words that any English text holds, and those by which an answer refers to its passages."""


def content_words(text: str) -> list[str]:
    """The words of `text` in lower case, without the common ones."""
    return [word for word in (m[0].lower() for m in _WORD.finditer(text)) if word not in _STOP]


def overlap(text: str, contexts: Iterable[str]) -> float:
    """Share of the content words of `text` that occur in the contexts; 1 where it has none."""
    known = {word for context in contexts for word in content_words(context)}
    words = content_words(text)
    return sum(word in known for word in words) / len(words) if words else 1.0
