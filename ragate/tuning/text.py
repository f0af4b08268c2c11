"""Sentences, content words and overlap: what the recipe knows of a text.

No tagger and no parser: the recipe has to run wherever ragate does, and a rule that is wrong now and then is
wrong for both labels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

_SHORTENED = """
    mr mrs ms dr st sr jr vs etc e.g i.e no inc ltd co u.s u.k a.m p.m prof gen col lt sen rep gov capt fig approx
    dept est mt jan feb mar apr jun jul aug sep sept oct nov dec
"""
_ABBREVIATIONS = frozenset(_SHORTENED.split())
_BREAK = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=["'(\[]?[A-Z0-9#*-])|\n+|(?<=[a-z0-9)]\.)(?=[A-Z][A-Za-z])""")
_LAST_WORD = re.compile(r"([\w.]+)\.$")
_WORD = re.compile(r"[A-Za-z0-9]+(?:['.,][A-Za-z0-9]+)*")
_LITTLE = """
    a an the and or but if then than that this these those it its he she they them his her their there here is are was
    were be been being am do does did done has have had having will would can could may might shall should must of in
    on at by for with from to into onto as about over under between through during before after above below up down
    out off again not no nor so such only own same too very just also both each few more most other some any all what
    which who whom when where why how i you we me my your our us him because while until s t don said says according
    based provided given passage passages context however additionally furthermore overall mentioned stated states
"""
_STOP = frozenset(_LITTLE.split())


def sentences(text: str) -> list[str]:
    """The sentences of a text, stripped; a list marker such as `1.` stays with what follows it."""
    found: list[str] = []
    start = 0
    for match in _BREAK.finditer(text):
        piece = text[start : match.start()]
        last = _LAST_WORD.search(piece)
        spoken = last[1].lower() if last else ""
        inside = match[0].strip("\"')] ") == "" and "\n" not in match[0]
        if inside and (spoken in _ABBREVIATIONS or len(spoken) == 1 or piece.strip().rstrip(".").isdigit()):
            continue
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [piece for piece in found if any(c.isalnum() for c in piece)]


def sentences_in(passages: Iterable[str]) -> list[str]:
    """The sentences of all passages."""
    return [piece for passage in passages for piece in _sentences_of(passage)]


@lru_cache(maxsize=200_000)
def content_words(text: str) -> tuple[str, ...]:
    """The words that carry the meaning, lower case and cut to six letters so that inflections meet."""
    words = (match[0].lower() for match in _WORD.finditer(text))
    return tuple(word if word[0].isdigit() else word[:6] for word in words if word not in _STOP)


def words_of(texts: Iterable[str]) -> set[str]:
    """All content words of some texts."""
    return {word for text in texts for word in content_words(text)}


def overlap(claim: str, words: Collection[str]) -> float:
    """Share of the claim's content words that are among `words`; 1 for a claim without any."""
    own = content_words(claim)
    return sum(word in words for word in own) / len(own) if own else 1.0


def nearest(claim: str, passages: Sequence[str]) -> str:
    """The sentence of the passages that holds most of the claim's content words; the first of equals.

    Of two with as many, the shorter one. Empty where no sentence shares a word with the claim.
    """
    own = set(content_words(claim))
    best, score = "", (0, 0)
    for sentence in sentences_in(passages):
        found = (len(own & set(content_words(sentence))), -len(sentence))
        if found[0] and found > score:
            best, score = sentence, found
    return best


@lru_cache(maxsize=50_000)
def _sentences_of(passage: str) -> tuple[str, ...]:
    return tuple(sentences(passage))


def window(sentence: str, claim: str, words: int) -> str:
    """The run of at most `words` words of a sentence with most content words of the claim, the first of equals."""
    own = set(content_words(claim))
    parts = sentence.split()
    hits = [bool(own & set(content_words(part))) for part in parts]
    starts = range(max(1, len(parts) - words + 1))
    start = max(starts, key=lambda i: (sum(hits[i : i + words]), -i))
    return " ".join(parts[start : start + words])


def has(text: str, phrase: str) -> bool:
    """True where the phrase stands in the text as whole words, in this case."""
    return re.search(_whole(phrase), text) is not None


def replaced(text: str, old: str, new: str) -> str:
    """The text with every whole-word `old` made `new`."""
    return re.sub(_whole(old), lambda _: new, text)


def _whole(phrase: str) -> str:
    return rf"(?<![\w-]){re.escape(phrase)}(?![\w-]|[.,]\d)"
