"""Soft scores: probabilities in place of verdicts, in the fingerprint, and what a calibration tells the gate."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fake_embeddings import FakeEmbeddings
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from ragas.metrics.collections import ContextPrecision

from ragate import catalog
from ragate.config import Settings
from ragate.errors import CatalogError, ConfigError
from ragate.evaluate import evaluate
from ragate.journal import Journal
from ragate.judge import EngineJudge, Judge, probe_hash
from ragate.judging.mapping import Calibration, ScoreMap, save_calibration
from ragate.judging.sentences import WAY
from ragate.metrics import METRICS, Statements, metrics_named
from ragate.run import Claim, Run
from ragate.soft import SoftScores, average_precision
from ragate.suite import known_accuracy, shipped_calibrations, strange_calibration
from ragate.testset import Item, TestSet
from ragate_engine import Completion, SamplingParams, open_checkpoint, read_adapter

MAP = ScoreMap(temperature=2.0, knots=((0.0, 0.1), (1.0, 0.5)), method="isotonic")


def claim(probability: float | None, verdict: int = 1, similarity: float | None = None) -> Claim:
    return Claim(text="t", verdict=verdict, probability=probability, similarity=similarity)


def calibration(fingerprint: dict[str, str], metric: str = "faithfulness") -> Calibration:
    return Calibration.model_validate(
        {
            "judge": "fake",
            "metric": metric,
            "data": "d",
            "items": 9,
            "fingerprint": fingerprint,
            "scores": MAP,
            "shown_hard": 0.5,
            "shown_soft": 0.25,
        }
    )


def run_of(folder: Path, soft: SoftScores | None, engine: FakeEngine | None = None, count: int = 4) -> Run:
    items = tuple(
        Item(id=f"q{i}", question=f"Q{i}?", reference="R.", answer="A.", contexts=(f"one {i}", "two"))
        for i in range(count)
    )
    testset = TestSet(name="suite", source="suite.jsonl", items=items, hash="abc")
    with Journal.open(folder / "journal.jsonl") as journal, closing(engine or FakeEngine()) as own:
        run, _ = evaluate(
            testset,
            list(METRICS),
            EngineJudge(own, "fake"),  # type: ignore[arg-type]
            journal,
            embeddings=FakeEmbeddings(),  # type: ignore[arg-type]
            soft=soft,
        )
    return run


class Silent(FakeEngine):
    """Gives no probabilities in the scores of prompts that hold `about`."""

    about = ""

    def _complete(self, prompt: str, params: SamplingParams) -> Completion:
        done = super()._complete(prompt, params)
        bare = tuple(token._replace(top=()) for token in done.tokens)
        return replace(done, tokens=bare) if self.about in prompt else done


def test_a_soft_score_is_made_of_the_claims_probabilities(tmp_path: Path) -> None:
    hard, soft = run_of(tmp_path, None), run_of(tmp_path, SoftScores())
    assert soft.calls == hard.calls and soft.fingerprint == hard.fingerprint | {"scores": "soft"}
    assert "scores" not in hard.fingerprint
    for before, after in zip(hard.scores, soft.scores, strict=True):
        assert after.claims == before.claims
        chances = [each.probability or 0.0 for each in after.claims]
        if after.metric in ("faithfulness", "context_recall"):
            assert after.value == pytest.approx(np.mean(chances))
        elif after.metric == "answer_relevance":
            expected = (after.claims[0].similarity or 0.0) * chances[0]
            assert after.value == pytest.approx(max(expected, 0.0), abs=1e-6)


def test_a_map_changes_its_own_metric_alone(tmp_path: Path) -> None:
    plain = run_of(tmp_path, SoftScores())
    kept = {k: v for k, v in plain.fingerprint.items() if k in ("judge_weights", "prompt_faithfulness")}
    mapped = run_of(tmp_path, SoftScores(calibration(kept)))
    assert mapped.fingerprint["scores"].startswith("soft, faithfulness mapped by ")
    for before, after in zip(plain.scores, mapped.scores, strict=True):
        if after.metric == "faithfulness":
            mean = np.mean([0.1 + 0.4 * (each.probability or 0.0) for each in after.claims])
            assert after.value == pytest.approx(mean)
        else:
            assert after.value == before.value


def test_a_map_of_another_judge_is_refused_by_name(tmp_path: Path) -> None:
    said = "another judge_weights; calibrate this one with `ragate judge calibrate --statements judge`"
    with pytest.raises(ConfigError, match=said):
        run_of(tmp_path, SoftScores(calibration({"judge_weights": "other"})))


@pytest.mark.parametrize("field", ["judge_merged_adapter", "judge_adapter"])
def test_a_map_of_the_base_is_none_of_the_judge_with_an_adapter_nor_the_other_way(field: str) -> None:
    base = {"judge_weights": "w", "prompt_faithfulness": "p"}
    tuned = base | {field: "digest"}
    assert calibration(base).differences(tuned) == calibration(tuned).differences(base) == ["judge_adapter"]
    assert calibration(tuned).differences(tuned) == []


def test_a_map_of_a_merged_adapter_holds_beside_packed_weights() -> None:
    merged = {"judge_weights": "w", "prompt_faithfulness": "p", "judge_merged_adapter": "digest"}
    beside = {"judge_weights": "w", "prompt_faithfulness": "p", "judge_adapter": "digest"}
    assert calibration(merged).differences(beside) == calibration(beside).differences(merged) == []
    assert calibration(merged).differences(beside | {"judge_adapter": "another"}) == ["judge_adapter"]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_of_certain_verdicts_the_soft_precision_is_that_of_ragas(verdicts: list[int]) -> None:
    theirs = ContextPrecision._calculate_average_precision(None, verdicts)
    assert average_precision(verdicts) == pytest.approx(theirs, abs=1e-9)


def test_soft_precision_of_known_probabilities() -> None:
    assert average_precision([0.5, 0.5]) == pytest.approx(0.5)
    assert average_precision([1.0, 0.5]) == pytest.approx((1.0 + 0.5 * 0.75) / 1.5)
    assert average_precision([0.5, 1.0]) == pytest.approx((0.5 * 0.5 + 0.75) / 1.5)
    assert average_precision([0.0, 0.0]) == 0.0


def test_soft_relevance_is_the_similarity_as_far_as_the_answer_is_committal() -> None:
    assert SoftScores().value("answer_relevance", [claim(0.25, similarity=0.8)]) == pytest.approx(0.2)


def test_a_judge_without_probabilities_has_no_soft_scores(tmp_path: Path) -> None:
    for count in (4, 1):  # of 16 scores the first 8 tell, of 4 all
        with pytest.raises(ConfigError, match="take hard"):
            run_of(tmp_path / str(count), SoftScores(), Silent(), count)


def test_an_item_without_probabilities_costs_its_scores_and_no_more(tmp_path: Path) -> None:
    engine = Silent()
    engine.about = "Q0?"
    run = run_of(tmp_path, SoftScores(), engine)
    lost = [score for score in run.scores if score.value is None]
    assert {score.item for score in lost} == {"q0"} and len(run.scores) == 4 * len(METRICS)
    assert all("gave no probability" in (score.error or "") for score in lost) and lost


def test_a_verdict_without_a_probability_costs_its_score_and_no_more() -> None:
    with pytest.raises(ValueError, match="no probability of 1 of its 2 verdicts"):
        SoftScores().value("faithfulness", [claim(0.5), claim(None)])


def known(
    folder: Path, fingerprint: dict[str, str], shown_hard: float = 0.5, **settings: Any
) -> dict[str, float]:
    path = folder / "map.json"
    made = calibration({"judge_weights": "w", "prompt_faithfulness": "p"})
    save_calibration(made.model_copy(update={"shown_hard": shown_hard}), path)
    metrics = ("faithfulness", "context_recall", "context_precision")
    run = Run.model_construct(judge="fake", metrics=metrics, fingerprint=fingerprint)
    return known_accuracy(Settings(calibration=str(path), **settings), run)


def shipped_of(judge: str, way: Statements) -> Calibration:
    """What ships of the judge with statements made in this way."""
    (found,) = [
        each
        for each in shipped_calibrations(judge)
        if each.fingerprint.get("statements") == (WAY if way == "sentences" else None)
    ]
    return found


SHIPPED = [model for model in catalog.models() if model.adapter is not None]


@pytest.mark.parametrize("way", ["judge", "sentences"])
@pytest.mark.parametrize("model", SHIPPED, ids=lambda model: model.name)
def test_what_ships_with_a_judge_is_told_of_its_hard_scores_and_of_no_other_judge(
    model: catalog.Model, way: Statements
) -> None:
    kept = shipped_of(model.name, way)
    assert (kept.judge, kept.metric) == (model.name, "faithfulness")
    assert kept.items == 313 and 0.1 < kept.shown_hard < 0.5
    metrics = ("faithfulness", "context_recall")

    def told(**fields: str) -> dict[str, float]:
        run = Run.model_construct(
            judge=model.name, metrics=metrics, fingerprint=kept.fingerprint | {"decoding": "greedy"} | fields
        )
        return known_accuracy(Settings(), run)

    own = kept.fingerprint.get("decoding", "greedy")
    assert told(decoding=own) == {"faithfulness": (1 + kept.shown_hard) / 2}
    assert told(decoding=own, judge_merged_adapter="another") == {}
    assert told(decoding=own, scores="soft") == {}
    assert shipped_calibrations("../judges/" + model.name) == () == shipped_calibrations(model.base or "")


@pytest.mark.parametrize("way", ["judge", "sentences"])
@pytest.mark.parametrize("model", SHIPPED, ids=lambda model: model.name)
def test_what_ships_with_a_judge_is_of_its_adapter_and_of_todays_prompt(
    model: catalog.Model, way: Statements
) -> None:
    kept = shipped_of(model.name, way)
    assert model.adapter is not None
    try:
        checkpoint = open_checkpoint(catalog.model_path(model.name, pull=False))
    except CatalogError as e:
        pytest.skip(str(e))
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None

    def render(prompt: str) -> str:
        return " ".join(map(str, tokenizer.encode_chat([{"role": "user", "content": prompt}])))

    prompt = asyncio.run(
        probe_hash(*metrics_named(["faithfulness"], way), cast(Judge, SimpleNamespace(render=render)))
    )
    assert kept.fingerprint["prompt_faithfulness"] == prompt, "calibrate it again: the prompt is another"
    assert kept.fingerprint["judge_weights"] == model.sha256
    digest = read_adapter(model.adapter, checkpoint.config).digest
    assert kept.fingerprint["judge_merged_adapter"] == digest


def test_the_gate_is_told_what_the_scores_of_this_judge_show_of_a_drop(tmp_path: Path) -> None:
    mine = {"judge_weights": "w", "prompt_faithfulness": "p", "judge_backend": "any"}
    assert known(tmp_path, mine) == {"faithfulness": 0.75}  # hard scores show 0.5: 2 * 0.75 - 1
    assert known(tmp_path, mine | {"scores": "soft"}) == {"faithfulness": 0.625}
    other = {"context_recall": 0.9, "context_precision": 0.9}
    assert known(tmp_path, mine, judge_accuracy=0.9) == {"faithfulness": 0.75, **other}
    assert known(tmp_path, mine | {"judge_weights": "other"}) == {}


def test_a_calibration_of_contexts_leaves_what_ships_of_answers(tmp_path: Path) -> None:
    shipped = shipped_of("qwen-0.5b-judge", "judge")
    both = shipped.fingerprint | {"prompt_context_precision": "p"}
    contexts = {name: value for name, value in both.items() if name != "prompt_faithfulness"}
    save_calibration(calibration(contexts, "context_precision"), tmp_path / "map.json")
    metrics = ("faithfulness", "context_precision")
    run = Run.model_construct(judge=shipped.judge, metrics=metrics, fingerprint=both)
    settings = Settings(calibration=str(tmp_path / "map.json"))
    known = known_accuracy(settings, run)
    assert known == {"faithfulness": (1 + shipped.shown_hard) / 2, "context_precision": 0.75}
    # but one of answers, of the user's own, goes before it: here the judge guesses
    own = calibration(shipped.fingerprint).model_copy(update={"shown_hard": -0.02})
    save_calibration(own, tmp_path / "map.json")
    assert known_accuracy(settings, run) == {}


def test_a_calibration_of_another_judge_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    mine = {"judge_weights": "w", "prompt_faithfulness": "p"}
    save_calibration(calibration(mine), tmp_path / "map.json")
    settings = Settings(calibration=str(tmp_path / "map.json"))

    def said(fingerprint: dict[str, str]) -> tuple[str, ...]:
        return strange_calibration(settings, Run.model_construct(fingerprint=fingerprint))

    assert said(mine) == said({"judge_weights": "other"}) == ()  # the second did not score that metric
    (warning,) = said(mine | {"judge_weights": "other"})
    assert "map.json is of another judge or prompt (judge_weights)" in warning
    (warning,) = said(mine | {"judge_weights": "other", "statements": WAY})
    assert "`ragate judge calibrate --statements sentences` makes its own" in warning


def test_means_that_differ_by_rounding_show_nothing_of_a_drop(tmp_path: Path) -> None:
    mine = {"judge_weights": "w", "prompt_faithfulness": "p"}
    assert known(tmp_path, mine, shown_hard=5e-17) == known(tmp_path, mine, shown_hard=-0.1) == {}


def test_a_map_that_shows_more_than_a_drop_is_refused_by_its_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"map\.json: shown_hard: Input should be less than or equal to 1"):
        known(tmp_path, {}, shown_hard=3.0)


@pytest.mark.parametrize("scores", ["soft", "hard"])
def test_a_broken_map_is_found_out_before_the_judging(ragate: Any, scores: str) -> None:
    Path("map.json").write_text("{}")
    row = {"question": "Q?", "reference": "R.", "answer": "A.", "contexts": ["c"]}
    Path("cases.jsonl").write_text(json.dumps(row) + "\n")
    Path("ragate.toml").write_text(
        f'scores = "{scores}"\ncalibration = "map.json"\ntestset = "cases.jsonl"\n'
    )
    ended = ragate("eval", "--judge", "none.gguf", "-q")
    assert ended.code == 4 and "map.json: judge: Field required" in ended.err
