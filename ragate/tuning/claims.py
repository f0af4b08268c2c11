"""A case as a scene: passages and claims about them, some supported and some not, with the reason known.

A claim is unsupported because a language model would have added it, because somebody labelled it so, because another
case says it, because what it rests on is taken out of the passages, or because it says something else than they do.
Wordings are shared: now and then the passages are made to say what is mostly unsupported.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ragate.judging.sentences import even_parts
from ragate.schemas import MOST_ITEMS
from ragate.tuning.absence import absence, refusal
from ragate.tuning.edits import (
    Names,
    changed,
    crossed,
    edits_of,
    is_within,
    names_in,
    negated,
    overstated,
    repeats,
    rests_on,
    reworded,
    without_support,
)
from ragate.tuning.fillers import KINDS, Subject, filler, subject_of
from ragate.tuning.sources import EVASIVE, Case, statements_in
from ragate.tuning.text import (
    content_words,
    has,
    nearest,
    overlap,
    replaced,
    sentences,
    sentences_in,
    words_of,
)
from ragate.tuning.wording import dressed, lowered, told

WHOLE = 0.42
"""Share of the scenes that are a whole answer, sentence by sentence, where the case has one."""

KEPT_OUT = {"addition": 0.6, "foreign": 1.0, "labelled": 0.85}
"""Share of the unsupported claims that stay so; the passages are made to say the others."""
FILLER_KEPT_OUT = 0.5


@dataclass(frozen=True)
class Claim:
    """One statement and whether the passages support it."""

    text: str
    label: int
    kind: str
    """How the label came about."""


@dataclass(frozen=True)
class Scene:
    """Passages, and claims about them in the order of an answer."""

    case: Case
    neighbour: Case
    passages: tuple[str, ...]
    claims: tuple[Claim, ...]
    whole: bool
    """The claims are one answer, in its order."""


def scene_of(case: Case, neighbour: Case, names: Names, rng: random.Random) -> Scene:
    """A scene of a case; what is foreign in it comes from a neighbour, a case on a near subject."""
    subject = subject_of(case.question, case.passages)
    if rng.random() < WHOLE and (answer := whole_answer(case)):
        return _answer_scene(case, answer, neighbour, subject, rng)
    passages = list(case.passages)
    claims = [Claim(text, 1, "as written") for text in _reworded_first(case, rng)[:6]]
    for text in extracts(case, rng, rng.choice((0, 1, 2, 2)) if claims else 4):
        said = told(text, rng)
        if said != text or rng.random() < 0.3:
            claims.append(Claim(said, 1, "from the passages" if said == text else "paraphrased"))
    rng.shuffle(claims)
    if rng.random() < 0.25:
        passages, claims = _remove(passages, claims, neighbour, rng)
    elif rng.random() < 0.35:
        passages, claims = _cut(passages, claims, rng)
    if rng.random() < 0.3:
        passages, claims = _change_passages(passages, claims, names, rng)
    if rng.random() < 0.05:
        passages, claims = _negate_passages(passages, claims, rng)
    claims = [_change(claim, passages, names, rng) if rng.random() < 0.07 else claim for claim in claims]
    passages, claims = _extend(passages, claims, subject, rng)
    for text, kind in _strange(case, neighbour, subject, rng):
        if kind.startswith("filler") or not is_within(text, passages):
            passages, claim = _place(text, kind, passages, rng)
            claims.insert(rng.randint(0, len(claims)), claim)
    claims = _merge(claims, passages, neighbour, rng)
    claims = [_dress(claim, subject.topic, passages, rng) for claim in claims]
    return Scene(case, neighbour, tuple(passages), tuple(claims), whole=False)


def unsaid(scene: Scene, rng: random.Random) -> Claim:
    """A refusal, or a claim that the passages do not mention what they do or what the neighbour's do."""
    found = absence(scene.passages, scene.neighbour.passages, rng) if rng.random() < 0.6 else None
    return Claim(refusal(rng), 1, "refusal") if found is None else Claim(*found, "absence")


