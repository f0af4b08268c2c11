"""The HTML report: what it says, that nothing breaks out of it, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from browser import AXE, CHROMIUM, Browser
from runs import (
    FINGERPRINT,
    HOSTILE,
    METRICS,
    broken_run,
    errored_run,
    good_run,
    hostile_run,
    partial_run,
    plain_run,
    timings,
    worse_run,
)

from ragate.gate.baseline import Baseline, baseline_of
from ragate.gate.verdict import Rule, decide
from ragate.report.html import render_html
from ragate.run import Claim, Score

if TYPE_CHECKING:
    from pathlib import Path

    from ragate.run import Run

INTERVAL_WORDS = "0 limit fell ▸"
DATE = datetime(2025, 11, 20, 9, 30, tzinfo=UTC)


class Page(html.parser.HTMLParser):
    """A page as a browser would read it: its visible text, its tags, its scripts, and whether tags nest."""

    VOID = frozenset({"meta", "br", "input", "use", "rect", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pieces.append(" ")
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.pieces.append(" ")
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            if self.open[-1] == "script":
                self.scripts.append(data)
        else:
            self.pieces.append(data)

    @property
    def words(self) -> str:
        """The visible text with its white space collapsed."""
        return " ".join("".join(self.pieces).split())

    @property
    def payload(self) -> dict[str, Any]:
        """The data block, parsed."""
        return dict(json.loads(self.scripts[0]))


def _baseline(run: Run) -> Baseline:
    return baseline_of(run, commit="3f2a91c7" * 5, date=DATE)


def _render(
    run: Run,
    base: Run | None = None,
    times: dict[str, Any] | None = None,
    *,
    texts: bool = False,
    **terms: Any,
) -> str:
    """The report of `run` against `base`, whose answers and contexts are at hand where `texts` is set."""
    baseline = _baseline(base) if base else None
    gate = decide(baseline, run, **terms) if baseline else None
    return render_html(run, gate, baseline, times, base if texts else None)


def _reworded(run: Run) -> Run:
    """The run with another answer, and its contexts in another order with one new, in its first item."""
    first = run.items[0]
    contexts = (first.contexts[1], first.contexts[0], *first.contexts[2:4], "Something else was found.")
    answer = (first.answer or "").replace("computing", "storing")
    changed = first.model_copy(update={"contexts": contexts, "answer": answer})
    return run.model_copy(update={"items": (changed, *run.items[1:])})


def _monstrous_run() -> Run:
    """The hostile run, and in its first item a megabyte of hostile text in every place that text comes to."""
    run = hostile_run()
    huge = (HOSTILE + " word ") * (1_000_000 // (len(HOSTILE) + 6))
    first = run.items[0]
    texts = {"question": huge, "reference": huge, "answer": huge, "contexts": (huge, huge[1:])}
    scores = tuple(
        score.model_copy(
            update={
                "error": huge,
                "claims": tuple(c.model_copy(update={"text": huge, "reason": huge}) for c in score.claims),
            }
        )
        if score.item == first.id
        else score
        for score in run.scores
    )
    return run.model_copy(
        update={
            "items": (first.model_copy(update=texts), *run.items[1:]),
            "scores": scores,
            "judge_note": HOSTILE,
        }
    )


def test_the_verdict_sentence_stands_before_everything_else() -> None:
    page = Page(_render(worse_run(), good_run()))
    first = next(tag for tag, _ in page.tags if tag in ("h1", "h2", "h3"))
    assert first == "h1"
    assert "FAIL faithfulness fell 11.3 pt (limit 4.7 pt = 5 %, 90 % interval" in page.words
    assert "also context recall fell 8.8 pt (limit 4.7 pt = 5 %," in page.words
    assert "If the change is wanted, ragate baseline bless accepts it" in page.words


def test_the_cards_show_score_baseline_delta_and_limit_worst_first() -> None:
    page = Page(_render(worse_run(), good_run()))
    cards = [a["aria-label"] for tag, a in page.tags if tag == "article" and "aria-label" in a]
    assert cards == ["Faithfulness", "Context recall", "Answer relevance", "Context precision"]
    facts = (
        "Baseline 0.931 Limit −4.7 pt 5 % of 0.931 Interval 7.1 to 17.4 pt p 0.008 Items 100 of 11 clusters"
    )
    assert f"0.817 fell by 11.3 pt {INTERVAL_WORDS} {facts} Answers 4 broke, 0 mended p 0.062" in page.words
    charts = [a["aria-label"] for tag, a in page.tags if a.get("role") == "img"]
    assert charts[0] == "Drop −11.3 pt, interval 7.1 to 17.4 pt, limit 4.7 pt"
    assert charts[1] == (
        "Distribution of the scores from 0 to 1: baseline mean 0.931, this run 0.817, limit at 0.884"
    )


def test_each_card_draws_the_drop_between_its_bounds_beside_the_limit() -> None:
    page = Page(_render(worse_run(), good_run()))
    drawn = [a["aria-label"] for tag, a in page.tags if (a.get("aria-label") or "").startswith("Drop ")]
    assert drawn == [
        "Drop −11.3 pt, interval 7.1 to 17.4 pt, limit 4.7 pt",
        "Drop −8.8 pt, interval 4.8 to 13.5 pt, limit 4.7 pt",
        "Drop −2.0 pt, interval 0.7 to 5.1 pt, limit 4.4 pt",
        "Drop −1.6 pt, interval −0.5 to 4.5 pt, limit 4.2 pt",
    ]


def test_warnings_drift_and_power_are_told() -> None:
    base = good_run()
    scores = [
        s.model_copy(update={"value": (s.value or 0) - 0.01}) if s.metric == "answer_relevance" else s
        for s in base.scores
    ]
    run = base.model_copy(update={"scores": tuple(scores)})
    words = Page(_render(run, base, release=_baseline(base), judge_accuracy=0.75)).words
    assert words.count("answer relevance lost 1.0 pt, less than the limit but not by chance") == 1
    assert "Since the last release PASS no metric fell to its limit" in words
    assert "Answer relevance 0.874 0.864 −1.0 pt 4.4 pt 1.0 to 1.0 pt" in words
    assert "What this sample can show" in words
    power = Page(_render(worse_run(), good_run(), judge_accuracy=0.75)).words
    assert "Faithfulness 7.0 pt 14.1 pt 4.7 pt 100 230" in power
    assert "Context precision 3.4 pt 6.9 pt 4.2 pt 100 enough: 68" in power


def test_a_floor_that_is_breached_is_in_its_card() -> None:
    words = Page(_render(worse_run(), good_run(), rules={"faithfulness": Rule(min=0.9)})).words
    assert "Floor 0.9: below it" in words


def test_a_row_says_why_in_the_judges_words_and_whether_it_broke() -> None:
    words = Page(_render(worse_run(), good_run())).words
    assert (
        "serving-001 broke multi-document Context recall Blocks are found again by a hash over their tokens and their "
        "predecessors. No passage mentions it; the closest one speaks of another step."
    ) in words
    assert "Broke 13 Mended 0 Regressed 32" in words


def test_failures_are_classed_with_what_to_try() -> None:
    page = Page(_render(worse_run(), good_run()))
    assert (
        "17 Unsupported claim The answer says what the contexts do not. 17 of them got worse. Try: tell"
        in page.words
    )
    counted = sum("retrieval" in item["classes"] for item in page.payload["items"])
    assert f"{counted} Retrieval miss" in page.words


def test_the_answer_and_contexts_are_compared_with_the_baselines() -> None:
    base = good_run(12)
    text = _render(_reworded(base), base, texts=True)
    assert "<del>computing</del><ins>storing</ins>" in text
    words = Page(text).words
    assert "1 was 2 ✓" not in words  # the mark is the style sheet's
    assert "1 was 2 useful" in words or "1 was 2 not useful" in words
    assert "5 new" in words
    assert "– lost, was 5" in words
    assert "Answer as in the baseline" in words
    without = Page(_render(_reworded(base), base)).words
    assert "The baseline's answers are not at hand, so only scores are compared." in without
    assert "was 2 useful" not in without


def test_where_a_score_changed_what_the_judge_said_before_can_be_read() -> None:
    base, run = good_run(), worse_run()
    words = Page(_render(run, base, texts=True)).words
    assert words.count("what the judge said of the baseline's answer") == sum(
        score.value != base.score(score.item, score.metric).value  # type: ignore[union-attr]
        for score in run.scores
    )


def test_items_are_ranked_by_their_drop_and_counted_by_change() -> None:
    page = Page(_render(worse_run(), good_run()))
    drops = [item["drop"] for item in page.payload["items"]]
    assert drops == sorted(drops, reverse=True)
    assert drops[0] == 1.0
    changes = [item["change"] for item in page.payload["items"]]
    for change in ("regressed", "fixed", "unchanged"):
        assert f"{change.capitalize()} {changes.count(change)} " in page.words
    assert changes.count("regressed") == 32


def test_an_opened_item_begins_with_the_metric_that_fell_most() -> None:
    base = plain_run({"a": [1.0] * 12, "b": [1.0] * 12, "c": [1.0] * 12})
    run = plain_run({"a": [1.0] * 12, "b": [0.0] + [1.0] * 11, "c": [1.0] + [0.0] * 4 + [1.0] * 7})
    page = _render(run, base)
    assert re.findall(r"<h3>(\w)</h3>", page)[:3] == [
        "C",
        "B",
        "A",
    ]  # the cards: what fell most over all items
    (first,) = (
        part for part in page.split('class="detail"') if "Question 0?" in part.partition("</section>")[0]
    )
    assert re.findall(r'<section class="part">\s*<h3>(\w)', first) == ["B", "C", "A"]


def test_the_numbers_of_a_sentence_stand_back_behind_what_happened() -> None:
    page = _render(worse_run(), good_run(), release=_baseline(good_run()))
    said = re.findall(r'>\s*([^<>]+) <span class="numbers">\((limit 4\.7 pt)', page)
    assert (
        said
        == [
            ("faithfulness fell 11.3 pt", "limit 4.7 pt"),
            ("also context recall fell 8.8 pt", "limit 4.7 pt"),
        ]
        * 2
    )


def test_an_opened_item_shows_what_the_judge_saw_and_said() -> None:
    run = worse_run(12)
    words = Page(_render(run, good_run(12))).words
    item = run.items[0]
    score = run.score(item.id, "faithfulness")
    assert score is not None
    for text in (
        item.question,
        item.reference,
        item.answer,
        *item.contexts,
        *[c.reason for c in score.claims],
    ):
        assert text
        assert text in words
    call = run.calls[score.calls[0]]
    assert f"{call.prompt_tokens:,} tokens in, {call.output_tokens:,} out, stop" in words
    assert call.output in words
    assert run.prompt_heads[call.head] in words


@pytest.mark.parametrize(("verdict", "shown"), [(1, "0.97"), (0, "0.03")])
def test_the_probability_shown_is_that_of_the_verdict_given(verdict: int, shown: str) -> None:
    claim = Claim(text="A claim.", verdict=verdict, probability=0.97, reason="Because.")
    run = plain_run({"faithfulness": [1.0]})
    run = run.model_copy(
        update={
            "scores": (Score(item="q000", metric="faithfulness", state="ok", value=1.0, claims=(claim,)),)
        }
    )
    word = "supported" if verdict else "unsupported"
    assert f"{word} {shown} A claim. Because." in Page(_render(run)).words


def test_a_context_stands_once_and_calls_refer_to_it() -> None:
    run = good_run(12)
    text = _render(run)
    assert text.count("This is passage 3 of document block pools.") == 1
    place = re.search(r'<a href="#(i1-c3)">context 3</a>', text)
    assert place
    assert f'id="{place[1]}"' in text


def test_a_call_with_other_texts_keeps_its_whole_input() -> None:
    run = good_run(1)
    calls = {key: call.model_copy(update={"input": "nothing of the item"}) for key, call in run.calls.items()}
    assert Page(_render(run.model_copy(update={"calls": calls}))).words.count("nothing of the item") == len(
        calls
    )


def test_states_other_than_ok_are_words_with_their_error() -> None:
    page = Page(_render(errored_run(), good_run()))
    assert "timeout was 1.00" in page.words
    assert "no answer from the judge in 120 s" in page.words
    assert "The system under test gave no answer: ConnectionError: refused" in page.words
    assert "Items 97 of 11 clusters · 1 timeout · 1 truncated · 1 error" in page.words
    assert "Errored 4" in page.words
    assert sum(item["errored"] for item in page.payload["items"]) == 4


def test_a_partial_run_says_so_in_its_headline_and_title() -> None:
    for text in (_render(partial_run(), good_run()), _render(partial_run())):
        page = Page(text)
        heading = page.words[page.words.index("Theme: auto") :]
        assert heading.startswith("Theme: auto PARTIAL ")
        assert "200 of 400 scores were made" in page.words
        assert "<title>PARTIAL " in text


def test_without_a_baseline_the_page_says_how_to_make_one() -> None:
    words = Page(_render(good_run(12))).words
    assert "NO BASELINE no baseline yet" in words
    assert "ragate baseline set makes this run the baseline" in words


def test_an_unproven_judge_is_named_beside_the_verdict() -> None:
    words = Page(_render(good_run(12, judge_note="Unproven judge: tiny."), good_run(12))).words
    assert words.index("PASS") < words.index("Unproven judge: tiny.") < words.index("Context precision")


def test_an_invalid_comparison_names_each_field_and_marks_it_in_the_fingerprint() -> None:
    other = FINGERPRINT | {"judge_format": "gguf Q8_0", "ragas": "0.4.4"}
    words = Page(_render(good_run(fingerprint=other), good_run())).words
    assert "INVALID the run cannot be compared with the baseline, for 2 reasons" in words
    assert "judge_format differs: baseline gguf Q4_K_M, run gguf Q8_0" in words
    assert "gguf Q8_0 differs; baseline: gguf Q4_K_M" in words


def test_a_critical_item_that_broke_is_named_in_the_headline() -> None:
    words = Page(_render(broken_run(), good_run())).words
    assert "FAIL critical item serving-004 broke on faithfulness" in words


def test_the_usage_block_has_tokens_computed_and_sent_and_seconds_by_phase() -> None:
    words = Page(_render(good_run(12), times=timings())).words
    assert "Prompt tokens sent 1,124,310" in words
    assert "Prompt tokens computed 322,804 29 % of those sent" in words
    assert "21,870 dictated by the grammar" in words
    assert "Judged now 800 100 were in the journal" in words
    assert words.index("total 156.9") < words.index("prepare 2.4") < words.index("engine: plan 1.1")
    assert "engine: forward 104.2" in words
    assert "tokens in, 49 out, stop, 1,234 ms" in words


@pytest.mark.parametrize(
    "times",
    [
        None,
        {},
        {"seconds": None, "engine": 3, "call_ms": [], "prompt_tokens_sent": "many"},
        {"seconds": {"judge": float("nan"), "x": "y", "total": -1}, "engine": {"seconds_plan": True}},
    ],
)
def test_timings_that_are_missing_or_malformed_leave_the_page_whole(times: dict[str, Any] | None) -> None:
    page = Page(_render(good_run(2), times=times))
    assert "in distinct calls" in page.words
    assert page.open == []


def test_hostile_text_is_shown_as_text_and_starts_no_element() -> None:
    calm, page = Page(_render(good_run(12))), Page(_render(hostile_run()))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in calm.tags}
    assert len(page.scripts) == 2
    assert "</script><script>alert(1)</script> <img src=x onerror=alert(2)>" in page.words
    assert "{{ 7*7 }} {% raw %}" in page.words
    assert page.payload["items"][0]["question"] == HOSTILE
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_a_megabyte_of_hostile_text_in_every_place_leaves_the_page_small_and_whole() -> None:
    run = _monstrous_run()
    text = _render(run, hostile_run(), texts=True)
    page = Page(text)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {
        tag for tag, _ in Page(_render(worse_run(), good_run(), texts=True)).tags
    } | {
        "ins",
        "del",
    }
    assert len(page.scripts) == 2
    assert len(text.encode()) < 2_000_000
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_control_characters_are_shown_as_symbols() -> None:
    text = _render(hostile_run())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]", text)
    assert "␛[31mred" in text
    text.encode()


def test_the_payload_cannot_end_its_script_element() -> None:
    text = _render(hostile_run())
    payload = re.search(r'<script type="application/json" id="payload">(.*?)</script>', text, re.DOTALL)
    assert payload
    assert not set("<>&\u2028\u2029") & set(payload[1])
    assert json.loads(payload[1])["run"]["suite"] == HOSTILE


def test_the_policy_allows_only_the_pages_own_script_and_style() -> None:
    text = _render(hostile_run())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert policy
    assert style
    for source, kind in ((Page(text).scripts[1], "script-src"), (style[1], "style-src")):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind} &#39;sha256-{digest}&#39;" in policy[1] or f"{kind} 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1]
    assert "style=" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_names_no_address_to_load_from() -> None:
    loads = {"src", "srcset", "data", "action", "poster", "background", "xlink:href"}
    for tag, attrs in Page(_render(hostile_run())).tags:
        assert not loads & attrs.keys(), tag
        assert (attrs.get("href") or "#").startswith("#"), tag


def test_every_reference_inside_the_page_has_its_target_and_ids_are_unique() -> None:
    tags = Page(_render(worse_run(12), good_run(12), timings())).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {str(attrs["href"])[1:] for _, attrs in tags if "href" in attrs}
    links |= {str(attrs["aria-controls"]) for _, attrs in tags if "aria-controls" in attrs}
    assert links <= set(ids)


def test_a_hundred_items_stay_below_two_megabytes() -> None:
    assert len(_render(worse_run(), good_run(), timings(), texts=True).encode()) < 2_000_000


def test_very_long_texts_are_cut_and_say_so_to_keep_the_page_small() -> None:
    run = good_run()
    items = tuple(item.model_copy(update={"contexts": ("long " * 10_000,)}) for item in run.items)
    text = _render(run.model_copy(update={"items": items}), times=timings())
    assert len(text.encode()) < 2_000_000
    assert "more characters in run.json)" in text


def test_a_text_of_ordinary_length_is_not_cut() -> None:
    assert "more characters in run.json" not in _render(worse_run(), good_run(), timings())


def test_the_page_is_well_formed_in_every_situation() -> None:
    for text in (
        _render(errored_run(12), good_run(12)),
        _render(partial_run(12)),
        _render(plain_run({"m": [1.0]})),
    ):
        assert Page(text).open == []


def test_an_empty_run_still_makes_a_page() -> None:
    run = plain_run({"m": [1.0]}).model_copy(update={"items": (), "scores": ()})
    assert "All 0" in Page(_render(run)).words


def test_the_same_run_makes_the_same_page() -> None:
    assert _render(worse_run(12), good_run(12), timings()) == _render(worse_run(12), good_run(12), timings())


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
SHOWN = "[...document.querySelectorAll('.item:not([hidden]) .id')].map(id => id.textContent)"


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    text = _render(_reworded(worse_run()), good_run(), timings(), texts=True)
    path.write_text(text, encoding="utf-8")
    return path


def _assert_quiet(browser: Browser, path: Path) -> None:
    assert browser.reported("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening") == []
    asked = {event["request"]["url"].split("#")[0] for event in browser.reported("Network.requestWillBeSent")}
    assert asked <= {path.as_uri()}


@pytest.mark.slow
@needs_chromium
def test_filter_search_and_sort_work_and_live_in_the_address(report: Path) -> None:
    with Browser() as browser:
        browser.open(report)
        assert len(browser.eval(SHOWN)) == 100
        browser.eval("document.querySelector('[data-filter=regressed]').click()")
        assert len(browser.eval(SHOWN)) == 32
        browser.eval("search.value = 'speculative'; search.dispatchEvent(new Event('input'))")
        found = browser.eval(SHOWN)
        assert 0 < len(found) < 32
        browser.eval("sort.value = 'order'; sort.dispatchEvent(new Event('change'))")
        assert browser.eval(SHOWN) == sorted(found)
        assert browser.eval("location.hash") == "#filter=regressed&q=speculative&sort=order"
        fragment = browser.eval("location.hash")
        _assert_quiet(browser, report)
    with Browser() as browser:
        browser.open(report, fragment)
        assert browser.eval(SHOWN) == sorted(found)


@pytest.mark.slow
@needs_chromium
def test_keys_walk_open_search_and_close(report: Path) -> None:
    opened = "[...document.querySelectorAll('.item.is-open .id')].map(i => i.textContent)"
    with Browser() as browser:
        browser.open(report)
        ids = browser.eval(SHOWN)
        for key in "jjk":
            browser.press(key)
        browser.press("Enter")
        assert browser.eval(opened) == [ids[0]]
        assert browser.eval("location.hash") == f"#item={ids[0]}"
        browser.press("j")
        assert browser.eval("document.querySelector('.item.at .id').textContent") == ids[1]
        browser.press("/")
        assert browser.eval("document.activeElement.id") == "search"
        browser.press("j")
        assert browser.eval("search.value") == "j"
        browser.press("Escape")
        assert browser.eval(opened) == []
        assert browser.eval("location.hash") == ""
        _assert_quiet(browser, report)


@pytest.mark.slow
@needs_chromium
def test_a_link_to_a_context_opens_it_and_the_theme_can_be_changed(report: Path) -> None:
    with Browser() as browser:
        browser.open(report)
        browser.eval("document.querySelector('.toggle').click()")
        browser.eval("document.querySelector('.claims a').click()")
        assert browser.eval("document.querySelectorAll('.contexts details[open]').length") == 1
        background = "getComputedStyle(document.body).backgroundColor"
        light = browser.eval(background)
        browser.eval("theme.click(), theme.click()")
        assert browser.eval("document.documentElement.dataset.theme") == "dark"
        assert browser.eval(background) != light
        _assert_quiet(browser, report)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("run", [hostile_run(), _monstrous_run()], ids=["hostile", "a megabyte"])
def test_a_hostile_page_runs_nothing_and_loads_nothing(tmp_path: Path, scripts: bool, run: Run) -> None:
    path = tmp_path / "report.html"
    path.write_text(_render(run, hostile_run(), texts=True), encoding="utf-8")
    with Browser(scripts=scripts) as browser:
        browser.open(path)
        if scripts:  # and the page works
            browser.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert len(browser.eval(SHOWN)) == 12
            browser.eval("search.value = 'xyzzy'; search.dispatchEvent(new Event('input'))")
            assert browser.eval(SHOWN) == []
            browser.press("Escape")
            browser.eval("document.getElementById('reset').click()")
            browser.press("j")
            browser.press("Enter")
            assert browser.eval("document.querySelectorAll('.item.is-open').length") >= 1
            assert browser.eval("document.querySelectorAll('iframe, object, embed, img, base').length") == 0
            assert browser.eval("[...document.links].every(a => a.getAttribute('href').startsWith('#'))")
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.eval(overflow) <= 0
        _assert_quiet(browser, path)


@pytest.mark.slow
@needs_chromium
def test_with_the_network_off_the_page_is_the_same_and_asks_for_nothing(report: Path) -> None:
    with Browser() as browser:
        browser.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )
        browser.open(report)
        assert len(browser.eval(SHOWN)) == 100
        browser.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.eval("window.scrollTo(0, document.body.scrollHeight)")
        _assert_quiet(browser, report)
        assert len(browser.reported("Network.requestWillBeSent")) == 1


@pytest.mark.slow
@needs_chromium
def test_a_failure_class_shows_its_items_and_is_kept_in_the_address(report: Path) -> None:
    with Browser() as browser:
        browser.open(report)
        browser.eval("document.querySelector('[data-class=unsupported]').click()")
        assert len(browser.eval(SHOWN)) == 17
        assert browser.eval("location.hash") == "#class=unsupported"
        assert browser.eval("document.getElementById('found').textContent") == "17 of 100 items"
        browser.eval("document.querySelector('[data-filter=broke]').click()")
        both = browser.eval(SHOWN)
        assert 0 < len(both) < 13
        fragment = browser.eval("location.hash")
        browser.eval("document.querySelector('[data-class=unsupported]').click()")
        assert len(browser.eval(SHOWN)) == 13
        changed = "new Promise(done => addEventListener('hashchange', () => done(0), {once: true}))"
        browser.eval(f"setTimeout(() => {{ location.hash = '{fragment}&sort=nonsense&x=1' }}), {changed}")
        assert browser.eval(SHOWN) == both


@pytest.mark.slow
@needs_chromium
def test_on_paper_there_are_verdict_cards_and_rows_but_no_controls(report: Path) -> None:
    with Browser() as browser:
        browser.open(report)
        browser.eval("document.querySelector('.toggle').click()")
        browser.media("print")
        shown = "[...document.querySelectorAll('{}')].filter(e => e.checkVisibility()).length"
        for controls in (".tools", ".keys", "#theme", ".toggle", ".jump", "[data-class]"):
            assert browser.eval(shown.format(controls)) == 0, controls
        assert browser.eval(shown.format(".card .interval")) == 4
        assert browser.eval(shown.format(".item > .main")) == 100
        assert browser.eval(shown.format(".detail")) == 1  # the one that was opened
        printed = browser.call("Page.printToPDF", printBackground=True)["data"]
        assert base64.b64decode(printed).startswith(b"%PDF-")


@pytest.mark.slow
@needs_chromium
@pytest.mark.skipif(AXE is None, reason="needs axe-core: pip install -e .[dev], or RAGATE_AXE=axe.min.js")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tmp_path: Path, width: int, scheme: str) -> None:
    assert AXE is not None
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    unknown = _baseline(good_run(12)).model_copy(update={"clusters": None})  # which is warned of
    pages = {
        "fail": _render(_reworded(worse_run(12)), good_run(12), timings(), texts=True),
        "pass": _render(good_run(12), good_run(12), timings(), release=unknown),
        "open": _render(worse_run(12), good_run(12), threshold=0.5),
        "invalid": _render(errored_run(12), good_run(12, fingerprint={"judge": "x"})),
        "alone": _render(partial_run(12)),
    }
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        with Browser(width=width) as browser:
            browser.media(prefers_color_scheme=scheme)
            browser.open(path)
            browser.eval("document.querySelector('.toggle').click()")
            browser.eval(
                "document.querySelectorAll('.item.is-open details, .fold').forEach(d => d.open = true)"
            )
            browser.eval(AXE.read_text(encoding="utf-8") + "; 0")
            found = browser.eval(
                f"axe.run(document, {{runOnly: {rules}}}).then(r => r.violations.map("
                "v => [v.impact, v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))]))"
            )
            assert [each for each in found if each[0] in ("serious", "critical")] == [], name
            assert found == [], name


@pytest.mark.slow
@needs_chromium
def test_without_scripts_every_item_opens_and_no_dead_control_is_shown(report: Path) -> None:
    with Browser(scripts=False) as browser:
        browser.open(report)
        document = browser.call("DOM.getDocument")["root"]["nodeId"]

        def box(selector: str) -> bool:
            node = browser.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
            style = browser.call("CSS.getComputedStyleForNode", nodeId=node)["computedStyle"]
            return {"name": "display", "value": "none"} not in style

        browser.call("DOM.enable")
        browser.call("CSS.enable")
        assert box(".more summary")
        assert not any(box(selector) for selector in ("#tools", "#theme", ".toggle", "#keys", "#nothing"))


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [360, 720, 1280])
def test_nothing_sticks_out_of_the_window(report: Path, width: int) -> None:
    with Browser(width=width) as browser:
        browser.open(report)
        browser.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert (
            browser.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        )


def test_metrics_of_the_contract_all_have_words() -> None:
    words = Page(_render(good_run(2))).words
    for metric in METRICS:
        assert metric.replace("_", " ").capitalize() in words
