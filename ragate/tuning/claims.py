"""A case as a scene: passages and claims about them, some supported and some not, with the reason known.

Both labels are made with the same wordings. A claim loses its support because the sentence it rests on is taken out of
the passages, or says something else there; a made-up claim gains support because the passages are made to say it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ragate.tuning.edits import (
    Phrases,
    changed,
    crossed,
    edits_of,
    is_within,
    negated,
    overstated,
    repeats,
    rests_on,
    reworded,
    without_support,
)
from ragate.tuning.sources import Case
from ragate.tuning.text import content_words, has, nearest, replaced, sentences, sentences_in

FILLERS = tuple(
    line.strip()
    for line in """
    It is important to consult a professional before making any decision about {topic}.
    It is always a good idea to do further research on {topic}.
    Keep in mind that the details of {topic} may vary depending on your location and circumstances.
    It is widely regarded as one of the most important aspects of {topic}.
    Results may vary from person to person, so it is best to be patient.
    Always follow the manufacturer's instructions and wear protective equipment.
    This makes {topic} a popular choice among beginners and experts alike.
    Be sure to compare prices and read reviews before you decide on {topic}.
    Regular maintenance helps to prevent problems with {topic} in the long run.
    Experts generally recommend starting slowly and adjusting over time.
    Many people find that {topic} has a positive effect on their daily life.
    It is also known for its rich history and cultural significance.
    If symptoms persist, seek medical attention as soon as possible.
    The exact cost of {topic} depends on several factors, including size and quality.
    Stay hydrated and get plenty of rest during this time.
    Let it cool completely before serving, and store leftovers in an airtight container.
    Make sure to check with the local authorities for the current rules on {topic}.
    Overall, {topic} requires careful planning and attention to detail.
    This process typically takes a few weeks, although it can take longer in some cases.
    It has been used for centuries and remains popular today.
    You may also need to provide proof of identity and other supporting documents.
    Recent studies suggest that {topic} will become even more common in the coming years.
    Once you have finished, double-check everything to avoid mistakes.
    Both options have their own advantages and disadvantages.
    """.strip().splitlines()
)
"""What language models like to add to an answer."""

LEADS = (
    "Based on the provided passages, {claim}",
    "Based on the given passages, {claim}",
    "According to passage {n}, {claim}",
    "According to the provided passages, {claim}",
    "As mentioned in passage {n}, {claim}",
    "Based on the provided passages, here is what is known about {topic}: {claim}",
    "Here are the main points about {topic}: {claim}",
    "Additionally, {claim}",
    "It is also worth noting that {claim}",
    "Passage {n} states that {claim}",
    "In summary, {claim}",
)
"""How language models like to begin: neither label's own."""

PLACES = (" (passage {n})", " (Passage {n}).")


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
    passages: tuple[str, ...]
    claims: tuple[Claim, ...]


def scene_of(case: Case, neighbour: Case, phrases: Phrases, rng: random.Random) -> Scene:
    """A scene of a case; what is foreign in it comes from a neighbour, a case on another subject or a near one."""
    passages = list(case.passages)
    claims = [Claim(text, 1, "as written") for text in case.supported]
    said = extracts(case, rng, rng.choice((0, 1, 2, 3)))
    claims += [Claim(text, 1, "from the passages") for text in said if text not in case.supported]
    rng.shuffle(claims)
    if rng.random() < 0.55:
        passages, claims = _remove(passages, claims, neighbour, rng)
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        passages, claims = _change_passages(passages, claims, phrases, rng)
    if rng.random() < 0.2:
        passages, claims = _negate_passages(passages, claims, rng)
    claims = [_change(claim, passages, phrases, rng) if rng.random() < 0.35 else claim for claim in claims]
    topic = _topic(case)
    strange = [(text, "labelled") for text in case.unsupported]
    strange += [
        (text, "foreign") for text in rng.sample(neighbour.supported, min(2, len(neighbour.supported)))
    ]
    strange += [(text, "foreign") for text in extracts(neighbour, rng, 1)]
    strange.append((rng.choice(FILLERS).format(topic=topic), "filler"))
    for text, kind in rng.sample(strange, min(len(strange), rng.choice((0, 1, 2, 3, 4)))):
        passages, claim = _place(text, kind, passages, phrases, rng)
        claims.insert(rng.randint(0, len(claims)), claim)
    claims = _merge(claims, passages, neighbour, rng)
    claims = [_dress(claim, topic, passages, rng) for claim in claims]
    return Scene(case, tuple(passages), tuple(claims))


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
    passages: list[str], claims: list[Claim], phrases: Phrases, rng: random.Random
) -> tuple[list[str], list[Claim]]:
    """Swap a phrase in the passages; of the claims with that phrase some follow, and some no longer hold."""
    whole = [claim for claim in claims if claim.label]
    if not whole:
        return passages, claims
    chosen = rng.choice(whole)
    edits = edits_of(chosen.text, passages, phrases, rng)
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