def _reworded_first(case: Case, rng: random.Random) -> list[str]:
    """The case's supported sentences in random order, those that share fewer words with the passages sooner."""
    words = words_of(case.passages)
    sure = [
        text for text in case.supported if not EVASIVE.search(text)
    ]  # what is not said cannot be taken away
    return sorted(sure, key=lambda text: -(rng.random() ** (1 / (1.1 - overlap(text, words)) ** 2)))


def whole_answer(case: Case) -> list[str]:
    """The sentences of the case's answer in order, where each is known to be supported; else none."""
    said = statements_in(case.answer)
    return said if len(said) > 1 and set(said) <= set(case.supported) else []


def _answer_scene(
    case: Case, answer: list[str], neighbour: Case, subject: Subject, rng: random.Random
) -> Scene:
    """An answer as it is, or with one or two sentences of another origin where they could stand."""
    passages = list(case.passages)
    claims = [Claim(text, 1, "whole answer") for text in rng.choice(even_parts(answer, MOST_ITEMS - 2))]
    if rng.random() < 0.25:
        claims = [replace(c, text=reworded(c.text, rng)) for c in claims]
    if rng.random() < 0.15:
        passages, claims = _cut(passages, claims, rng)
    elif rng.random() < 0.6:
        for text, kind in _strange(case, neighbour, subject, rng)[:2]:
            if is_within(text, passages) and not kind.startswith("filler"):
                continue
            at = len(claims) if "closing" in kind else rng.randint(1, len(claims)) if claims else 0
            claims.insert(at, Claim(text, 0, kind))
        passages, claims = _extend(passages, claims, subject, rng)
    if claims and rng.random() < 0.3:
        claims[0] = _dress(claims[0], subject.topic, passages, rng)
    return Scene(case, neighbour, tuple(passages), tuple(claims), whole=True)


def _strange(case: Case, neighbour: Case, subject: Subject, rng: random.Random) -> list[tuple[str, str]]:
    """Sentences that the passages most likely do not support, with their kind, in any order."""
    found = [
        (text, "labelled")
        for text in rng.sample(case.unsupported, min(rng.choice((0, 1, 1, 2)), len(case.unsupported)))
    ]
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        kind = rng.choice(KINDS)
        found.append((filler(kind, subject, rng), f"filler: {kind}"))
    strange = rng.sample(neighbour.supported, min(2, len(neighbour.supported)))
    strange += [told(text, rng) for text in extracts(neighbour, rng, 1)]
    strange = [_adapted(text, case.passages, rng) for text in strange]
    words = words_of(case.passages)
    found += [
        (text, "foreign") for text in strange if rng.random() < (0.16 if overlap(text, words) > 0.2 else 0.04)
    ]
    rng.shuffle(found)
    return found


def _adapted(text: str, passages: Sequence[str], rng: random.Random) -> str:
    """A foreign sentence about the names of these passages."""
    here = Counter(names_in(" ".join(passages)))
    names = [name for name, count in here.items() if count > 1 and name.isascii() and "'" not in name]
    for name in list(dict.fromkeys(names_in(text)))[:2]:
        alike = [each for each in names if len(each.split()) == len(name.split()) and not has(text, each)]
        if alike and name not in here:
            text = replaced(text, name, rng.choice(alike))
    return text


def _extend(
    passages: list[str], claims: list[Claim], subject: Subject, rng: random.Random
) -> tuple[list[str], list[Claim]]:
    """Here and there behind a supported claim a purpose, reason or benefit that no passage has."""
    found = []
    for claim in claims:
        if claim.label and len(claim.text) <= 170 and rng.random() < 0.18:
            text = claim.text.rstrip(".") + filler("addition", subject, rng) + "."
            passages, claim = _place(text, "addition", passages, rng)
        found.append(claim)
    return passages, found


