"""Items x metrics, all in flight at once: answers are fetched, judged and put together as a `Run`.

The run is deterministic: in whatever order the calls end, resumed or not, the same inputs give the same
bytes. What depends on time goes into `Timings`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from ragate.errors import ConfigError, RagateError
from ragate.journal import AnswerEntry, DoneEntry, answer_key
from ragate.metrics import INPUT_MARK, RECORD, Metric, Record, Statements, metrics_named, value_of
from ragate.run import Call, Claim, Frozen, ItemRecord, Run, Score, State, Tokens
from ragate.soft import FIELD, SoftScores

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from ragate.embeddings import MiniLM
    from ragate.journal import Journal
    from ragate.judge import Judge
    from ragate.testset import Item, TestSet

CALL_TIMEOUT = 600.0
SILENT = 8
"""Scores without a single probability after which soft scores are given up."""
NO_PROBABILITIES = "scores: the judge gives no probabilities (logprobs), which soft scores need; take hard"


EventKind = Literal["start", "answer", "call", "score", "warning", "done"]


class Answer(Frozen):
    """What the system under test said; `contexts` is `None` where it does not tell what it retrieved."""

    answer: str
    contexts: tuple[str, ...] | None = None


class Target(Protocol):
    """A system under test. It limits its own concurrency: `answer` is called for all items at once."""

    @property
    def name(self) -> str:
        """What the run file calls it."""

    @property
    def identity(self) -> str:
        """Changes when its answers may: an interrupted run's are reused under the same identity only."""

    async def answer(self, item: Item) -> Answer:
        """Answer one item. TargetError ends the run; any other exception is this item's alone."""


@dataclass(frozen=True)
class Event:
    """Progress. `calls_total` is an estimate until every answer is there."""

    kind: EventKind
    items_total: int
    answers_done: int = 0
    scores_done: int = 0
    scores_total: int = 0
    calls_done: int = 0
    calls_total: int = 0
    message: str = ""
    """What `warning` warns of."""
    calls_computed: int = 0
    """Calls that were neither in the journal nor asked before."""
    tokens_in: int = 0
    """Prompt tokens that the engine was sent; 0 where no engine of ours judges."""
    tokens_cached: int = 0
    """Of those, taken from the prefix cache."""
    tokens_out: int = 0


class Timings(Frozen):
    """What an evaluation cost: everything that depends on time or on what was in the journal."""

    seconds: dict[str, float]
    """`total`, `prepare` (fingerprint), `answers` (until the last came), `embed` (computing embeddings)."""
    calls_judged: int
    """Distinct calls computed now."""
    calls_resumed: int
    """Distinct calls found in the journal."""
    answers_resumed: int
    call_ms: dict[str, float]
    """Call key -> milliseconds from submission to completion, of those computed now."""
    prompt_tokens_sent: int | None = None
    """Prompt tokens of this evaluation's engine requests; `None` where no engine of ours judges."""
    prompt_tokens_computed: int | None = None
    """Of those, not taken from the prefix cache."""
    engine: dict[str, int | float] = Field(default_factory=dict)
    """Differences of the engine's counters over this evaluation; phases as `seconds_<phase>`."""


def both_timings(first: Timings, second: Timings) -> Timings:
    """What two evaluations with one judge and one journal cost together."""

    def total(one: int | None, other: int | None) -> int | None:
        return None if one is None or other is None else one + other

    def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {name: round(one.get(name, 0) + other.get(name, 0), 3) for name in {**one, **other}}

    return Timings(
        seconds=added(first.seconds, second.seconds),
        calls_judged=first.calls_judged + second.calls_judged,
        calls_resumed=first.calls_resumed + second.calls_resumed,
        answers_resumed=first.answers_resumed + second.answers_resumed,
        call_ms=first.call_ms | second.call_ms,
        prompt_tokens_sent=total(first.prompt_tokens_sent, second.prompt_tokens_sent),
        prompt_tokens_computed=total(first.prompt_tokens_computed, second.prompt_tokens_computed),
        engine=added(first.engine, second.engine),
    )


