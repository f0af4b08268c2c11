"""`ragate judge calibrate`: from labelled answers to figures, a map and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browser import AXE, CHROMIUM, Browser
from command import Ragate
from fake_engine import FakeEngine

from ragate.journal import CallEntry, read_entries
from ragate.judging.asks import Row, Said, answer_row, said_of
from ragate.judging.labelled import Labelled
from ragate.judging.mapping import apply, crossfitted, load_calibration
from ragate.judging.quality import Quality, Source, quality_of
from ragate.report.calibration import headline_of, render_calibration
from ragate.verdicts import verdict_probabilities

FOLDER = Path(".ragate/judge/judge.gguf/labelled")


def row(name: str, label: int, soft: float, *, overlap: float = 0.5, cluster: str = "") -> Row:
    said = Said(text=f"{name} says", verdict=int(soft >= 0.5), probability=soft, reason="why")
    return Row(
        id=name,
        label=label,
        soft=soft,
        least=soft,
        mean=soft,
        hard=said.verdict,
        overlap=overlap,
        brevity=-1.0,
        generator="g",
        cluster=cluster or name,
        question="q",
        answer="a",
        said=(said,),
    )


def quality(rows: list[Row]) -> Quality:
    return quality_of(rows, Source("j", "faithfulness", "sentences", "d", 0, ()), resamples=200)


def good_rows(count: int = 80) -> list[Row]:
    random = np.random.default_rng(0)
    return [
        row(f"r{i}", i % 2, round(float(np.clip(0.3 + 0.4 * (i % 2) + random.normal() / 4, 0, 1)), 6))
        for i in range(count)
    ]


def test_a_calibration_writes_figures_a_map_and_a_page(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str]
) -> None:
    ended = ragate("judge", "calibrate", labelled(), "--judge", "judge.gguf", "-q")
    assert ended.code == 0, ended.err
    assert "word overlap" in ended.out and "faithfulness.html" in ended.out
    found = Quality.model_validate_json((FOLDER / "faithfulness-sentences.json").read_text())
    assert (found.items, found.positive, found.clusters, found.failed) == (12, 6, 6, ())
    assert found.scores[0].auroc.lower <= found.scores[0].auroc.value <= found.scores[0].auroc.upper
    kept = load_calibration(FOLDER / "faithfulness-map.json")
    assert kept.metric == "faithfulness" and kept.shown_hard == pytest.approx(found.shown_hard)
    assert {"judge_weights", "prompt_faithfulness", "decoding"} <= kept.fingerprint.keys()
    page = (FOLDER / "faithfulness.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(" in page


def test_what_is_set_for_evaluations_does_not_thin_out_a_calibration(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str]
) -> None:
    Path("ragate.toml").write_text('limit = 3\nout = "elsewhere"\njudge = "judge.gguf"\n')
    assert ragate("judge", "calibrate", labelled(), "-q").code == 0
    assert len(engines[0].prompts) == 12 and not Path("elsewhere").exists()
    ended = ragate("judge", "calibrate", labelled(), "-q", "--limit", "6", "--out", "here")
    assert ended.code == 0 and len(engines[1].prompts) == 6 and Path("here/faithfulness.html").exists()


def test_each_call_is_asked_as_ragas_asks_with_our_sentences_as_its_statements(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str]
) -> None:
    assert ragate("judge", "calibrate", labelled(), "--judge", "judge.gguf", "-q").code == 0
    prompt = next(p for p in engines[0].prompts if '"3 is the first."' in p)
    asked = json.loads(prompt.partition("input\ninput: ")[2].rpartition("Output:")[0])
    assert asked == {
        "context": "3 is the first.\n3 is also a number.",
        "statements": ["3 is the first.", "It is number 3, <script>alert(3)</script> they say."],
    }


def test_a_calibration_that_was_stopped_goes_on_and_asks_nothing_twice(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str]
) -> None:
    command = ("judge", "calibrate", labelled(), "--judge", "judge.gguf", "-q", "--format", "json")
    first = ragate(*command)
    journal = FOLDER / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:20])  # as kill -9 leaves it
    kept = [entry for entry in read_entries(journal.read_bytes())[0] if isinstance(entry, CallEntry)]
    assert ragate(*command) == first
    assert len(engines[1].prompts) == 12 - len(kept)
    assert ragate(*command) == first and engines[2].prompts == []


def test_ragas_own_pipeline_stands_beside_the_sentences_on_the_page(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str]
) -> None:
    command = ("judge", "calibrate", labelled(), "--judge", "judge.gguf", "-q")
    assert ragate(*command).code == 0
    assert "ragas&#39; pipeline" not in (FOLDER / "faithfulness.html").read_text()
    assert ragate(*command, "--statements", "judge").code == 0
    assert any("break down each sentence" in prompt.lower() for prompt in engines[1].prompts)
    page = (FOLDER / "faithfulness.html").read_text()
    assert "judge by sentences, hard verdicts" in page
    assert (FOLDER / "faithfulness-judge.json").exists()


def test_relevance_is_judged_context_by_context(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str]
) -> None:
    ended = ragate("judge", "calibrate", labelled(), "--judge", "judge.gguf", "-q", "--calls", "relevance")
    assert ended.code == 0, ended.err
    found = Quality.model_validate_json((FOLDER / "relevance.json").read_text())
    assert (found.items, found.positive) == (24, 12)
    assert load_calibration(FOLDER / "relevance-map.json").metric == "context_precision"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"faithful": 1}, "labelled.jsonl: faithful: it is 1 everywhere"),
        ({"answer": ""}, "labelled.jsonl:1: answer: expected a text"),
    ],
)
def test_labels_that_tell_nothing_apart_are_refused_before_the_judge_is_loaded(
    ragate: Ragate,
    engines: list[FakeEngine],
    labelled: Callable[..., str],
    changes: dict[str, object],
    said: str,
) -> None:
    ended = ragate("judge", "calibrate", labelled(**changes), "--judge", "judge.gguf", "-q")
    assert ended.code == 4 and said in ended.err and not engines
    assert not Path(".ragate").exists()


def test_all_statements_of_an_answer_must_hold() -> None:
    item = Labelled("i", "q", ("a b",), "alpha beta. gamma.", 0, None, "g", "c")
    output = json.dumps(
        {
            "statements": [
                {"statement": "x", "reason": "r", "verdict": 1},
                {"statement": "y", "reason": "r", "verdict": 0},
            ]
        }
    )
    found = answer_row(item, said_of("nli", output, (0.9, 0.2)))
    assert (found.soft, found.least) == (pytest.approx(0.18), 0.2)
    assert (found.mean, found.hard) == (pytest.approx(0.55), 0.5)
    none = answer_row(item, said_of("nli", output, (0.9, 0.0)))
    assert (
        none.soft == pytest.approx(0.9e-6) and none.least == 0
    )  # the other statements still order the answers


def test_a_judge_without_probabilities_counts_by_its_verdicts() -> None:
    (said,) = said_of("precision", '{"reason":"r","verdict":1}', (None,), "the context")
    assert (said.probability, said.text) == (1.0, "the context")


def test_scores_go_by_the_product_and_verdicts_by_the_weakest_statement() -> None:
    rows = [row("a", 1, 0.7), row("b", 1, 0.6), row("c", 0, 0.3), row("d", 0, 0.2)]
    rows = [each.model_copy(update={"least": 0.9 if each.id in "bc" else 0.1}) for each in rows]
    found = quality(rows)
    by_name = {each.name: each for each in found.scores}
    assert by_name["judge"].auroc.value == 1 and by_name["judge, least over statements"].auroc.value == 0.5
    assert found.as_it_is.counts == (1, 1, 1, 1) and {miss.id for miss in found.misses} == {"a", "c"}


def test_each_of_the_judges_scores_is_held_against_word_overlap() -> None:
    rows = [row("a", 1, 0.9), row("b", 1, 0.4), row("c", 0, 0.6), row("d", 0, 0.1)]
    rows = [each.model_copy(update={"overlap": 0.5 + each.label / 4}) for each in rows]
    found = quality(rows)
    assert found.scores[0].gain is not None and found.scores[0].gain.value == -0.25
    assert [each.name for each in found.scores if each.gain is None] == ["word overlap", "shortness"]


def test_figures_of_known_rows() -> None:
    rows = [row("a", 1, 0.9), row("b", 1, 0.4), row("c", 0, 0.6), row("d", 0, 0.1)]
    found = quality(rows)
    assert found.scores[0].auroc.value == 0.75
    assert found.as_it_is.counts == (1, 1, 1, 1) and found.as_it_is.kappa == 0
    assert found.shown_hard == 0.0  # half of each label is judged 1: nothing of a drop shows
    assert [miss.id for miss in found.misses] == ["b", "c"]
    assert sum(found.histogram["1"]) == sum(found.histogram["0"]) == 2


def test_of_hard_verdicts_sensitivity_and_specificity_less_one_is_shown() -> None:
    found = quality(good_rows())
    now = found.as_it_is
    assert found.shown_hard == pytest.approx(now.sensitivity + now.specificity - 1)


def test_a_map_is_not_credited_with_what_it_shows_on_the_items_it_was_fitted_on() -> None:
    random = np.random.default_rng(3)
    rows = [row(f"r{i}", i % 2, round(float(random.uniform(0, 0.2)), 6)) for i in range(200)]
    found = quality(rows)
    soft, labels = np.array([each.soft for each in rows]), np.arange(200) % 2
    mapped = crossfitted(soft, labels, np.arange(200), found.scores_map.method)
    assert found.shown_soft == pytest.approx(mapped[labels == 1].mean() - mapped[labels == 0].mean())
    own = apply(found.scores_map, soft, found.scores_map.method)
    assert found.shown_soft < own[labels == 1].mean() - own[labels == 0].mean()


def test_figures_outlive_their_json_even_where_they_are_no_number() -> None:
    found = quality([row("a", 1, 0.9, cluster="s"), row("b", 0, 0.2, cluster="s")])
    assert math.isnan(found.scores[0].balanced_accuracy.value)  # one source has no two halves
    again = Quality.model_validate_json(found.model_dump_json())
    assert again.model_dump_json() == found.model_dump_json()


def test_the_headline_is_against_a_coin_and_against_word_overlap() -> None:
    good = good_rows()
    assert headline_of(quality(good)).word == "BETTER THAN WORD OVERLAP"
    known = [each.model_copy(update={"overlap": each.label * 1.0}) for each in good]
    assert headline_of(quality(known)).word == "WORSE THAN WORD OVERLAP"
    same = [each.model_copy(update={"overlap": each.soft}) for each in good]
    assert headline_of(quality(same)).word == "NOT SHOWN TO BE BETTER THAN WORD OVERLAP"
    guess = [each.model_copy(update={"soft": 0.5}) for each in good]
    assert headline_of(quality(guess)).word == "NO BETTER THAN CHANCE"


@pytest.mark.parametrize("sources", [1, 2, 9])
def test_a_judge_is_not_called_good_by_fewer_sources_than_intervals_take(sources: int) -> None:
    rows = [row(f"r{i}", i % 2, 0.1 + 0.8 * (i % 2), cluster=f"s{i % sources}") for i in range(40)]
    found = headline_of(quality(rows))
    assert (found.tone, found.word) == ("open", "TOO FEW SOURCES TO TELL")
    assert f"40 items are of {sources} sources, intervals take 10" in found.sentence
    more = [each.model_copy(update={"cluster": f"s{i // 4}"}) for i, each in enumerate(rows)]
    assert headline_of(quality(more)).word == "BETTER THAN WORD OVERLAP"


def test_a_verdict_that_cannot_be_read_fails_its_item_alone(
    ragate: Ragate, engines: list[FakeEngine], labelled: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(text: str, tokens: object) -> tuple[float, ...]:
        if "number 3" in text:
            raise OverflowError("a logprob of 9999")
        return verdict_probabilities(text, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr("ragate.judge.verdict_probabilities", read)
    ended = ragate("judge", "calibrate", labelled(), "--judge", "judge.gguf", "-q")
    assert ended.code == 0, ended.err
    found = Quality.model_validate_json((FOLDER / "faithfulness-sentences.json").read_text())
    assert found.failed == ("item-3",) and found.items == 11


def test_a_page_shows_text_of_data_and_judge_as_text() -> None:
    evil = "</dd><script>alert(1)</script>"
    rows = good_rows()
    rows[0] = rows[0].model_copy(update={"soft": 0.99, "answer": evil, "question": evil})
    page = render_calibration(quality(rows).model_copy(update={"judge": evil}))
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or AXE is None, reason="needs chromium and axe-core-python")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_page_is_quiet_accessible_and_no_wider_than_the_window(
    tmp_path: Path, width: int, scheme: str
) -> None:
    assert AXE is not None
    path = tmp_path / "page.html"
    path.write_text(render_calibration(quality(good_rows())), encoding="utf-8")
    with Browser(width=width) as browser:
        browser.media(prefers_color_scheme=scheme)
        browser.open(path)
        reported = browser.reported("Log.entryAdded", "Runtime.exceptionThrown")
        requests = [each["request"]["url"] for each in browser.reported("Network.requestWillBeSent")]
        assert reported == [] and requests == [path.as_uri()]
        assert browser.eval("document.documentElement.scrollWidth") <= width
        browser.eval(AXE.read_text(encoding="utf-8") + "; 0")
        found = browser.eval(
            "axe.run(document).then(r => r.violations.map("
            "v => [v.impact, v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))]))"
        )
        assert found == []