def _cut(passages: list[str], claims: list[Claim], rng: random.Random) -> tuple[list[str], list[Claim]]:
    """Leave out a passage, or half of one; claims that lose a part of their words only are left out as well."""
    at = rng.randrange(len(passages))
    pieces = sentences(passages[at])
    half = len(pieces) // 2
    kept = pieces[:half] if rng.random() < 0.5 else pieces[half:]
    rest = [*passages[:at], *([" ".join(kept)] if half and rng.random() < 0.5 else []), *passages[at + 1 :]]
    if not rest:
        return passages, claims
    before, after = words_of(passages), words_of(rest)
    left = []
    for claim in claims:
        had, has_still = overlap(claim.text, before), overlap(claim.text, after)
        if has_still >= had - 0.02 or EVASIVE.search(claim.text):
            left.append(claim)
        elif has_still <= min(0.65, had - 0.25):
            left.append(Claim(claim.text, 0, "context cut"))
    return rest, left


def _remove(
    passages: list[str], claims: list[Claim], neighbour: Case, rng: random.Random
) -> tuple[list[str], list[Claim]]:
    """Take the support of one claim out of the passages; what a neighbour says comes in for it."""
    for claim in rng.sample(claims, len(claims)):
        found = without_support(claim.text, passages)
        if found is None:
            continue
        rest, gone = found
        left = []
        for each in claims:
            lost = any(rests_on(each.text, sentence) for sentence in gone)
            if lost and not is_within(each.text, rest):
                left.append(Claim(each.text, 0, "support removed"))
            elif not lost or each.kind == "support removed":
                left.append(each)  # a claim that may have lost some of its support is left out
        room = sum(map(len, gone))
        fill = [text for text in neighbour.passages if len(text) < 2 * room + 200]
        if fill:
            rest.insert(rng.randint(0, len(rest)), rng.choice(fill))
        return rest, left
    return passages, claims


def _change_passages(
    passages: list[str], claims: list[Claim], names: Names, rng: random.Random
) -> tuple[list[str], list[Claim]]:
    """Swap a phrase in the passages; of the claims with that phrase some follow, and some no longer hold."""
    whole = [claim for claim in claims if claim.label]
    if not whole:
        return passages, claims
    chosen = rng.choice(whole)
    edits = edits_of(chosen.text, passages, names, rng)
    if not edits:
        return passages, claims
    edit = rng.choice(edits)
    new = changed(passages, chosen.text, edit)
    moved = set(sentences_in(new)) - set(sentences_in(passages))
    still = [sentence for sentence in sentences_in(new) if sentence not in moved]
    left = []
    for claim in claims:
        if not claim.label or not has(claim.text, edit.old):
            left.append(claim)
        elif not any(rests_on(replaced(claim.text, edit.old, edit.new), sentence) for sentence in moved):
            left += [] if claim is chosen else [claim]
        elif rng.random() < 0.5:
            if not any(repeats(claim.text, sentence) for sentence in still):  # said twice, in other words
                left.append(Claim(claim.text, 0, f"{edit.kind} changed in the passages"))
        else:
            text = replaced(claim.text, edit.old, edit.new)
            left.append(Claim(text, 1, f"{edit.kind} changed in both"))
    return new, left


def _negate_passages(
    passages: list[str], claims: list[Claim], rng: random.Random
) -> tuple[list[str], list[Claim]]:
    """Negate the sentence that a claim repeats; the claim no longer holds, or is negated with it."""
    for claim in rng.sample(claims, len(claims)):
        near = nearest(claim.text, passages)
        own, words = set(content_words(claim.text)), set(content_words(near))
        other, denied = negated(near), negated(claim.text)
        if not claim.label or other is None or denied is None or len(own & words) < 0.75 * len(own):
            continue
        if len(words) > 1.6 * len(own):  # the `not` may belong to something else that it says
            continue
        left = [each for each in claims if each is claim or not rests_on(each.text, near)]
        new = (
            Claim(claim.text, 0, "negated in the passages")
            if rng.random() < 0.5
            else Claim(denied, 1, "negated in both")
        )
        return (
            [passage.replace(near, other) for passage in passages],
            [new if each is claim else each for each in left],
        )
    return passages, claims


