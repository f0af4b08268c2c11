"""How a language model says what a passage says: light paraphrases, lead-ins, headings, mentions of a passage.

None of it changes what is claimed, so it is put on claims of both labels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from ragate.tuning.edits import reworded
from ragate.tuning.text import content_words, has

LEADS = (
    "Based on the provided passages, {claim}",
    "Based on the given passages, {claim}",
    "Based on the information provided, {claim}",
    "According to passage {n}, {claim}",
    "According to the passages, {claim}",
    "According to the provided context, {claim}",
    "As mentioned in passage {n}, {claim}",
    "As stated in the passages, {claim}",
    "In passage {n}, it is stated that {claim}",
    "Passage {n} states that {claim}",
    "Passage {n} mentions that {claim}",
    "Passage {n} explains that {claim}",
    "Passage {n} also says that {claim}",
    "Passage {n} provides more details: {Claim}",
    "Passage {n} gives information about {topic}: {Claim}",
    "The passages mention that {claim}",
    "Additionally, {claim}",
    "Furthermore, {claim}",
    "However, {claim}",
    "In addition, {claim}",
    "It is also worth noting that {claim}",
    "In summary, {claim}",
    "Overall, {claim}",
    "Therefore, {claim}",
    "Yes, {claim}",
)
"""How language models begin a sentence."""

LISTS = (
    "Based on the provided passages, here are the {count} of {topic}: {Claim}",
    "Based on the given passages, here is what is known about {topic}: {Claim}",
    "Based on the provided passages, the following can be said about {topic}: {Claim}",
    "Here are the {count} of {topic}: {Claim}",
    "Here are some {count} of {topic} according to the passages: {Claim}",
    "The {count} of {topic} are as follows: {Claim}",
    "The passages describe several {count} of {topic}: {Claim}",
    "To answer this question, follow these steps: {Claim}",
    "Here's a step-by-step guide: {Claim}",
    "In summary, the {count} of {topic} are: {Claim}",
)
"""Lead-ins of a list, joined with its first item as `sentences_of` joins them."""

COUNTS = ("steps", "main points", "key points", "main benefits", "differences", "details", "ways", "facts")
PLACES = (" (passage {n})", " (Passage {n}).", " according to passage {n}.", ", as stated in passage {n}.")
STEPS = ("First, ", "Next, ", "Then, ", "Finally, ", "Step {n}: ", "After that, ")

_LONG = {
    "it's": "it is",
    "don't": "do not",
    "doesn't": "does not",
    "can't": "cannot",
    "you'll": "you will",
    "you're": "you are",
    "isn't": "is not",
    "aren't": "are not",
    "won't": "will not",
    "that's": "that is",
    "they're": "they are",
    "didn't": "did not",
    "wasn't": "was not",
    "couldn't": "could not",
}
_ASIDE = re.compile(r" \([^()]{3,60}\)")
_OPENER = re.compile(r"^(?:However|Also|And|But|So|Additionally|In addition|Moreover|Well|Now|Then), ?")
_FRONTED = re.compile(
    r"^((?:In|On|At|After|Before|During|Since|By|For|With|From) [^,.;:]{3,45}), (\w[^;:]*)\.$"
)
_TRAILING = re.compile(r"^([A-Z][^,;:]{20,}?) ((?:in|on|since|during|after) (?:the )?[A-Z0-9][\w ]{2,25})\.$")
_YOU = re.compile(r"^You (?:should|can|need to|must|will need to|will have to) (\w[^;]*\.)$")
_DOING = re.compile(
    r"^(?:Add|Place|Remove|Use|Check|Select|Click|Press|Open|Turn|Put|Heat|Cook|Cut|Keep|Make|Let|Stir|Bake|Cover|Take|"
    r"Pour|Set|Choose|Apply|Go|Enter|Mix|Bring|Clean|Contact|Visit|Find|Wash|Install|Start|Try|Ask|Call|Fill|Connect|"
    r"Drain|Rinse|Drop|Spread|Serve|Allow|Avoid|Read|Write|Look|Touch|Tap|Move|Push|Pull|Combine|Preheat|Boil)\b"
)
_LED = re.compile(
    r"^(?:Based|According|As mentioned|In summary|Overall|Additionally|However|Therefore|Passage|The passage)"
)
_CLAUSE = re.compile(r",? (?:, which|, while|, whereas|; ) ?| and (?=(?:it|they|he|she|the|this|there) )")
_BE = re.compile(r"\b(is|are|was|were|can|will|may|has|have)\b (?!also|not|n't)")


def told(sentence: str, rng: random.Random) -> str:
    """A sentence of a passage as an answer would say it; nothing is added, now and then a clause is left out."""
    text = sentence
    for way, chance in _WAYS:
        if rng.random() < chance:
            text = way(text, rng)
    return text if len(content_words(text)) >= 3 else sentence


def dressed(claim: str, topic: str, passages: Sequence[str], rng: random.Random) -> str:
    """The claim as it stands in an answer: with a lead-in, a heading, the number of a passage, or bare."""
    fate, n = rng.random(), rng.randint(1, min(3, len(passages)))
    if ":" in claim or _LED.match(claim):
        return claim
    if fate < 0.13:
        return _led(rng.choice(LEADS), claim, topic, n, passages, rng)
    if fate < 0.22:
        return _led(rng.choice(LISTS), claim, topic, n, passages, rng)
    if fate < 0.27:
        heading = _heading(claim, rng)
        return f"{heading}: {claim}" if heading else claim
    if fate < 0.31:
        return claim.rstrip(".") + rng.choice(PLACES).format(n=n)
    if fate < 0.36 and _DOING.match(claim):
        return rng.choice(STEPS).format(n=rng.randint(1, 9)) + lowered(claim, passages)
    return claim


def lowered(text: str, passages: Sequence[str]) -> str:
    """The text as it goes on inside a sentence: its first word small, unless it is a name there."""
    first, _, rest = text.partition(" ")
    small = first.lower()
    common = small not in content_words(small) or any(has(passage, small) for passage in passages)
    return f"{small} {rest}" if first.istitle() and common else text


def _led(lead: str, claim: str, topic: str, n: int, passages: Sequence[str], rng: random.Random) -> str:
    small = lowered(claim, passages)
    return lead.format(claim=small, Claim=claim, topic=topic, n=n, count=rng.choice(COUNTS))


def _heading(claim: str, rng: random.Random) -> str:
    """Two or three of the claim's own words in a row, as the heading of its list item."""
    words = [word.strip(".,;:()'") for word in claim.split()]
    size = rng.choice((1, 2, 2, 3))
    runs = [words[i : i + size] for i in range(len(words) - size + 1)]
    runs = [run for run in runs if all(len(word) > 3 and content_words(word) for word in run)]
    return " ".join(rng.choice(runs)).capitalize() if runs else ""


