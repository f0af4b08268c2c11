"""One `ragate judge calibrate`: labelled answers in, what the judge says of them, figures and a map out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from ragate.catalog import JudgeChoice
from ragate.errors import RunError, TestSetError
from ragate.files import write_whole
from ragate.gate.baseline import file_name
from ragate.judging.labelled import Labelled, Subject, load_labelled, spread
from ragate.metrics import Statements

if TYPE_CHECKING:
    from ragate.config import Settings
    from ragate.evaluate import Event
    from ragate.journal import Journal
    from ragate.judge import Judge, UrlJudge
    from ragate.judging.asks import Heard
    from ragate.judging.mapping import Calibration
    from ragate.judging.quality import Quality
    from ragate.suite import Say

METRIC: dict[Subject, Literal["faithfulness", "context_precision"]] = {
    "faithfulness": "faithfulness",
    "relevance": "context_precision",
}


@dataclass(frozen=True)
class Calibrated:
    """What a calibration left."""

    quality: Quality
    calibration: Calibration
    written: tuple[Path, ...]


def judge_folder(root: Path, named: UrlJudge | JudgeChoice) -> Path:
    """Where what is known of a judge is kept: `.ragate/judge/<judge>`."""
    # of a file without its folder; what it wears beyond its own is another judge
    name = Path(named.title).name if isinstance(named, JudgeChoice) else named.name
    return root / ".ragate" / "judge" / file_name(name)


def calibrate(
    settings: Settings,
    data: Path,
    subject: Subject,
    statements: Statements,
    say: Say,
    on_event: Callable[[Event], None],
    *,
    limit: int | None = None,
    out: Path | None = None,
) -> Calibrated:
    """Measure the judge of the settings on `data`; writes JSON, the map and the page.

    `limit` takes so many items, evenly spaced; the folder is `out`, else `.ragate/judge/<judge>/<data>`. What is judged
    is journaled: a calibration that was stopped goes on. Raises RagateError or EngineError with one sentence.
    """
    from ragate.journal import DoneEntry, Journal
    from ragate.suite import named_judge, start_judge

    items, unlabelled = load_labelled(data, subject)
    items = spread(items, limit)
    refuse_one_label(data, items, subject)
    named = named_judge(settings, say)
    folder = out or judge_folder(Path(settings.root), named) / data.stem
    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(folder / "journal.jsonl"))
        judge = start_judge(settings, named, say, stack)()
        judge.journal = journal
        heard, fingerprint = asyncio.run(
            _judged(settings, judge, journal, items, subject, statements, on_event)
        )
        journal.append(DoneEntry())

    from ragate.judging.asks import rows_of
    from ragate.judging.quality import Source, quality_of

    rows, missing = rows_of(items, subject, heard.said)
    if len({row.label for row in rows}) < 2:
        first = next(iter(heard.failed.values()), "no item of it was judged")
        raise RunError(f"{data}: the judge gave no verdict on any item of one label: {first}")
    source = Source(judge.name, subject, statements, data.name, unlabelled, tuple(missing))
    quality = quality_of(rows, source)
    calibration = calibration_of(quality, fingerprint)
    return Calibrated(quality, calibration, write_calibration(folder, quality, calibration))


def refuse_one_label(data: Path, items: list[Labelled], subject: Subject) -> None:
    """Raise TestSetError where all labels are alike: nothing could be told apart."""
    labels = {
        label
        for item in items
        for label in ((item.faithful,) if subject == "faithfulness" else item.context_relevant or ())
    }
    if len(labels) < 2:
        field = "faithful" if subject == "faithfulness" else "context_relevant"
        raise TestSetError(
            f"{data}: {field}: it is {labels.pop()} everywhere; a judge can only be measured where 1 and 0 occur"
        )


def calibration_of(quality: Quality, fingerprint: dict[str, str]) -> Calibration:
    """What an evaluation needs to know of it."""
    from ragate.judging.mapping import Calibration

    return Calibration(
        judge=quality.judge,
        metric=METRIC[quality.subject],
        data=quality.data,
        items=quality.items,
        fingerprint=fingerprint,
        scores=quality.scores_map,
        shown_hard=quality.shown_hard,
        shown_soft=quality.shown_soft,
    )


def write_calibration(folder: Path, quality: Quality, calibration: Calibration) -> tuple[Path, ...]:
    """Write the figures, the map and the page; the other way of making statements stands there too if it is known."""
    from ragate.judging.mapping import save_calibration
    from ragate.report.calibration import render_calibration

    figures = folder / figures_name(quality.subject, quality.statements)
    write_whole(figures, quality.model_dump_json(indent=1) + "\n")
    fitted = folder / map_name(quality.subject, quality.statements)
    save_calibration(calibration, fitted)
    page = folder / f"{quality.subject}.html"
    write_whole(page, render_calibration(quality, other_way(folder, quality)))
    return figures, fitted, page


def figures_name(subject: Subject, statements: str) -> str:
    """`faithfulness-sentences.json`, `faithfulness-judge.json` or `relevance.json`."""
    return f"{subject}-{statements}.json" if statements else f"{subject}.json"


def map_name(subject: Subject, statements: str) -> str:
    """`faithfulness-map.json`, of ragas' own statements `faithfulness-judge-map.json`; `relevance-map.json`."""
    return f"{subject}-judge-map.json" if statements == "judge" else f"{subject}-map.json"


