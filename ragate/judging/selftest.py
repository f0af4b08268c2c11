"""What moves a judge's verdicts: nothing should by a repetition, another order or batch size; little by a rewording.

Asked are stored answers, sentence by sentence, and their contexts, one by one. Nothing is read from a journal: each
round is computed anew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from ragate.errors import RunError
from ragate.files import write_whole
from ragate.judging.asks import CALLS, Ask, Heard, Said
from ragate.judging.labelled import NO_QUESTION, Labelled
from ragate.judging.sentences import sentences_of
from ragate.run import Frozen

if TYPE_CHECKING:
    from ragate.config import Settings
    from ragate.judge import Judge
    from ragate.suite import Say

ITEMS = 20
"""Items of the test set that are asked about unless `limit` says otherwise."""

SYNONYMS = {
    "big": "large",
    "large": "big",
    "begin": "start",
    "start": "begin",
    "help": "assist",
    "helps": "assists",
    "important": "significant",
    "many": "numerous",
    "often": "frequently",
    "quick": "fast",
    "fast": "quick",
    "show": "demonstrate",
    "shows": "demonstrates",
    "use": "employ",
    "uses": "employs",
    "used": "employed",
    "about": "approximately",
    "also": "additionally",
    "needs": "requires",
    "need": "require",
}
"""Words that mean the same wherever they stand in an answer of fact."""

_WORD = re.compile(r"[a-z]+")


def spaced(statement: str) -> str:
    """The statement with its spaces doubled."""
    return re.sub(r"(?<=\S) (?=\S)", "  ", statement)


def introduced(statement: str) -> str:
    """`In short, ` before the statement."""
    return f"In short, {statement}"


def reworded(statement: str) -> str:
    """The statement with each word of `SYNONYMS` replaced."""
    return _WORD.sub(lambda match: SYNONYMS.get(match[0], match[0]), statement)


REWRITES: dict[str, Callable[[str], str]] = {
    "spaces doubled": spaced,
    '"In short, " before it': introduced,
    "synonyms": reworded,
}
"""Name -> what is done to a statement."""


class Probe(Frozen):
    """One round against the first."""

    name: str
    strict: bool
    """Whether anything that moves is a fault of the judge's machinery."""
    verdicts: int
    """Compared; 0 where there is nothing to rewrite."""
    moved: int
    """Verdicts that are another, or are missing on one side."""
    mean_shift: float
    """Mean of |P - P of the first round|."""
    largest_shift: float

    @property
    def moved_share(self) -> float:
        """Share of the verdicts that moved."""
        return self.moved / self.verdicts if self.verdicts else 0.0


class SelfTest(Frozen):
    """What moved the verdicts of one judge."""

    judge: str
    testset: str
    items: int
    failed: int
    """Items of which a call had no answer in the first round."""
    probes: tuple[Probe, ...]

    @property
    def steady(self) -> bool:
        """Whether repetition, order and batch size moved nothing at all."""
        return not any(probe.moved or probe.largest_shift for probe in self.probes if probe.strict)