def _spelled_out(text: str, rng: random.Random) -> str:
    return " ".join(_LONG.get(word, word) for word in text.split())


def _without_aside(text: str, rng: random.Random) -> str:
    return _ASIDE.sub("", text, count=1)


def _without_opener(text: str, rng: random.Random) -> str:
    rest = _OPENER.sub("", text)
    return rest[:1].upper() + rest[1:]


def _turned(text: str, rng: random.Random) -> str:
    """`In 1997, it closed.` as `It closed in 1997.`, and the other way round."""
    if (found := _FRONTED.match(text)) and "," not in found[2]:
        return f"{found[2][:1].upper()}{found[2][1:]} {found[1][:1].lower()}{found[1][1:]}."
    if found := _TRAILING.match(text):
        small = lowered(found[1], [text[1:]])
        return f"{found[2][:1].upper()}{found[2][1:]}, {small}."
    return text


def _ordered(text: str, rng: random.Random) -> str:
    """`Add salt.` as `You should add salt.`, and the other way round."""
    if found := _YOU.match(text):
        return found[1][:1].upper() + found[1][1:]
    if _DOING.match(text):
        lead = rng.choice(
            ("You should ", "You can ", "You need to ", "Start by making sure to ", "It says to ")
        )
        return lead + text[:1].lower() + text[1:]
    return text


def _shortened(text: str, rng: random.Random) -> str:
    """Its first clause."""
    parts = _CLAUSE.split(text)
    return f"{parts[0].rstrip('.,')}." if len(parts) > 1 and len(content_words(parts[0])) >= 5 else text


def _filled(text: str, rng: random.Random) -> str:
    """`It is` as `It is also`."""
    return _BE.sub(r"\1 also ", text, count=1)


_WAYS: tuple[tuple[Callable[[str, random.Random], str], float], ...] = (
    (_without_opener, 0.7),
    (_spelled_out, 0.6),
    (_without_aside, 0.5),
    (_turned, 0.6),
    (_shortened, 0.3),
    (_ordered, 0.4),
    (_filled, 0.1),
    (reworded, 0.6),
)