def other_way(folder: Path, quality: Quality) -> Quality | None:
    """The figures of the same judge on the same items by the other way of making statements, where they are there."""
    from ragate.judging.quality import Quality

    if not quality.statements:
        return None
    way = "judge" if quality.statements == "sentences" else "sentences"
    try:
        text = (folder / figures_name(quality.subject, way)).read_text(encoding="utf-8")
        other = Quality.model_validate(json.loads(text))
    except (OSError, ValueError, ValidationError):
        return None
    same = other.judge == quality.judge and other.data == quality.data
    whole = other.items + len(other.failed) == quality.items + len(quality.failed)
    return other if same and whole else None


async def _judged(
    settings: Settings,
    judge: Judge,
    journal: Journal,
    items: list[Labelled],
    subject: Subject,
    statements: Statements,
    on_event: Callable[[Event], None],
) -> tuple[Heard, dict[str, str]]:
    """The verdicts, without the items of which a call failed; and the fingerprint of what made them."""
    from ragate.evaluate import fingerprint
    from ragate.judging.ask import ask_all
    from ragate.judging.asks import Heard
    from ragate.judging.prompts import asks_of
    from ragate.metrics import metrics_named

    try:
        fields = await fingerprint(judge, metrics_named([METRIC[subject]], statements), None)
        if subject == "faithfulness" and statements == "judge":
            return await _by_ragas(settings, judge, journal, items, on_event), fields
        asks = [ask for item in items for ask in asks_of(item, subject)]
        heard = await ask_all(judge, asks, {item.id: item for item in items}, on_event)
    finally:
        await judge.aclose()
        journal.flush()
    said = heard.said
    if subject == "faithfulness":
        said = {key: value for key, value in said.items() if key[1] not in heard.failed}
    return Heard(said, heard.failed), fields


async def _by_ragas(
    settings: Settings,
    judge: Judge,
    journal: Journal,
    items: list[Labelled],
    on_event: Callable[[Event], None],
) -> Heard:
    """Verdicts of ragas' faithfulness as it is: an evaluation of the stored answers."""
    from ragate.evaluate import aevaluate
    from ragate.judging.asks import Heard, Key, Said
    from ragate.testset import Item, TestSet

    cases = tuple(
        Item(id=item.id, question=item.question, answer=item.answer, contexts=item.contexts) for item in items
    )
    testset = TestSet(name="labelled", source="labelled", items=cases, hash="")
    run, _ = await aevaluate(
        testset,
        ["faithfulness"],
        judge,
        journal,
        on_event=on_event,
        call_timeout=settings.call_timeout,
        ends=False,
    )
    said: dict[Key, tuple[Said, ...]] = {}
    for score in run.scores:
        if score.state == "ok":
            said["nli", score.item, 0] = tuple(
                Said(
                    text=claim.text,
                    verdict=claim.verdict,
                    probability=claim.verdict if claim.probability is None else claim.probability,
                    reason=claim.reason,
                )
                for claim in score.claims
            )
    failed = {score.item: score.error or score.state for score in run.scores if score.state != "ok"}
    return Heard(said, failed)
