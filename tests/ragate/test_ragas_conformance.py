"""Our judge in ragas' own hands: its classes give our scores, on a fake engine and, slowly, on a real one."""

from __future__ import annotations

import asyncio
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from fake_embeddings import FakeEmbeddings
from fake_engine import FakeEngine
from ragas.dataset_schema import SingleTurnSample
from ragas.metrics import collections
from test_metrics import ReplayLLM

from ragate.evaluate import evaluate
from ragate.journal import Journal
from ragate.judge import EngineJudge
from ragate.metrics import METRICS
from ragate.testset import Item, TestSet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ragate.run import Run

EIFFEL = Item(
    id="eiffel",
    question="When was the Eiffel Tower finished?",
    reference="The Eiffel Tower was finished in 1889.",
    answer="It was finished in 1889, for the World's Fair in Paris.",
    contexts=(
        "The Eiffel Tower was built from 1887 to 1889 for the World's Fair.",
        "Bananas are botanically berries.",
    ),
)
MOON = Item(
    id="moon",
    question="Who walked on the Moon first?",
    reference='Neil Armstrong was the first; he called it "one small step".',
    answer="I don't know.",
    contexts=("Neil Armstrong stepped onto the Moon on 20 July 1969 – before Buzz Aldrin.",),
)


@pytest.fixture
def judge() -> Iterator[EngineJudge]:
    engine = FakeEngine()
    yield EngineJudge(engine, "fake")  # type: ignore[arg-type]
    engine.close()


# ragas' classes on our judge


def row(item: Item, *fields: str) -> dict[str, Any]:
    values = {
        "user_input": item.question,
        "reference": item.reference,
        "response": item.answer,
        "retrieved_contexts": list(item.contexts or ()),
    }
    return {field: values[field] for field in fields}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Faithfulness", ("user_input", "response", "retrieved_contexts")),
        ("ContextPrecision", ("user_input", "reference", "retrieved_contexts")),
        ("ContextPrecisionWithReference", ("user_input", "reference", "retrieved_contexts")),
        ("ContextPrecisionWithoutReference", ("user_input", "response", "retrieved_contexts")),
        ("ContextUtilization", ("user_input", "response", "retrieved_contexts")),
        ("ContextRecall", ("user_input", "reference", "retrieved_contexts")),
    ],
)
def test_every_class_of_the_family_scores_on_our_judge(
    judge: EngineJudge, name: str, fields: tuple[str, ...]
) -> None:
    metric = getattr(collections, name)(llm=judge)
    results = [asyncio.run(metric.ascore(**row(item, *fields))) for item in (EIFFEL, MOON)]
    assert all(0 <= result.value <= 1 for result in results)
    again = [asyncio.run(metric.ascore(**row(item, *fields))) for item in (EIFFEL, MOON)]
    assert [result.value for result in again] == [result.value for result in results]


def test_the_short_names_score_as_their_base_classes(judge: EngineJudge) -> None:
    fields = ("user_input", "reference", "retrieved_contexts")
    short = asyncio.run(collections.ContextPrecision(llm=judge).ascore(**row(EIFFEL, *fields)))
    base = asyncio.run(collections.ContextPrecisionWithReference(llm=judge).ascore(**row(EIFFEL, *fields)))
    assert short.value == base.value


def test_an_evasive_answer_has_no_relevance() -> None:
    def evade(prompt: str, schema: str) -> str | None:
        return (
            '{"question":"Who walked on the Moon first?","noncommittal":1}'
            if "noncommittal" in schema
            else None
        )

    engine = FakeEngine(answer=evade)
    metric = collections.AnswerRelevancy(llm=EngineJudge(engine, "fake"), embeddings=FakeEmbeddings())  # type: ignore[arg-type]
    assert asyncio.run(metric.ascore(**row(MOON, "user_input", "response"))).value == 0
    engine.close()


