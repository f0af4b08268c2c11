"""Claims about what the passages do not say: bare refusals, which hold whatever they say, and missing subjects.

People do not call a refusal unsupported, and language models end many answers with one; a judge that never saw one as a
claim calls them all made up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ragate.tuning.edits import names_in
from ragate.tuning.fillers import Subject, filler
from ragate.tuning.text import content_words, words_of

_THEIRS = "the |the given |the provided |the available |these |your "
_TEXTS = "passages|passages|documents|sources|context passages"

GRAMMAR: dict[str, tuple[str, ...]] = {
    "refusal": (
        "Unable to answer based on given passages.",
        "{lead}unable to answer based on {texts}.",
        "{lead}I am unable to answer {this} based on {texts}.",
        "{lead}I cannot {answer} {this} based on {texts}.",
        "{lead}it is not possible to answer {this} from {texts}.",
        "{lead}{texts} do not contain enough information to answer {this}.",
        "{lead}{texts} do not contain the necessary information to answer {this}.",
        "{lead}there is not enough information in {texts} to answer {this}.",
        "{lead}I do not have enough information to answer {this}.",
        "{lead}I cannot provide a response based on {texts}.",
    ),
    "absence": (
        "{lead}{texts} do not {say} anything about {topic}.",
        "{lead}{texts} do not mention {topic}.",
        "{lead}{texts} do not provide information {about} {topic}.",
        "{lead}there is no mention of {topic} in {texts}.",
        "{lead}there is no information {about} {topic} in {texts}.",
        "{lead}no information {about} {topic} is given in {texts}.",
        "Note that {texts} do not {say} anything about {topic}.",
    ),
    "lead": ("", "", "", "However, ", "Therefore, ", "Unfortunately, ", "Additionally, ", "Note: "),
    "texts": tuple(f"{whose}{what}" for whose in _THEIRS.split("|") for what in _TEXTS.split("|")),
    "this": ("this question", "the question", "your question", "this"),
    "answer": ("answer", "respond to"),
    "say": ("say", "state", "specify"),
    "about": ("about", "on", "regarding"),
}
"""Symbol -> its wordings, with other symbols in braces; `topic` is filled in."""
MISSING = 0.55
"""Share of the claims of absence that hold."""


def refusal(rng: random.Random) -> str:
    """A sentence that says that the question cannot be answered, and nothing else."""
    return filler("refusal", Subject("", "", ()), rng, GRAMMAR)


def absence(passages: Sequence[str], others: Sequence[str], rng: random.Random) -> tuple[str, int] | None:
    """`The passages do not mention X.` and whether that is so: X is a name of the passages, or of the `others` alone.

    `None` where there is no such name.
    """
    missing = rng.random() < MISSING
    known = words_of(passages)
    names = dict.fromkeys(names_in(" ".join(others if missing else passages)))
    fit = [name for name in names if (words := content_words(name)) and known.isdisjoint(words) == missing]
    if not fit:
        return None
    return filler("absence", Subject(rng.choice(fit), "", ()), rng, GRAMMAR), int(missing)
