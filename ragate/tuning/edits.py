"""Small changes of meaning: what can be swapped in a sentence so that it no longer says the same.

An edit is a pair of phrases. Made in a claim alone, or in its passages alone, it breaks the support; made in both, or
with a synonym, it does not. They are few among the lessons: from many of them a judge learns to call every difference
unsupported.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ragate.tuning.text import content_words, has, replaced, sentences, words_of

_T = TypeVar("_T")


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new`."""

    kind: str
    old: str
    new: str


def _pairs(lines: str) -> list[tuple[str, str]]:
    halves = (pair.strip().partition("/") for pair in lines.replace("\n", ",").split(",") if pair.strip())
    return [(one, other) for one, _, other in halves]


def _both_ways(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = defaultdict(list)
    for one, other in pairs:
        table[one].append(other)
        table[other].append(one)
    return dict(table)


OPPOSITES = _both_ways(
    _pairs(
        """increase/decrease, increases/decreases, increased/decreased, more/less, higher/lower, highest/lowest
        before/after, first/last, early/late, earlier/later, older/younger, largest/smallest, larger/smaller
        longer/shorter, best/worst, better/worse, north/south, east/west, northern/southern
        eastern/western, hot/cold, warm/cool, dry/wet, high/low, open/closed, always/never
        maximum/minimum, positive/negative, won/lost, win/lose, legal/illegal, safe/unsafe, male/female, man/woman
        men/women, father/mother, brother/sister, son/daughter, husband/wife, day/night, morning/evening
        summer/winter, accept/reject, accepted/rejected, allowed/forbidden, above/below, buy/sell
        bought/sold, minutes/hours, days/weeks, weeks/months, months/years, hours/days, fresh/dried, raw/cooked
        thick/thin, upper/lower, internal/external, strong/weak, faster/slower, easy/difficult, easier/harder
        public/private, domestic/foreign, ancient/modern, rich/poor, prevents/causes, prevent/cause
        improve/worsen, improves/worsens, many/few, add/remove, added/removed, start/stop
        started/stopped, enable/disable, required/optional, single/multiple, common/rare, temporary/permanent
        primary/secondary, married/divorced, arrested/released, guilty/innocent, confirmed/denied
        supported/opposed, daily/weekly, weekly/monthly, million/billion, tablespoon/teaspoon
        tablespoons/teaspoons, pounds/ounces, feet/inches, miles/kilometers, actor/director, film/novel
        album/single, city/village, north/west, son/brother, mother/sister, two/three, three/four, five/six
        Monday/Thursday, Tuesday/Friday, Wednesday/Sunday, Saturday/Tuesday, January/March, April/June
        July/October, August/November, September/December, February/May, American/British, English/French
        German/Italian, Australian/Canadian, Chinese/Japanese, Indian/Russian"""
    )
)
"""Words that cannot both be right."""

STRONGER = dict(
    _pairs(
        """some/all, often/always, usually/always, sometimes/always, may/will, might/will, can/must, could/will
        many/all, most/all, generally/always, typically/always, likely/certain, should/must, several/all
        partly/entirely, approximately/exactly, nearly/more than, suggests/proves
        suggest/prove, reportedly/certainly, allegedly/certainly, possible/certain, helps/guarantees"""
    )
)
"""Words that say less, and what would go too far."""

SYNONYMS = _both_ways(
    _pairs(
        """big/large, begin/start, begins/starts, began/started, use/employ, used/employed, people/individuals
        help/assist, helps/assists, child/kid, children/kids, purchase/buy, purchased/bought, show/demonstrate
        shows/demonstrates, showed/demonstrated, important/significant
        roughly/approximately, required/needed, requires/needs, require/need, get/obtain
        gets/obtains, keep/maintain, creates/produces, located/situated, usually/typically
        often/frequently, ensure/make sure, allows/enables, allow/enable, contains/includes, contain/include
        reduce/lower, reduces/lowers, end/finish, ended/finished, build/construct, built/constructed
        quickly/rapidly, fast/quick, doctor/physician, film/movie, car/vehicle, job/position, town/city
        killed/slain, says/states, several/multiple, various/different, main/primary, whole/entire
        enough/sufficient, sick/ill, illness/disease, choose/select, chosen/selected, try/attempt
        tried/attempted, gives/provides, give/provide, known/recognized, happens/occurs
        happen/occur, happened/occurred, area/region, big/sizeable, begin/commence, famous/well-known
        method/technique, methods/techniques, problem/issue, problems/issues, remove/take out, whole/complete
, per cent/percent, police/officers
, die/pass away, died/passed away, fight/battle
        revealed/disclosed, team/squad, wife/spouse, husband/spouse, mother/mom, father/dad
        before/prior to, after/following, children/youngsters, money/funds, company/firm, goal/aim"""
    )
)
"""Words that say the same in most places."""

_NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w-]|[.,]\d)")
_NAME = re.compile(r"(?<![.!?'(] )(?<!^)(?<!\w)[A-Z][\w'’-]+(?: (?:of |de |van |the )?[A-Z][\w'’-]+)*")
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|can|could|will|would|should|may|has|have|had|does|do|did)\b(?! not)"
)
_OPENERS = "I The A An In It He She They This That These Those You We And But If"
_NOT_NAMES = frozenset(_OPENERS.split())


class Names:
    """Names of other texts, by their number of words: what a swap is taken from."""

    def __init__(self, texts: Iterable[str]) -> None:
        names: dict[int, dict[str, None]] = defaultdict(dict)
        for text in texts:
            for name in names_in(text):
                names[len(name.split())][name] = None
        self._names = {length: list(found) for length, found in names.items()}

    def of_length(self, words: int, rng: random.Random) -> str | None:
        """A name of so many words; `None` where there is none."""
        return rng.choice(self._names[words]) if self._names.get(words) else None