def test_ragas_checks_its_inputs_before_it_asks_us(judge: EngineJudge) -> None:
    metric = collections.Faithfulness(llm=judge)
    with pytest.raises(ValueError, match="response is missing"):
        asyncio.run(metric.ascore(user_input="Q?", response="", retrieved_contexts=["c"]))
    with pytest.raises(ValueError, match="retrieved_contexts cannot be empty"):
        asyncio.run(
            collections.ContextRecall(llm=judge).ascore(user_input="Q?", retrieved_contexts=[], reference="r")
        )
    assert judge.calls_done == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Faithfulness", ("user_input", "response", "retrieved_contexts")),
        ("LLMContextRecall", ("user_input", "reference", "retrieved_contexts")),
        ("LLMContextPrecisionWithReference", ("user_input", "reference", "retrieved_contexts")),
        ("LLMContextPrecisionWithoutReference", ("user_input", "response", "retrieved_contexts")),
    ],
)
def test_the_legacy_classes_score_on_our_judge_too(
    judge: EngineJudge, name: str, fields: tuple[str, ...]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ragas.metrics as legacy

        metric = getattr(legacy, name)(llm=judge)
    score = asyncio.run(metric._single_turn_ascore(SingleTurnSample(**row(EIFFEL, *fields)), None))
    assert 0 <= score <= 1
    assert judge.calls_done > 0


# A real model


def real_run(folder: Path, **settings: Any) -> Run:
    from ragate.catalog import model_path
    from ragate.embeddings import MiniLM
    from ragate.errors import CatalogError
    from ragate_engine import Engine, EngineConfig

    try:
        model = model_path("smollm2-135m")
        embeddings = MiniLM()
    except CatalogError as e:
        pytest.skip(str(e))
    testset = TestSet(name="two", source="two", items=(EIFFEL, MOON), hash="two")
    with (
        Engine.load(model, EngineConfig(device="cpu", **settings)) as engine,
        Journal.open(folder / "journal.jsonl") as journal,
    ):
        run, _ = evaluate(
            testset, list(METRICS), EngineJudge(engine, "smollm2-135m"), journal, embeddings=embeddings
        )
    embeddings.close()
    return run


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return real_run(tmp_path_factory.mktemp("reference"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_judge_ends_every_score_well_and_every_call_within_its_schema(reference_run: Run) -> None:
    assert {score.state for score in reference_run.scores} == {"ok"}
    assert {call.finish for call in reference_run.calls.values()} == {"stop"}
    for call in reference_run.calls.values():
        json.loads(call.output)
    for score in reference_run.scores:
        for claim in score.claims:
            assert claim.probability is not None
            assert abs(claim.probability - claim.verdict) <= 0.5 + 1e-6


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch": 1, "max_step_tokens": 512},
        {"max_batch": 8, "max_step_tokens": 32},
        {"max_batch": 64, "max_step_tokens": 512, "prefix_cache": False},
    ],
)
def test_batch_chunk_and_prefix_cache_change_no_byte_of_a_run(
    reference_run: Run, tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert real_run(tmp_path, **settings).model_dump_json() == reference_run.model_dump_json()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_judges_answers_replayed_through_ragas_give_the_same_scores(reference_run: Run) -> None:
    from ragate.embeddings import MiniLM

    run, embeddings = reference_run, MiniLM()
    llm = ReplayLLM({run.prompt_heads[c.head] + c.input: c.output for c in run.calls.values()})
    items = {item.id: item for item in run.items}
    for score in run.scores:
        metric = METRICS[score.metric]
        theirs = asyncio.run(metric.scorer(llm, embeddings).ascore(**metric.row(items[score.item]))).value
        assert score.value == pytest.approx(min(max(theirs, 0.0), 1.0), abs=1e-12)
    embeddings.close()


@pytest.mark.slow
def test_an_embedding_depends_on_its_text_alone_and_has_length_one() -> None:
    import torch

    from ragate.embeddings import MiniLM
    from ragate.metrics import cosine

    texts = [
        "When was the tower built?",
        "In which year was the tower finished?",
        "Bananas are berries.",
        "?",
        "x " * 999,
    ]
    model = MiniLM()
    together = asyncio.run(model.aembed_texts(texts))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    other = MiniLM()
    alone = [other.embed_text(text) for text in reversed(texts)][::-1]
    torch.set_num_threads(threads)
    assert together == alone
    assert all(len(vector) == 384 for vector in together)
    assert [sum(x * x for x in vector) for vector in together] == pytest.approx([1.0] * 5, abs=1e-6)
    assert cosine(together[0], together[1]) > 0.7 > 0.3 > cosine(together[0], together[2])
    model.close()
    other.close()


@pytest.mark.slow
def test_loading_the_embeddings_leaves_torchs_default_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ragate.embeddings import MiniLM

    asked: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", asked.append)  # a judge may be loading in another thread
    MiniLM().close()
    assert set(asked) <= {torch.float32}