def _change(claim: Claim, passages: list[str], names: Names, rng: random.Random) -> Claim:
    """A supported claim made to say something else; as it was where nothing offers itself."""
    if claim.kind not in ("as written", "from the passages"):
        return claim
    edits = edits_of(claim.text, passages, names, rng)
    ways = [(f"{e.kind} changed in the claim", replaced(claim.text, e.old, e.new)) for e in edits]
    ways += [
        (kind, text)
        for kind, text in (
            ("overstated", overstated(claim.text, rng)),
            ("names crossed", crossed(claim.text, rng)),
            ("negated in the claim", negated(claim.text) if rng.random() < 0.4 else None),
        )
        if text is not None
    ]
    kind, text = rng.choice(ways) if ways else (claim.kind, claim.text)
    return claim if text == claim.text else Claim(text, 0, kind)


def _place(text: str, kind: str, passages: list[str], rng: random.Random) -> tuple[list[str], Claim]:
    """A claim that the passages do not support, or that they do because they are made to say it."""
    if rng.random() < KEPT_OUT.get(kind, FILLER_KEPT_OUT):
        return passages, Claim(text, 0, kind)
    at = rng.randrange(len(passages))
    pieces = sentences(passages[at])
    pieces.insert(rng.randint(0, len(pieces)), told(text, rng))
    said = [*passages[:at], " ".join(pieces), *passages[at + 1 :]]
    return said, Claim(text, 1, f"{kind}, put into the passages")


def _merge(claims: list[Claim], passages: Sequence[str], neighbour: Case, rng: random.Random) -> list[Claim]:
    """Now and then two claims in one sentence, which holds where both do; or a claim with a foreign addition."""
    found: list[Claim] = []
    for claim in claims:
        if found and len(found[-1].text) + len(claim.text) < 260 and rng.random() < 0.12:
            last = found.pop()
            both = int(last.label and claim.label)
            kind = "merged, both hold" if both else "merged, one does not hold"
            found.append(Claim(_joined(last.text, claim.text, passages, rng), both, kind))
        elif claim.label and neighbour.supported and rng.random() < 0.03:
            added = rng.choice(neighbour.supported)
            found.append(Claim(_joined(claim.text, added, passages, rng), 0, "foreign addition"))
        else:
            found.append(claim)
    return found


def _joined(one: str, other: str, passages: Sequence[str], rng: random.Random) -> str:
    link = rng.choice((", and ", "; ", ", while ", ". Additionally, ", " "))
    return f"{one} {other}" if link == " " else f"{one.rstrip('.')}{link}{lowered(other, passages)}"


def _dress(claim: Claim, topic: str, passages: Sequence[str], rng: random.Random) -> Claim:
    """The claim in the words of a language model."""
    text = reworded(claim.text, rng) if rng.random() < 0.4 else claim.text
    return replace(claim, text=dressed(text, topic, passages, rng))


def extracts(case: Case, rng: random.Random, count: int) -> list[str]:
    """Sentences of the passages themselves, of the length of an answer's."""
    pieces = [piece for piece in sentences_in(case.passages) if 6 <= len(piece.split()) <= 35]
    pieces = [piece for piece in pieces if piece[-1] == "." and piece[0].isupper()]
    return rng.sample(pieces, min(count, len(pieces)))


@lru_cache(maxsize=100_000)
def _subject_words(question: str, passage: str) -> frozenset[str]:
    return frozenset((*content_words(question), *content_words(passage)))


def neighbour_of(case: Case, others: Sequence[Case], rng: random.Random) -> Case:
    """Of some cases of other clusters drawn at random, the one that shares most words with the case."""
    own = _subject_words(case.question, case.passages[0])
    drawn = [each for each in rng.sample(others, min(100, len(others))) if each.cluster != case.cluster]
    drawn = drawn or [each for each in others if each.cluster != case.cluster]
    return max(drawn, key=lambda each: len(own & _subject_words(each.question, each.passages[0])))