def selftest(
    settings: Settings, say: Say, *, limit: int | None = None, out: Path | None = None
) -> tuple[SelfTest, Path]:
    """Put the judge of the settings to the test; writes selftest.json into `out` or the judge's folder.

    Asks about `limit` items, by default `ITEMS`. Returns the result and the file's path.

    Raises RagateError or EngineError with one sentence.
    """
    from ragate.judge import UrlJudge
    from ragate.judging.calibrate import judge_folder
    from ragate.suite import named_judge, start_judge
    from ragate.testset import load_testset, require

    testset = load_testset(settings.testset, limit=limit or ITEMS)
    require(testset, ("faithfulness",), True)
    items = [
        Labelled(
            id=item.id,
            question=item.question or NO_QUESTION,
            contexts=item.contexts or (),
            answer=item.answer or "",
            faithful=None,
            context_relevant=None,
            generator="",
            cluster=item.id,
        )
        for item in testset.items
    ]
    named = named_judge(settings, say)
    with ExitStack() as stack:
        judge = start_judge(settings, named, say, stack)()
        name = judge.name
        first = asyncio.run(_round(judge, _asks(items), items, partial(say, "first round")))
        if not first.said:  # what says nothing moves nothing
            why = next(iter(first.failed.values()), "no answer of it holds a statement")
            raise RunError(f"{testset.name}: the judge gave no verdict on any item: {why}")
        again, backwards = (
            asyncio.run(_round(judge, asks, items, partial(say, title)))
            for title, asks in (
                ("the same again", _asks(items)),
                ("last item first", _asks(items)[::-1]),
            )
        )
        probes = [
            compared("the same again", first, again, strict=True),
            compared("last item first", first, backwards, strict=True),
        ]
        for title, rewrite in REWRITES.items():
            heard = asyncio.run(_round(judge, _rewritten(items, rewrite), items, partial(say, title)))
            wanted = partial(_changed, rewrite)
            probes.append(compared(f"answer: {title}", first, heard, strict=False, wanted=wanted))
        turned = [item for item in items if len(item.contexts) > 1]
        heard = asyncio.run(_round(judge, _position(turned), items, partial(say, "contexts turned")))
        probes.append(compared("contexts: last one first", first, heard, strict=False))
    with ExitStack() as stack:
        alone = start_judge(settings.model_copy(update={"max_batch": 1}), named, say, stack)()
        if isinstance(alone, UrlJudge):
            alone.concurrency = 1
        heard = asyncio.run(_round(alone, _asks(items), items, partial(say, "one at a time")))
        probes.insert(2, compared("one at a time", first, heard, strict=True))
    result = SelfTest(
        judge=name, testset=testset.name, items=len(items), failed=len(first.failed), probes=tuple(probes)
    )
    path = (out or judge_folder(Path(settings.root), named)) / "selftest.json"
    write_whole(path, result.model_dump_json(indent=1) + "\n")
    return result, path


def compared(
    name: str, first: Heard, other: Heard, *, strict: bool, wanted: Callable[[Said], bool] = lambda said: True
) -> Probe:
    """The verdicts of two rounds, pair by pair: of a strict probe all, else those that were `wanted` and asked."""
    keys = first.said.keys() | other.said.keys() if strict else other.said.keys()
    moved = pairs = 0
    shifts: list[float] = []
    for key in keys:
        before, after = first.said.get(key, ()), other.said.get(key, ())
        for one, two in zip_longest(before, after):
            if one is not None and not wanted(one):
                continue
            pairs += 1
            moved += one is None or two is None or one.verdict != two.verdict
            if one is not None and two is not None:
                shifts.append(abs(one.probability - two.probability))
    return Probe(
        name=name,
        strict=strict,
        verdicts=pairs,
        moved=moved,
        mean_shift=math.fsum(shifts) / len(shifts) if shifts else 0.0,
        largest_shift=max(shifts, default=0.0),
    )


async def _round(
    judge: Judge, asks: Sequence[Ask], items: Sequence[Labelled], said: Callable[[int, int], None]
) -> Heard:
    """All asks put to a judge that remembers nothing."""
    from ragate.judging.ask import ask_all

    judge.forget()
    try:
        by_id = {item.id: item for item in items}
        return await ask_all(judge, asks, by_id, lambda e: said(e.calls_done, e.calls_total))
    finally:
        await judge.aclose()


def _asks(items: Sequence[Labelled]) -> list[Ask]:
    from ragate.judging.prompts import asks_of

    return [ask for subject in CALLS for item in items for ask in asks_of(item, subject)]


def _rewritten(items: Sequence[Labelled], rewrite: Callable[[str], str]) -> list[Ask]:
    """The statements of each answer rewritten, those that this leaves alone too: they share its calls."""
    from ragate.judging.prompts import nli_asks

    return [ask for item in items for ask in nli_asks(item, [rewrite(s) for s in sentences_of(item.answer)])]


def _position(items: Sequence[Labelled]) -> list[Ask]:
    from ragate.judging.prompts import asks_of

    turned = [dataclasses.replace(item, contexts=item.contexts[::-1]) for item in items]
    return [ask for item in turned for ask in asks_of(item, "faithfulness")]


def _changed(rewrite: Callable[[str], str], said: Said) -> bool:
    return rewrite(said.text) != said.text
