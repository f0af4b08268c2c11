"""The four metrics: ragas' own numbers to 1e-12, and claims that say what they were made of."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from fake_embeddings import FakeEmbeddings
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from ragas.llms.base import InstructorBaseRagasLLM
from ragas.metrics.collections import AnswerRelevancy, ContextPrecision, ContextRecall, Faithfulness

from ragate.errors import ConfigError
from ragate.evaluate import evaluate
from ragate.journal import CallEntry, Journal
from ragate.judge import EngineJudge
from ragate.metrics import METRICS, JudgedCall, Record, cosine, metrics_named, value_of
from ragate.run import Claim, ItemRecord
from ragate.testset import Item, TestSet

if TYPE_CHECKING:
    from pathlib import Path

ITEM = ItemRecord(id="q", question="Why?", reference="So.", answer="Thus.", contexts=("one", "two"))


class ReplayLLM(InstructorBaseRagasLLM):  # type: ignore[misc]
    """Gives ragas the recorded output for each prompt, and knows nothing of ours."""

    is_async = True

    def __init__(self, outputs: dict[str, str]) -> None:
        self.outputs = outputs

    def generate(self, prompt: str, response_model: Any) -> Any:
        return response_model.model_validate_json(self.outputs[prompt])

    async def agenerate(self, prompt: str, response_model: Any) -> Any:
        return self.generate(prompt, response_model)


def item(i: int) -> Item:
    return Item(
        id=f"q{i}",
        question=f"Question {i} about blocks?",
        reference=f"Reference {i}.",
        answer=f"Answer {i} of the system.",
        contexts=tuple(f"Context {i}.{j}" for j in range(1 + i % 4)),
    )


def test_recorded_answers_replayed_through_ragas_give_the_same_scores(tmp_path: Path) -> None:
    items = tuple(item(i) for i in range(12))
    testset = TestSet(name="t", source="t.jsonl", items=items, hash="h")
    engine, embeddings = FakeEngine(), FakeEmbeddings()
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        run, _ = evaluate(testset, list(METRICS), EngineJudge(engine, "fake"), journal, embeddings=embeddings)
    engine.close()
    llm = ReplayLLM({run.prompt_heads[c.head] + c.input: c.output for c in run.calls.values()})
    ragas = {
        "context_precision": ContextPrecision(llm=llm),
        "context_recall": ContextRecall(llm=llm),
        "faithfulness": Faithfulness(llm=llm),
        "answer_relevance": AnswerRelevancy(llm=llm, embeddings=embeddings),
    }
    fields = {
        "context_precision": ("user_input", "reference", "retrieved_contexts"),
        "context_recall": ("user_input", "reference", "retrieved_contexts"),
        "faithfulness": ("user_input", "response", "retrieved_contexts"),
        "answer_relevance": ("user_input", "response"),
    }

    async def rescore() -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for name, metric in ragas.items():
            for i in items:
                row = {
                    "user_input": i.question,
                    "reference": i.reference,
                    "response": i.answer,
                    "retrieved_contexts": list(i.contexts or ()),
                }
                result = await metric.ascore(**{field: row[field] for field in fields[name]})
                values.setdefault(name, []).append(result.value)
        return values

    theirs = asyncio.run(rescore())
    for name, values in theirs.items():
        ours = run.values(name)
        assert len(ours) == 12
        for i, value in zip(items, values, strict=True):
            assert ours[i.id] == pytest.approx(min(max(value, 0.0), 1.0), abs=1e-12)
        assert run.mean(name) == pytest.approx(sum(min(max(v, 0.0), 1.0) for v in values) / 12, abs=1e-12)
    assert len({round(v, 6) for v in theirs["context_recall"]}) > 1  # not a comparison of constants


def judged(model: str, output: Any, *verdicts: float | None) -> JudgedCall:
    text = json.dumps(output)
    key = hashlib.sha256(text.encode()).hexdigest()
    entry = CallEntry(
        key=key, output=text, prompt_tokens=1, output_tokens=1, finish="stop", verdicts=tuple(verdicts)
    )
    return JudgedCall(model, "prompt", entry)


def vectors(text: str) -> list[float]:
    return {"Why?": [1.0, 0.0], "Why so?": [0.6, 0.8]}[text]


def test_faithfulness_claims_are_the_statements_of_the_second_call() -> None:
    statements = [
        {"statement": "A.", "reason": "it says so", "verdict": 1},
        {"statement": "B.", "reason": "it does not", "verdict": 0},
    ]
    record = Record(
        "faithfulness",
        "q",
        [
            judged("StatementGeneratorOutput", {"statements": ["A.", "B."]}),
            judged("NLIStatementOutput", {"statements": statements}, 0.9, 0.2),
        ],
    )
    assert METRICS["faithfulness"].claims(record, ITEM, vectors) == (
        Claim(text="A.", verdict=1, probability=0.9, reason="it says so"),
        Claim(text="B.", verdict=0, probability=0.2, reason="it does not"),
    )


def test_context_recall_claims_are_sentences_of_the_reference() -> None:
    output = {"classifications": [{"statement": "So.", "reason": "not found", "attributed": 0}]}
    record = Record("context_recall", "q", [judged("ContextRecallOutput", output, None)])
    assert METRICS["context_recall"].claims(record, ITEM, vectors) == (
        Claim(text="So.", verdict=0, probability=None, reason="not found"),
    )


def test_context_precision_claims_point_at_their_context() -> None:
    pairs = [({"reason": "r1", "verdict": 1}, 0.8), ({"reason": "r0", "verdict": 0}, 0.3)]
    calls = [judged("ContextPrecisionOutput", output, probability) for output, probability in pairs]
    record = Record("context_precision", "q", calls)
    assert METRICS["context_precision"].claims(record, ITEM, vectors) == (
        Claim(text="", verdict=1, probability=0.8, reason="r1", context=0),
        Claim(text="", verdict=0, probability=0.3, reason="r0", context=1),
    )


def test_answer_relevance_has_one_claim_for_three_equal_calls() -> None:
    call = judged("AnswerRelevanceOutput", {"question": "Why so?", "noncommittal": 0}, 0.1)
    assert METRICS["answer_relevance"].claims(Record("answer_relevance", "q", [call] * 3), ITEM, vectors) == (
        Claim(text="Why so?", verdict=1, probability=0.9, similarity=0.6),
    )


def test_each_metric_says_which_field_an_item_lacks() -> None:
    bare = ItemRecord(id="q", question="Why?", answer="")
    assert [metric.missing(bare) for metric in METRICS.values()] == [
        "reference",
        "contexts",
        "answer",
        "answer",
    ]
    assert all(metric.missing(ITEM) is None for metric in METRICS.values())


def test_metric_names_are_checked_and_ragas_spelling_is_understood() -> None:
    chosen = metrics_named(["answer_relevancy", "faithfulness", "answer_relevance"])
    assert [metric.name for metric in chosen] == ["answer_relevance", "faithfulness"]
    with pytest.raises(ConfigError, match="no metric 'bleu'; choose from context_precision, context_recall"):
        metrics_named(["faithfulness", "bleu"])
    with pytest.raises(ConfigError, match="none named"):
        metrics_named([])


@pytest.mark.parametrize(
    ("score", "value"), [(0.5, 0.5), (-0.1, 0.0), (1.0000000000000002, 1.0), (math.nan, None)]
)
def test_a_value_is_in_the_unit_interval_or_missing(score: float, value: float | None) -> None:
    assert value_of(score) == value


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=8))
def test_a_cosine_is_symmetric_and_bounded(pairs: list[tuple[float, float]]) -> None:
    a, b = [x + 2 for x, _ in pairs], [y - 2 for _, y in pairs]
    assert cosine(a, b) == cosine(b, a)
    assert -1 - 1e-12 <= cosine(a, b) < 0
    assert cosine(a, a) == pytest.approx(1)
