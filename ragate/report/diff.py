"""What changed between two answers, word by word, and between two lists of retrieved contexts."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_WORDS = 600
"""Where more words than this lie between what both texts share at their ends, they count as replaced: comparing takes
the square of their number."""

# a run of white space, a word, a mark; each letter of a script without spaces is a word
_WORDS = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")

Kind = Literal["same", "lost", "added"]


class Piece(NamedTuple):
    """A stretch of text that both have, or only the old one, or only the new one."""

    kind: Kind
    text: str


class ContextChange(NamedTuple):
    """A retrieved context with its ranks, from 1; `None` where a side did not retrieve it."""

    text: str
    old: int | None
    new: int | None


def word_diff(old: str, new: str) -> list[Piece]:
    """The pieces in reading order; those that are same or added spell `new`, those same or lost spell `old`."""
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    head = _shared(before, after)
    tail = _shared(before[head:][::-1], after[head:][::-1])
    pieces = [Piece("same", "".join(after[:head]))]
    end_before, end_after = len(before) - tail, len(after) - tail
    pieces += _middle(before[head:end_before], after[head:end_after])
    pieces.append(Piece("same", "".join(after[end_after:])))
    return _joined(pieces)


def context_changes(old: Sequence[str], new: Sequence[str]) -> list[ContextChange]:
    """The new contexts in their order, then those that were lost; equal texts are one context."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(old, 1):
        ranks.setdefault(text.strip(), []).append(rank)
    changes = []
    for rank, text in enumerate(new, 1):
        known = ranks.get(text.strip())
        changes.append(ContextChange(text, known.pop(0) if known else None, rank))
    lost = sorted(rank for left in ranks.values() for rank in left)
    return changes + [ContextChange(old[rank - 1], rank, None) for rank in lost]


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many entries both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _middle(before: Sequence[str], after: Sequence[str]) -> list[Piece]:
    if max(len(before), len(after)) > MOST_WORDS:
        return [Piece("lost", "".join(before)), Piece("added", "".join(after))]
    pieces = []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(after[k:m])))
        else:
            pieces += [Piece("lost", "".join(before[i:j])), Piece("added", "".join(after[k:m]))]
    return pieces


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Without empty pieces or two alike in a row; a space between two changes belongs to both, so they read as one."""
    found: list[Piece] = []
    texts = {"same": "", "lost": "", "added": ""}

    def flush(*kinds: Kind) -> None:
        for kind in kinds:
            if texts[kind]:
                found.append(Piece(kind, texts[kind]))
            texts[kind] = ""

    whole = [piece for piece in pieces if piece.text]
    for at, piece in enumerate(whole):
        changing = bool(texts["lost"] or texts["added"])
        if piece.kind != "same":
            flush("same")
            texts[piece.kind] += piece.text
        elif changing and piece.text.isspace() and at + 1 < len(whole):
            texts["lost"] += piece.text
            texts["added"] += piece.text
        else:
            flush("lost", "added")
            texts["same"] += piece.text
    flush("same", "lost", "added")
    return found