def ignore(event: Event) -> None:
    """An `on_event` that does nothing."""


def evaluate(
    testset: TestSet,
    metrics: Sequence[str],
    judge: Judge,
    journal: Journal,
    *,
    embeddings: MiniLM | None = None,
    target: Target | None = None,
    judge_note: str | None = None,
    on_event: Callable[[Event], None] = ignore,
    call_timeout: float = CALL_TIMEOUT,
    ends: bool = True,
    soft: SoftScores | None = None,
    statements: Statements = "judge",
) -> tuple[Run, Timings]:
    """Score the items of `testset` by each metric and return the run and its timings.

    Answers come from `target`, or from the test set without one. A score times out when neither judge,
    embeddings nor target have moved for `call_timeout` seconds. What failed is a state of its score, not an
    exception.

    A run that may go on with the reserve does not end here (`ends`): until its journal has a `DoneEntry`, the
    target's answers are good for the next run.

    Raises ConfigError (unknown metric, no embeddings for answer relevance), TargetError, RunError (full disk,
    engine lost). On KeyboardInterrupt the journal is flushed first; running again with the same journal goes
    on from there.
    """
    return asyncio.run(
        aevaluate(
            testset,
            metrics,
            judge,
            journal,
            embeddings=embeddings,
            target=target,
            judge_note=judge_note,
            on_event=on_event,
            call_timeout=call_timeout,
            ends=ends,
            soft=soft,
            statements=statements,
        )
    )


async def aevaluate(
    testset: TestSet,
    metrics: Sequence[str],
    judge: Judge,
    journal: Journal,
    *,
    embeddings: MiniLM | None = None,
    target: Target | None = None,
    judge_note: str | None = None,
    on_event: Callable[[Event], None] = ignore,
    call_timeout: float = CALL_TIMEOUT,
    ends: bool = True,
    soft: SoftScores | None = None,
    statements: Statements = "judge",
) -> tuple[Run, Timings]:
    """As `evaluate`, inside a running event loop (a notebook)."""
    rows = metrics_named(metrics, statements)
    if embeddings is None and any(metric.embeds for metric in rows):
        raise ConfigError("metric answer_relevance needs an embedding model")
    evaluation = _Evaluation(
        testset.items, rows, judge, journal, embeddings, target, on_event, call_timeout, soft
    )
    usage = judge.usage()
    try:
        fields = await fingerprint(judge, rows, embeddings, soft)
        if soft is not None:
            soft.check(fields)
        evaluation.seconds["prepare"] = time.perf_counter() - evaluation.started
        items, scores, records = await evaluation.run()
        if ends:
            journal.append(DoneEntry())
    finally:
        await judge.aclose()
        journal.flush()
    calls, heads = _calls(records)
    run = Run(
        suite=testset.name,
        testset=testset.source,
        testset_hash=testset.hash,
        reserve_hash=testset.reserve_hash if any(item.reserve for item in items) else None,
        metrics=tuple(metric.name for metric in rows),
        judge=judge.name,
        judge_note=judge_note,
        target=target.name if target else "stored",
        fingerprint=fields,
        items=items,
        scores=scores,
        calls=calls,
        prompt_heads=heads,
        tokens=Tokens(
            calls=sum(len(record.calls) for record in records),
            distinct_calls=len(calls),
            prompt_tokens=sum(call.prompt_tokens for call in calls.values()),
            output_tokens=sum(call.output_tokens for call in calls.values()),
        ),
    )
    evaluation.emit("done")
    evaluation.seconds["total"] = time.perf_counter() - evaluation.started
    return run, _timings(evaluation, calls, usage)


