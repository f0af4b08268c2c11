"""An evaluation: every score has a state, the same inputs give the same bytes, and a stopped run goes on."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_embeddings import FakeEmbeddings
from fake_engine import FakeEngine
from ragas.metrics.result import MetricResult

from ragate.errors import ConfigError, RunError, TargetError
from ragate.evaluate import Answer, Event, evaluate
from ragate.journal import Journal, read_entries
from ragate.judge import EngineJudge
from ragate.judging.labelled import Labelled
from ragate.judging.prompts import asks_of
from ragate.judging.sentences import WAY
from ragate.metrics import METRICS, Metric
from ragate.run import load_run, save_run
from ragate.testset import Item, TestSet
from ragate_engine.errors import DeviceError
from ragate_engine.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ragate.evaluate import Timings
    from ragate.run import Run

ALL = list(METRICS)


def stored(n: int = 4, **changes: Any) -> TestSet:
    items = tuple(
        Item(
            id=f"q{i}",
            question=f"Question {i}?",
            reference=f"Reference {i}.",
            answer=f"Answer {i}.",
            contexts=(f"Context {i}.0", f"Context {i}.1"),
            line=i + 1,
        ).model_copy(update=changes.get(f"q{i}", {}))
        for i in range(n)
    )
    return TestSet(name="suite", source="suite.jsonl", items=items, hash="abc")


class App:
    """A system under test that answers from a function and counts what it was asked."""

    name = "app:answer"
    identity = "app:answer 1"

    def __init__(self, answer: Callable[[Item], Answer]) -> None:
        self._answer = answer
        self.asked: list[str] = []

    async def answer(self, item: Item) -> Answer:
        self.asked.append(item.id)
        await asyncio.sleep(0)
        return self._answer(item)


@pytest.fixture
def engines() -> Iterator[Callable[..., FakeEngine]]:
    made: list[FakeEngine] = []

    def make(**options: Any) -> FakeEngine:
        made.append(FakeEngine(**options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def run_once(
    folder: Path,
    engine: FakeEngine,
    testset: TestSet | None = None,
    metrics: list[str] | None = None,
    **options: Any,
) -> tuple[Run, Timings]:
    with Journal.open(folder / "journal.jsonl") as journal:
        return evaluate(
            testset or stored(),
            metrics or ALL,
            EngineJudge(engine, "fake"),
            journal,
            embeddings=FakeEmbeddings(),  # type: ignore[arg-type]
            **options,
        )


# What a run holds


def test_every_item_has_every_score_in_order_with_its_claims_and_calls(tmp_path: Path, engines: Any) -> None:
    run, _ = run_once(tmp_path, engines())
    assert [(s.item, s.metric) for s in run.scores] == [(f"q{i}", name) for i in range(4) for name in ALL]
    assert {s.state for s in run.scores} == {"ok"}
    for score in run.scores:
        assert score.value is not None
        assert 0 <= score.value <= 1
        assert len(score.calls) == METRICS[score.metric].calls(2, "")
        assert score.claims
        assert set(score.calls) <= run.calls.keys()
    assert (run.suite, run.testset, run.testset_hash) == ("suite", "suite.jsonl", "abc")
    assert (run.judge, run.target, run.metrics) == ("fake", "stored", tuple(ALL))
    assert run.items[2].line == 3


def test_tokens_count_what_was_wanted_and_what_was_distinct(tmp_path: Path, engines: Any) -> None:
    engine = engines()
    run, timings = run_once(tmp_path, engine)
    # 4 items x (2 precision + 1 recall + 2 faithfulness + 3 equal relevance calls)
    assert (run.tokens.calls, run.tokens.distinct_calls) == (32, 24)
    assert len(engine.prompts) == 24
    assert run.tokens.prompt_tokens == sum(map(len, engine.prompts))
    assert (timings.calls_judged, timings.calls_resumed) == (24, 0)
    assert timings.prompt_tokens_sent == timings.prompt_tokens_computed == run.tokens.prompt_tokens
    assert timings.call_ms.keys() == run.calls.keys()


def test_a_prompt_is_its_head_and_its_input(tmp_path: Path, engines: Any) -> None:
    engine = engines()
    run, _ = run_once(tmp_path, engine)
    prompts = {f"<user>{run.prompt_heads[call.head]}{call.input}<assistant>" for call in run.calls.values()}
    assert prompts == set(engine.prompts)
    assert len(run.prompt_heads) == 5
    assert max(len(call.input) for call in run.calls.values()) < 1000


def test_the_fingerprint_names_what_differs(tmp_path: Path, engines: Any) -> None:
    ours, _ = run_once(tmp_path / "a", engines())
    same, _ = run_once(tmp_path / "b", engines())
    other, _ = run_once(tmp_path / "c", engines(name="other weights"))
    assert same.fingerprint == ours.fingerprint
    assert {k for k in ours.fingerprint if ours.fingerprint[k] != other.fingerprint[k]} == {"judge_weights"}
    named = {"judge_quantization", "judge_tokenizer", "judge_backend", "judge_dtype", "decoding", "ragas"}
    named |= {"pydantic", "embeddings", *(f"prompt_{name}" for name in ALL)}
    assert named <= ours.fingerprint.keys()
    fewer, _ = run_once(tmp_path / "d", engines(), metrics=["faithfulness"])
    assert "embeddings" not in fewer.fingerprint
    assert "prompt_context_recall" not in fewer.fingerprint


LONG = "Sure, I can help you with that! " + " ".join(f"Fact {i} is true." for i in range(10))


def test_sentences_of_the_answer_are_judged_as_they_are_in_as_few_calls_as_it_takes(
    tmp_path: Path, engines: Any
) -> None:
    engine, events = engines(), []
    testset = stored(2, q1={"answer": LONG})
    ways: dict[str, Any] = {"statements": "sentences", "on_event": events.append}
    run, _ = run_once(tmp_path / "a", engine, testset, ["faithfulness"], **ways)
    first, second = run.scores
    assert [claim.text for claim in first.claims] == ["Answer 0."]
    assert [claim.text for claim in second.claims] == [f"Fact {i} is true." for i in range(10)]
    assert second.value == sum(claim.verdict for claim in second.claims) / 10
    assert {0, 1} == {claim.verdict for claim in second.claims}  # or the mean says little
    # none to cut the answer up, and five facts in each of two, as `ragate judge calibrate` asks
    labelled = Labelled("q1", "Question 1?", ("Context 1.0", "Context 1.1"), LONG, 1, None, "", "q1")
    asked = {f"<user>{ask.prompt}<assistant>" for ask in asks_of(labelled, "faithfulness")}
    assert len(asked) == 2 and asked < set(engine.prompts) and len(engine.prompts) == 3
    assert (events[-1].calls_done, events[-1].calls_total) == (3, 3)
    # another way of making scores, which the fingerprint says
    other, _ = run_once(tmp_path / "b", engines(), testset, ["faithfulness"])
    fields = {k: v for k, v in run.fingerprint.items() if other.fingerprint.get(k) != v}
    assert fields.keys() == {"statements", "prompt_faithfulness"} and fields["statements"] == WAY
    # of the other metrics it changes nothing
    recall, _ = run_once(tmp_path / "c", engines(), testset, ["context_recall"])
    assert run_once(tmp_path / "d", engines(), testset, ["context_recall"], **ways)[0] == recall


def test_events_count_up_to_their_totals(tmp_path: Path, engines: Any) -> None:
    events: list[Event] = []
    run_once(tmp_path, engines(), on_event=events.append)
    assert [events[0].kind, events[-1].kind] == ["start", "done"]
    assert events[0].calls_total == 4 * (4 + 1 + 2 + 3)  # four contexts are assumed until they are known
    last = events[-1]
    assert (last.answers_done, last.items_total) == (4, 4)
    assert (last.scores_done, last.scores_total) == (16, 16)
    assert (last.calls_done, last.calls_total) == (32, 32)
    done = [event.calls_done for event in events]
    assert done == sorted(done)


# States


def test_an_item_whose_target_failed_is_an_error_of_every_metric(tmp_path: Path, engines: Any) -> None:
    def answer(item: Item) -> Answer:
        if item.id == "q1":
            raise ConnectionError("refused")
        return Answer(answer=f"From the app {item.id}.", contexts=("c",))

    run, _ = run_once(tmp_path, engines(), target=App(answer))
    assert run.target == "app:answer"
    assert run.items[1].error == "the target failed: ConnectionError: refused"
    assert [run.score("q1", name).state for name in ALL] == ["error"] * 4  # type: ignore[union-attr]
    assert run.states("faithfulness") == {"ok": 3, "error": 1}
    assert run.items[0].answer == "From the app q0."
    assert run.items[0].contexts == ("c",)


def test_an_answer_that_failed_in_an_interrupted_run_is_asked_for_again(tmp_path: Path, engines: Any) -> None:
    def interrupt(event: Event) -> None:
        if event.answers_done == 4:
            signal.raise_signal(signal.SIGINT)

    def answer(item: Item) -> Answer:
        if item.id == "q1":
            raise ConnectionError("refused")
        return Answer(answer="A.", contexts=("c",))

    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path, engines(), target=App(answer), on_event=interrupt)
    again = App(lambda item: Answer(answer="B.", contexts=("c",)))
    run, timings = run_once(tmp_path, engines(), target=again)
    assert again.asked == ["q1"]
    assert timings.answers_resumed == 3
    assert [(item.answer, item.error) for item in run.items] == [(a, None) for a in ("A.", "B.", "A.", "A.")]


@pytest.mark.parametrize(
    ("answer", "errors"),
    [
        (
            Answer(answer="", contexts=("c",)),
            {"faithfulness": "the target gave no answer", "answer_relevance": "the target gave no answer"},
        ),
        (
            Answer(answer="a", contexts=()),
            dict.fromkeys(
                ["context_precision", "context_recall", "faithfulness"], "the target gave no contexts"
            ),
        ),
        (Answer(answer="a"), {}),  # a target that does not tell its contexts: the stored ones count
    ],
)
def test_what_the_target_left_out_is_an_error_of_the_metrics_that_need_it(
    tmp_path: Path, engines: Any, answer: Answer, errors: dict[str, str]
) -> None:
    run, _ = run_once(tmp_path, engines(), target=App(lambda item: answer))
    found = {s.metric: s.error for s in run.scores if s.item == "q0" and s.error}
    assert found == {name: f"{text} for item q0, which {name} needs" for name, text in errors.items()}


def test_an_answer_with_half_a_surrogate_pair_can_still_be_saved(tmp_path: Path, engines: Any) -> None:
    app = App(lambda item: Answer(answer="bad \ud800 text", contexts=("c \udfff",)))
    run, _ = run_once(tmp_path, engines(), target=app)
    save_run(run, tmp_path / "run.json")
    assert load_run(tmp_path / "run.json").items[0].answer == "bad ? text"


def test_a_judge_that_does_nothing_for_the_whole_timeout_gives_a_timeout(
    tmp_path: Path, engines: Any
) -> None:
    engine = engines(hang=lambda prompt: "Context 1.0" in prompt)
    run, _ = run_once(tmp_path, engine, call_timeout=0.3)
    assert run.states("context_precision") == {"ok": 3, "timeout": 1}
    assert run.score("q1", "faithfulness").error == "no answer from the judge in 0.3 s"  # type: ignore[union-attr]
    assert run.states("answer_relevance") == {"ok": 4}


def test_a_slow_judge_that_works_is_no_timeout(tmp_path: Path, engines: Any) -> None:
    class Busy(FakeEngine):
        """Hangs on one prompt, but its step counter says that it works on something."""

        def usage(self) -> Any:
            self._usage.steps += 1
            if self._usage.steps > 8:
                for prompt, params, future in held:
                    with self._wake:
                        self._queue.append((prompt, params, future))
                        self._wake.notify()
                held.clear()
            return super().usage()

        def submit(self, prompt: Any, params: Any = None, adapter: Any = None) -> Any:
            future = super().submit(prompt, params)
            if self.hang(self.prompts[-1]):
                held.append((self.prompts[-1], self.params[-1], future))
            return future

    held: list[Any] = []
    engine = Busy(hang=lambda prompt: "Context 1.0" in prompt)
    run, _ = run_once(tmp_path, engine, metrics=["context_recall"], call_timeout=0.05)
    assert run.states("context_recall") == {"ok": 4}
    engine.close()


def test_a_context_beyond_the_window_is_an_error_that_names_item_and_numbers(
    tmp_path: Path, engines: Any
) -> None:
    testset = stored(2, q1={"contexts": ("long " * 4000,)})
    run, _ = run_once(tmp_path, engines(max_len=15_000), testset, metrics=["context_precision"])
    assert run.states("context_precision") == {"ok": 1, "error": 1}
    error = run.score("q1", "context_precision").error  # type: ignore[union-attr]
    assert error is not None
    assert error.startswith("context too long: item q1 needs ")
    assert "the judge's window is 15000" in error


def test_a_truncated_answer_is_counted_as_such(tmp_path: Path, engines: Any) -> None:
    def endless(prompt: str, schema: str) -> str | None:
        return '{"reason":"' + "😀" * 9999 if "Context 2.1" in prompt and "verdict" in schema else None

    run, _ = run_once(tmp_path, engines(answer=endless), metrics=["context_precision"])
    score = run.score("q2", "context_precision")
    assert score is not None
    assert (score.state, score.value, score.claims, len(score.calls)) == ("truncated", None, (), 2)


def test_a_score_whose_claims_cannot_be_read_is_an_error_of_it_alone(
    tmp_path: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = METRICS["context_recall"].claims

    def sloppy(record: Any, item: Any, vectors: Any) -> Any:
        if item.id == "q1":
            raise ValueError("zip() argument 2 is longer than argument 1")
        return claims(record, item, vectors)

    monkeypatch.setitem(METRICS, "context_recall", replace(METRICS["context_recall"], claims=sloppy))
    run, _ = run_once(tmp_path, engines(), metrics=["context_recall"])
    assert run.states("context_recall") == {"ok": 3, "error": 1}
    score = run.score("q1", "context_recall")
    assert score is not None
    assert (score.value, score.claims) == (None, ())
    assert score.error == "ValueError: zip() argument 2 is longer than argument 1"


def test_a_score_that_is_not_a_number_is_counted_and_not_averaged(
    tmp_path: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nan:
        async def ascore(self, **row: Any) -> MetricResult:
            return MetricResult(value=float("nan") if row["user_input"] == "Question 0?" else 0.5)

    monkeypatch.setattr(Metric, "scorer", lambda self, llm, embeddings=None: Nan())
    monkeypatch.setattr("ragate.judge.probe_hash", lambda metric, judge: asyncio.sleep(0, "probe"))
    monkeypatch.setitem(
        METRICS, "context_recall", Metric("context_recall", "", ("question",), lambda *_: (), lambda *_: 0)
    )
    run, _ = run_once(tmp_path, engines(), metrics=["context_recall"])
    assert run.states("context_recall") == {"nan": 1, "ok": 3}
    assert run.mean("context_recall") == 0.5


# Errors that end the run


def test_an_unreachable_target_ends_the_run(tmp_path: Path, engines: Any) -> None:
    def answer(item: Item) -> Answer:
        raise TargetError("http://localhost:1: connection refused")

    with pytest.raises(TargetError, match="connection refused"):
        run_once(tmp_path, engines(), target=App(answer))


def test_a_lost_engine_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, engines: Any) -> None:
    calls = 0

    def lose(prompt: str) -> Exception | None:
        nonlocal calls
        calls += 1
        return DeviceError("the card is gone") if calls > 10 else None

    with pytest.raises(RunError, match="the card is gone"):
        run_once(tmp_path, engines(fail=lose))
    engine = engines()
    run, timings = run_once(tmp_path, engine)
    assert (timings.calls_resumed, timings.calls_judged, len(engine.prompts)) == (10, 14, 14)
    assert run.states("faithfulness") == {"ok": 4}


def test_a_full_disk_ends_the_run_and_loses_nothing(
    tmp_path: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, 4000

    def nearly_full(fd: int, data: Any) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr("ragate.journal.os.write", nearly_full)
    with pytest.raises(RunError, match="No space left on device"):
        run_once(tmp_path, engines())
    monkeypatch.undo()
    engine = engines()
    run, timings = run_once(tmp_path, engine)
    assert timings.calls_resumed > 0
    assert timings.calls_resumed + len(engine.prompts) == run.tokens.distinct_calls == 24


def test_answer_relevance_without_an_embedding_model_is_refused(tmp_path: Path, engines: Any) -> None:
    with (
        Journal.open(tmp_path / "journal.jsonl") as journal,
        pytest.raises(ConfigError, match="answer_relevance needs an embedding model"),
    ):
        evaluate(stored(), ALL, EngineJudge(engines(), "fake"), journal)


# The same bytes


def test_the_order_in_which_calls_end_changes_no_byte(tmp_path: Path, engines: Any) -> None:
    class FirstInFirstOut(FakeEngine):
        def submit(self, prompt: Any, params: Any = None, adapter: Any = None) -> Any:
            future = super().submit(prompt, params)
            with self._wake:
                self._queue.sort(key=lambda entry: self.prompts.index(entry[0]), reverse=True)
            return future

    engine = FirstInFirstOut()
    one, _ = run_once(tmp_path / "a", engines())
    two, _ = run_once(tmp_path / "b", engine)
    engine.close()
    assert one.model_dump_json() == two.model_dump_json()


SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from fake_engine import FakeEngine
    import test_evaluate as t
    from ragate.evaluate import Answer
    from ragate.run import save_run

    folder, kill_at = Path(sys.argv[2]), int(sys.argv[3])

    def watch(event):
        if event.kind == "call" and event.calls_done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = FakeEngine()
    app = t.App(lambda item: Answer(answer="From the app.", contexts=("c " + item.id, "d")))
    run, timings = t.run_once(folder, engine, target=app, on_event=watch)
    save_run(run, folder / "run.json")
    print(json.dumps([len(app.asked), len(engine.prompts), timings.calls_resumed]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes_without_judging_twice(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def start(folder: str, kill_at: int) -> tuple[int, list[int]]:
        arguments = [str(script), str(Path(__file__).parent), str(tmp_path / folder), str(kill_at)]
        done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
        return done.returncode, json.loads(done.stdout or "[]")

    assert start("whole", 0) == (0, [4, 21, 0])
    assert start("killed", 9) == (-signal.SIGKILL, [])
    assert not (tmp_path / "killed" / "run.json").exists()
    entries, _, _ = read_entries((tmp_path / "killed" / "journal.jsonl").read_bytes())
    kept = sum(entry.kind == "call" for entry in entries)
    assert kept > 3
    assert start("killed", 0) == (0, [0, 21 - kept, kept])
    assert (tmp_path / "killed" / "run.json").read_bytes() == (tmp_path / "whole" / "run.json").read_bytes()


def test_ctrl_c_flushes_the_journal_and_the_next_run_goes_on_from_there(tmp_path: Path, engines: Any) -> None:
    app = App(lambda item: Answer(answer="A.", contexts=("c",)))
    whole, _ = run_once(tmp_path / "whole", engines(), target=app)

    def interrupt(event: Event) -> None:
        if event.calls_done == 5 and event.kind == "call":
            signal.raise_signal(signal.SIGINT)

    app = App(lambda item: Answer(answer="A.", contexts=("c",)))
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path, engines(), target=app, on_event=interrupt)
    assert sorted(app.asked) == ["q0", "q1", "q2", "q3"]
    again, engine, events = App(app._answer), engines(), list[Event]()
    run, timings = run_once(tmp_path, engine, target=again, on_event=events.append)
    assert again.asked == []
    assert timings.answers_resumed == 4
    assert timings.calls_resumed >= 4
    assert len(engine.prompts) == timings.calls_judged == run.tokens.distinct_calls - timings.calls_resumed
    assert run.model_dump_json() == whole.model_dump_json()
    warnings = [event.message for event in events if event.kind == "warning"]
    assert warnings == ["4 answers are those of the run that was interrupted"]


def test_a_finished_run_keeps_its_calls_but_asks_the_target_anew(tmp_path: Path, engines: Any) -> None:
    first = App(lambda item: Answer(answer="A.", contexts=("c",)))
    run_once(tmp_path, engines(), target=first)
    second, engine = App(first._answer), engines()
    _, timings = run_once(tmp_path, engine, target=second)
    assert len(second.asked) == 4
    assert (engine.prompts, timings.calls_judged) == ([], 0)


def test_another_target_does_not_inherit_the_answers_of_an_interrupted_run(
    tmp_path: Path, engines: Any
) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "call":
            signal.raise_signal(signal.SIGINT)

    app = App(lambda item: Answer(answer="A.", contexts=("c",)))
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path, engines(), target=app, on_event=interrupt)
    changed = App(lambda item: Answer(answer="B.", contexts=("c",)))
    changed.identity = "app:answer 2"
    run, _ = run_once(tmp_path, engines(), target=changed)
    assert {item.answer for item in run.items} == {"B."}


def test_a_target_on_the_same_engine_does_not_deadlock(tmp_path: Path, engines: Any) -> None:
    engine = engines()

    class Writer(App):
        async def answer(self, item: Item) -> Answer:
            completion = await asyncio.wrap_future(
                engine.submit(engine.tokenizer.encode(item.question), SamplingParams(max_tokens=50))
            )
            return Answer(answer=completion.text, contexts=("c",))

    run, _ = run_once(tmp_path, engine, target=Writer(lambda item: Answer(answer="")))
    assert {state for name in ALL for state in run.states(name)} == {"ok"}
    assert all(item.answer and item.answer.startswith("It is ") for item in run.items)


def test_importing_the_evaluation_brings_neither_ragas_nor_torch() -> None:
    code = (
        "import sys, ragate.evaluate, ragate.journal, ragate.metrics;"
        "print([m for m in ('ragas', 'torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