def _change(claim: Claim, passages: list[str], phrases: Phrases, rng: random.Random) -> Claim:
    """A supported claim made to say something else; as it was where nothing offers itself."""
    if claim.kind not in ("as written", "from the passages"):
        return claim
    edits = edits_of(claim.text, passages, phrases, rng)
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


def _place(
    text: str, kind: str, passages: list[str], phrases: Phrases, rng: random.Random
) -> tuple[list[str], Claim]:
    """A claim that the passages do not support, or that they do because they are made to say it."""
    fate = rng.random()
    if fate < (0.65 if kind == "filler" else 0.5):
        return passages, Claim(text, 0, kind)
    told = reworded(text, rng, 0.7)
    label, how = 1, f"{kind}, put into the passages"
    edits = edits_of(text, [text], phrases, rng)
    if fate > 0.84 and edits:
        edit = rng.choice(edits)
        if has(told, edit.old):
            told, label = replaced(told, edit.old, edit.new), 0
            how = f"{kind}, put into the passages with another {edit.kind}"
    at = rng.randrange(len(passages))
    pieces = sentences(passages[at])
    pieces.insert(rng.randint(0, len(pieces)), told)
    return [*passages[:at], " ".join(pieces), *passages[at + 1 :]], Claim(text, label, how)


def _merge(claims: list[Claim], passages: Sequence[str], neighbour: Case, rng: random.Random) -> list[Claim]:
    """Now and then two claims in one sentence, which holds where both do; or a claim with a foreign addition."""
    found: list[Claim] = []
    for claim in claims:
        if found and len(found[-1].text) + len(claim.text) < 260 and rng.random() < 0.12:
            last = found.pop()
            both = int(last.label and claim.label)
            kind = "merged, both hold" if both else "merged, one does not hold"
            found.append(Claim(_joined(last.text, claim.text, passages, rng), both, kind))
        elif claim.label and neighbour.supported and rng.random() < 0.08:
            added = rng.choice(neighbour.supported)
            found.append(Claim(_joined(claim.text, added, passages, rng), 0, "foreign addition"))
        else:
            found.append(claim)
    return found


def _joined(one: str, other: str, passages: Sequence[str], rng: random.Random) -> str:
    link = rng.choice((", and ", "; ", ", while ", ". Additionally, ", " "))
    return f"{one} {other}" if link == " " else f"{one.rstrip('.')}{link}{_lowered(other, passages)}"


def _dress(claim: Claim, topic: str, passages: Sequence[str], rng: random.Random) -> Claim:
    """The claim in the words of a language model: synonyms, a lead-in, the number of a passage."""
    text = reworded(claim.text, rng) if rng.random() < 0.5 else claim.text
    fate = rng.random()
    n = rng.randint(1, len(passages))
    if fate < 0.12:
        text = rng.choice(LEADS).format(claim=_lowered(text, passages), topic=topic, n=n)
    elif fate < 0.17:
        text = text.rstrip(".") + rng.choice(PLACES).format(n=n)
    return replace(claim, text=text)


def _lowered(text: str, passages: Sequence[str]) -> str:
    """The text as it goes on inside a sentence: its first word small, unless it is a name there."""
    first, _, rest = text.partition(" ")
    small = first.lower()
    common = small not in content_words(small) or any(has(passage, small) for passage in passages)
    return f"{small} {rest}" if first.istitle() and common else text


def extracts(case: Case, rng: random.Random, count: int) -> list[str]:
    """Sentences of the passages themselves, of the length of an answer's."""
    pieces = [piece for piece in sentences_in(case.passages) if 6 <= len(piece.split()) <= 35]
    pieces = [piece for piece in pieces if piece[-1] == "." and piece[0].isupper()]
    return rng.sample(pieces, min(count, len(pieces)))


def _topic(case: Case) -> str:
    """What the question is about, in its own words."""
    words = [word.strip("?.,!'") for word in case.question.split()]
    kept = [word for word in words if content_words(word)]
    return " ".join(kept[-3:]) or "this subject"


def neighbour_of(case: Case, others: Sequence[Case], rng: random.Random) -> Case:
    """Of some cases of other clusters drawn at random, the one that shares most words with the case."""
    own = set(content_words(case.question)) | set(content_words(case.passages[0]))
    drawn = [each for each in rng.sample(others, min(24, len(others))) if each.cluster != case.cluster]
    drawn = drawn or [each for each in others if each.cluster != case.cluster]
    return max(drawn, key=lambda each: len(own & set(content_words(each.passages[0]))))