async def fingerprint(
    judge: Judge, metrics: Iterable[Metric], embeddings: MiniLM | None, soft: SoftScores | None = None
) -> dict[str, str]:
    """What makes the scores, field by field: judge, prompts, decoding, metric versions, embedding model."""
    from ragate.judge import probe_hash
    from ragate.schemas import DECODING

    fields = {f"judge_{name}": value for name, value in judge.describe().items()}
    fields["decoding"] = DECODING
    if soft is not None:  # hard scores have no field: their fingerprints stay what they were
        fields[FIELD] = soft.identity
    fields["ragas"] = f"{version('ragas')} collections"
    fields["pydantic"] = version("pydantic")
    for metric in metrics:
        fields[f"prompt_{metric.name}"] = await probe_hash(metric, judge)
        if metric.embeds and embeddings is not None:
            fields["embeddings"] = embeddings.sha256
        if metric.cut:  # ragas' own way has no field: its fingerprints stay what they were
            fields["statements"] = metric.cut
    return fields


class _Evaluation:
    """One evaluation in flight."""

    def __init__(
        self,
        items: tuple[Item, ...],
        metrics: tuple[Metric, ...],
        judge: Judge,
        journal: Journal,
        embeddings: MiniLM | None,
        target: Target | None,
        on_event: Callable[[Event], None],
        call_timeout: float,
        soft: SoftScores | None,
    ) -> None:
        self.items, self.metrics = items, metrics
        self.judge, self.journal, self.embeddings, self.target = judge, journal, embeddings, target
        self.on_event, self.call_timeout = on_event, call_timeout
        self.soft = soft
        self.silent = 0
        """Scores without a probability before the judge gave any."""
        self.scorers = {metric.name: metric.scorer(judge, embeddings) for metric in metrics}
        self.calls_before = judge.calls_done
        self.computed_before = set(judge.call_ms)
        self.usage_before = judge.usage()
        self.embed_before = embeddings.seconds if embeddings else 0.0
        self.contexts: dict[str, int] = {}
        """Item id -> number of contexts, as the answers come."""
        self.calls_known = 0
        """Calls that the scores of these items will make."""
        self.answers_resumed = 0
        self.scores_done = 0
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        judge.journal = journal
        judge.on_call = lambda: self.emit("call")

    async def run(self) -> tuple[tuple[ItemRecord, ...], tuple[Score, ...], list[Record]]:
        """Everything at once; the results in the order of items, then metrics."""
        self.emit("start")
        for problem in self.journal.problems:
            self.emit("warning", problem)
        answers = [asyncio.ensure_future(self._answer(item)) for item in self.items]
        # Metric by metric, so that calls with the same beginning reach the judge together.
        scores = {
            (i, j): asyncio.ensure_future(self._score(metric, answer))
            for j, metric in enumerate(self.metrics)
            for i, answer in enumerate(answers)
        }
        try:
            await asyncio.gather(*answers, *scores.values())
        finally:
            tasks = [*answers, *scores.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.judge.on_call = lambda: None
        if self.silent and not self.judge.probable:  # of few scores, all without one
            raise ConfigError(NO_PROBABILITIES)
        ended = [scores[key].result() for key in sorted(scores)]
        items = tuple(answer.result() for answer in answers)
        return items, tuple(score for score, _ in ended), [record for _, record in ended]

    def emit(self, kind: EventKind, message: str = "") -> None:
        """Tell how far we are."""
        engine = self.judge.usage()

        def used(name: str) -> int:
            return int(engine.get(name, 0) - self.usage_before.get(name, 0))

        event = Event(
            kind,
            items_total=len(self.items),
            answers_done=len(self.contexts),
            scores_done=self.scores_done,
            scores_total=len(self.items) * len(self.metrics),
            calls_done=self.judge.calls_done - self.calls_before,
            calls_total=self._calls_total(),
            message=message,
            calls_computed=len(self.judge.call_ms) - len(self.computed_before),
            tokens_in=used("prompt_tokens"),
            tokens_cached=used("prompt_tokens_cached"),
            tokens_out=used("tokens_out"),
        )
        self.on_event(event)

    def _calls_total(self) -> int:
        """Calls that all scores will make; items without an answer yet count as the mean of the others."""
        known = len(self.contexts)
        usual = round(sum(self.contexts.values()) / known) if known else 4
        expected = sum(metric.calls(usual, "") for metric in self.metrics) * (len(self.items) - known)
        return self.calls_known + expected

    async def _answer(self, item: Item) -> ItemRecord:
        """The item with what the system under test says about it, from the journal where it is there."""
        answer, contexts, error = item.answer, item.contexts, None
        if self.target is not None:
            key = answer_key(self.target.identity, item.id, item.question)
            entry = self.journal.answer(key)
            if entry is None or entry.error is not None:  # what went wrong then may go well now
                entry = await self._ask_target(self.target, key, item)
                self.journal.append(entry)
            else:
                self.answers_resumed += 1
            answer, error = entry.answer, entry.error
            contexts = entry.contexts if entry.contexts is not None or error else item.contexts
        record = ItemRecord(
            id=item.id,
            question=item.question,
            reference=item.reference,
            answer=answer,
            contexts=contexts or (),
            kind=item.kind,
            cluster=item.cluster,
            critical=item.critical,
            reserve=item.reserve,
            error=error,
            line=item.line,
        )
        self.contexts[item.id] = len(record.contexts)
        if record.error is None:
            self.calls_known += sum(
                metric.calls(len(record.contexts), record.answer or "")
                for metric in self.metrics
                if not metric.missing(record)
            )
        self.seconds["answers"] = time.perf_counter() - self.started  # the last one stays
        self.emit("answer")
        if self.answers_resumed and len(self.contexts) == len(self.items):
            self.emit("warning", f"{self.answers_resumed} answers are those of the run that was interrupted")
        return record

    async def _ask_target(self, target: Target, key: str, item: Item) -> AnswerEntry:
        try:
            answer = await target.answer(item)
        except RagateError:
            raise
        except Exception as e:
            return AnswerEntry(key=key, error=_clean(f"the target failed: {sentence_of(e)}"))
        contexts = None if answer.contexts is None else tuple(map(_clean, answer.contexts))
        return AnswerEntry(key=key, answer=_clean(answer.answer), contexts=contexts)

    async def _score(self, metric: Metric, answer: asyncio.Future[ItemRecord]) -> tuple[Score, Record]:
        item = await answer
        record = Record(metric.name, item.id)
        RECORD.set(record)
        state, value, error, claims = await self._judge(metric, item, record)
        score = Score(
            item=item.id,
            metric=metric.name,
            state=state,
            value=value,
            error=error,
            claims=claims,
            calls=tuple(call.entry.key for call in record.calls),
        )
        self.scores_done += 1
        self.emit("score")
        return score, record

    async def _judge(
        self, metric: Metric, item: ItemRecord, record: Record
    ) -> tuple[State, float | None, str | None, tuple[Claim, ...]]:
        """(state, value, error, claims) of one score."""
        from ragate.judge import TruncatedError

        if item.error is not None:
            return "error", None, item.error, ()
        if missing := metric.missing(item):
            who = "the target" if self.target and missing in ("answer", "contexts") else "the test set"
            error = f"{who} gave no {missing} for item {item.id}, which {metric.name} needs"
            return "error", None, error, ()
        try:
            result = await self._unless_stalled(self.scorers[metric.name].ascore(**metric.row(item)))
            value = value_of(result.value)
            if value is None:
                return "nan", None, "ragas could not compute a score", ()
            claims = metric.claims(record, item, self._vector)
            if self.soft is not None:
                self._refuse_silent(claims)
                value = value_of(self.soft.value(metric.name, claims))
            return "ok", value, None, claims
        except RagateError:
            raise
        except TimeoutError as e:
            return "timeout", None, str(e), ()
        except TruncatedError as e:
            return "truncated", None, str(e), ()
        except Exception as e:
            return "error", None, _clean(sentence_of(e)), ()

    def _refuse_silent(self, claims: Sequence[Claim]) -> None:
        """Raise ConfigError where the judge gave no probability in any of the first `SILENT` scores: it never will."""
        self.judge.probable = self.judge.probable or any(claim.probability is not None for claim in claims)
        self.silent += not self.judge.probable
        if self.silent == SILENT:
            raise ConfigError(NO_PROBABILITIES)

    async def _unless_stalled(self, scoring: Coroutine[Any, Any, Any]) -> Any:
        """Await `scoring`; TimeoutError once nothing at all has moved for `call_timeout` seconds.

        A limit on the score itself would be wrong: all are in flight at once, the last waits for the first.
        """
        task = asyncio.ensure_future(scoring)
        try:
            while True:
                before = self._moved()
                done, _ = await asyncio.wait({task}, timeout=self.call_timeout)
                if done:
                    return task.result()
                if self._moved() == before:
                    raise TimeoutError(f"no answer from the judge in {self.call_timeout:g} s")
        finally:
            task.cancel()

    def _moved(self) -> tuple[float, ...]:
        embedded = self.embeddings.seconds if self.embeddings else 0.0
        return self.judge.progress(), embedded, len(self.contexts)

    def _vector(self, text: str) -> Sequence[float]:
        assert self.embeddings is not None
        vector: list[float] = self.embeddings.embed_text(text)
        return vector


def _calls(records: list[Record]) -> tuple[dict[str, Call], dict[str, str]]:
    """The distinct calls of a run by key, and the prompt heads that they share."""
    calls: dict[str, Call] = {}
    heads: dict[str, str] = {}
    for record in records:
        for call in record.calls:
            head, mark, rest = call.prompt.partition(INPUT_MARK)
            heads[call.model] = head + mark
            calls[call.entry.key] = Call(
                head=call.model,
                input=rest,
                output=call.entry.output,
                prompt_tokens=call.entry.prompt_tokens,
                output_tokens=call.entry.output_tokens,
                finish=call.entry.finish,
            )
    return calls, heads


def _timings(evaluation: _Evaluation, calls: dict[str, Call], before: dict[str, Any]) -> Timings:
    judge = evaluation.judge
    if evaluation.embeddings:
        evaluation.seconds["embed"] = evaluation.embeddings.seconds - evaluation.embed_before
    call_ms = {k: ms for k, ms in judge.call_ms.items() if k not in evaluation.computed_before}
    engine = _difference(_flat(judge.usage()), _flat(before))
    sent, cached = engine.get("prompt_tokens"), engine.get("prompt_tokens_cached", 0)
    return Timings(
        seconds={name: round(seconds, 3) for name, seconds in evaluation.seconds.items()},
        calls_judged=len(call_ms),
        calls_resumed=len(calls.keys() - call_ms.keys()),
        answers_resumed=evaluation.answers_resumed,
        call_ms=call_ms,
        prompt_tokens_sent=None if sent is None else int(sent),
        prompt_tokens_computed=None if sent is None else int(sent - cached),
        engine=engine,
    )


def _flat(usage: dict[str, Any]) -> dict[str, int | float]:
    flat = {name: value for name, value in usage.items() if name != "seconds"}
    return flat | {f"seconds_{phase}": seconds for phase, seconds in usage.get("seconds", {}).items()}


def _difference(now: dict[str, int | float], before: dict[str, int | float]) -> dict[str, int | float]:
    return {name: round(value - before.get(name, 0), 3) for name, value in now.items()}


def _clean(text: str) -> str:
    """Text that can be written as UTF-8: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def sentence_of(error: Exception) -> str:
    """One line about an exception: its text, with its type where that is not one of ours."""
    text = " ".join(str(error).split())[:500]
    ours = type(error).__module__.partition(".")[0] in ("ragate", "ragate_engine")
    return text if ours and text else f"{type(error).__name__}: {text}" if text else type(error).__name__