def names_in(text: str) -> list[str]:
    """Runs of capitalized words inside sentences."""
    return [match[0] for match in _NAME.finditer(text) if match[0] not in _NOT_NAMES]


def edits_of(claim: str, passages: Sequence[str], others: Names, rng: random.Random) -> list[Edit]:
    """Changes of meaning that the claim offers, at most two of a kind: its `old` is in the passages as well."""
    text = "\n".join(passages)
    found: list[Edit] = []

    def offer(kind: str, old: str, new: str | None) -> None:
        if new and old != new and not has(claim, new) and has(text, old):
            found.append(Edit(kind, old, new))

    numbers = _NUMBER.findall(text)
    for number in _some(_NUMBER.findall(claim), rng):
        alike = [each for each in numbers if each != number and len(each) == len(number)]
        offer("number", number, rng.choice(alike) if alike and rng.random() < 0.4 else _moved(number, rng))
    names = list(dict.fromkeys(names_in(text)))
    for name in _some(names_in(claim), rng):
        near = [each for each in names if each not in claim and name not in each and each not in name]
        alike = [each for each in near if len(each.split()) == len(name.split())]
        offer(
            "name",
            name,
            rng.choice(alike) if alike and rng.random() < 0.7 else others.of_length(len(name.split()), rng),
        )
    for word in _some([word for word in claim.split() if word in OPPOSITES], rng):
        offer("opposite", word, rng.choice(OPPOSITES[word]))
    return found


def overstated(claim: str, rng: random.Random) -> str | None:
    """The claim with one hedge made a certainty; `None` where it has none."""
    hedges = [word for word in STRONGER if has(claim, word)]
    if not hedges:
        return None
    word = rng.choice(hedges)
    return re.sub(rf"\b{word}\b", STRONGER[word], claim, count=1)


def negated(claim: str) -> str | None:
    """The claim with a `not` put in or taken out; `None` where there is no place for one."""
    if re.search(r"\b(?:not|never)\b", claim):
        return re.sub(r"\s*\b(?:not|never)\b", "", claim, count=1).strip()
    if _AUXILIARY.search(claim) is None:
        return None
    return _AUXILIARY.sub(lambda match: f"{match[0]} not", claim, count=1)


def crossed(claim: str, rng: random.Random) -> str | None:
    """The claim with two of its names in each other's place; `None` where it has not two."""
    names = list(dict.fromkeys(names_in(claim)))
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a not in b and b not in a]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    return re.sub(
        rf"\b(?:{re.escape(one)}|{re.escape(other)})\b", lambda m: other if m[0] == one else one, claim
    )


def reworded(text: str, rng: random.Random, share: float = 0.6) -> str:
    """The text with some of its words replaced by synonyms."""
    return " ".join(
        rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < share else word
        for word in text.split()
    )


def without_support(claim: str, passages: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """(the passages less the sentences that the claim rests on, those sentences).

    `None` where the support cannot be told to be gone: what is left may hold at most seven in ten of the claim's
    content words.
    """
    if len(set(content_words(claim))) < 4:
        return None
    kept: list[list[str]] = []
    gone: list[str] = []
    for passage in passages:
        kept.append([])
        for piece in sentences(passage):
            (gone if rests_on(claim, piece) else kept[-1]).append(piece)
    rest = [" ".join(pieces) for pieces in kept if pieces]
    if not gone or not rest or is_within(claim, rest):
        return None
    return rest, gone


def rests_on(claim: str, sentence: str) -> bool:
    """True where the sentence holds a third or more of the claim's content words."""
    own = set(content_words(claim))
    return len(own & set(content_words(sentence))) >= max(1, 0.34 * len(own))


def repeats(claim: str, sentence: str) -> bool:
    """True where the sentence holds seven in ten or more of the claim's content words."""
    own = set(content_words(claim))
    return len(own & set(content_words(sentence))) >= 0.7 * len(own)


def is_within(claim: str, passages: Sequence[str]) -> bool:
    """True where the passages hold more than seven in ten of the claim's content words."""
    own = set(content_words(claim))
    return len(own & words_of(passages)) > 0.7 * len(own)


def changed(passages: Sequence[str], claim: str, edit: Edit) -> list[str]:
    """The passages with the edit made: names and numbers everywhere, words where the claim rests on them."""
    if edit.kind in ("name", "number"):
        return [replaced(passage, edit.old, edit.new) for passage in passages]
    return [
        " ".join(
            replaced(piece, edit.old, edit.new) if rests_on(claim, piece) else piece
            for piece in sentences(passage)
        )
        for passage in passages
    ]


def _some(choices: Sequence[_T], rng: random.Random) -> list[_T]:
    distinct = list(dict.fromkeys(choices))
    return rng.sample(distinct, min(2, len(distinct)))


def _moved(number: str, rng: random.Random) -> str:
    """Another number of the same look."""
    digits = number.replace(",", "")
    if len(digits) == 4 and digits.isdigit() and digits[:2] in ("17", "18", "19", "20"):
        return str(int(digits) + rng.choice([-9, -4, -3, -2, -1, 1, 2, 3, 4, 8]))
    at = rng.choice([i for i, c in enumerate(number) if c.isdigit()])
    return number[:at] + rng.choice([c for c in "123456789" if c != number[at]]) + number[at + 1 :]
