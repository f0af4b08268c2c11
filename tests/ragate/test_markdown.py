"""The pull-request comment: its parts, its limit, and that no text of others means anything in it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from runs import (
    HOSTILE,
    METRICS,
    errored_run,
    good_run,
    hostile_run,
    partial_run,
    plain_run,
    timings,
    worse_run,
)

from ragate.gate.baseline import Baseline, baseline_of
from ragate.gate.verdict import decide
from ragate.report.markdown import LONGEST_SUMMARY, comment_marker, escape, render_comment
from ragate.run import Run

DATE = datetime(2025, 11, 20, 9, 30, tzinfo=UTC)


def _baseline(run: Run) -> Baseline:
    return baseline_of(run, commit="3f2a91c7" * 5, date=DATE)


def _comment(run: Run, base: Run | None = None, **options: Any) -> str:
    baseline = _baseline(base) if base else None
    return render_comment(run, decide(baseline, run) if baseline else None, baseline, **options)


def test_the_comment_begins_with_its_marker_and_an_alert_in_words() -> None:
    lines = _comment(worse_run(), good_run()).splitlines()
    assert lines[:2] == ["<!-- ragate:llm-serving -->", "> [!CAUTION]"]
    assert lines[2].startswith(
        "> **❌ FAIL** llm-serving: faithfulness fell 11.3 pt (limit 4.7 pt = 5 %, 90 % interval"
    )


@pytest.mark.parametrize(
    ("run", "base", "alert"),
    [
        (good_run(12), good_run(12), "> [!TIP]\n> **✅ PASS**"),
        (
            good_run(12, judge="x", fingerprint={"judge": "x"}),
            good_run(12),
            "> [!IMPORTANT]\n> **⛔ INVALID**",
        ),
        (good_run(12), None, "> [!NOTE]\n> **➖ NO BASELINE**"),
        (partial_run(12), None, "> [!NOTE]\n> **➖ PARTIAL NO BASELINE**"),
        (partial_run(12), good_run(12), "> [!IMPORTANT]\n> **⛔ PARTIAL INVALID**"),
    ],
)
def test_each_verdict_has_its_alert_icon_and_word(run: Run, base: Run | None, alert: str) -> None:
    assert alert in _comment(run, base)


def test_the_table_has_a_row_for_each_metric() -> None:
    rows = [line for line in _comment(worse_run(), good_run()).splitlines() if line.startswith("| ")]
    assert rows[0] == "| metric | base | head | delta (90 % interval) | limit | p | items | verdict |"
    faithfulness = (
        r"| faithfulness | 0.931 | **0.817** | −11.3 pt (−17.4 to −7.1) | −4.7 pt | 0.008 | 100 | ❌ FAIL |"
    )
    assert rows[3] == faithfulness
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        rf"| {metric.replace('_', chr(92) + '_')}" for metric in METRICS
    ]


def test_an_improvement_is_a_positive_delta_and_no_change_is_zero() -> None:
    up = _comment(plain_run({"m": [0.9] * 10}), plain_run({"m": [0.8] * 10}))
    assert "| m | 0.800 | **0.900** | +10.0 pt (+10.0 to +10.0) | −4.0 pt | 1.00 | 10 | ✅ PASS |" in up
    assert "| ±0.0 pt |" in _comment(good_run(12), good_run(12))


def test_regressed_items_are_folded_with_question_scores_and_reason() -> None:
    text = _comment(worse_run(), good_run())
    assert "<summary>32 items regressed</summary>\n\n- **serving-001**" in text
    first = text[text.index("- **serving-001**") :].splitlines()[0]
    assert "Why is the KV cache split into blocks of 16 tokens?" in first
    assert r"context\_recall 1.00 → 0.00" in first
    assert "No passage mentions it" in first
    assert text.count("\n- **") == 32


def test_items_without_a_score_are_listed_with_their_error() -> None:
    text = _comment(errored_run(), good_run())
    assert "<summary>4 items without a score</summary>" in text
    assert "faithfulness 1.00 → timeout<br>no answer from the judge in 120 s" in text
    assert "| 97, 1 error, 1 timeout, 1 truncated |" in text


def test_the_footer_names_judge_fingerprint_items_baseline_and_the_way_to_accept() -> None:
    run = worse_run()
    text = _comment(run, good_run(), report_url="https://example.org/report.html?a=1#x")
    assert (
        f"<sub>judge qwen2.5-coder-1.5b · fingerprint {run.fingerprint_id} · 100 items · "
        "baseline 3f2a91c73f, 2025-11-20 09:30 UTC</sub>"
    ) in text
    assert "[Full report](https://example.org/report.html?a=1#x)" in text
    assert "If the change is wanted, `ragate baseline bless` accepts it as the new baseline." in text


@pytest.mark.parametrize("url", ["javascript:alert(1)", "https://x/) [y](https://z", "https://x/ y"])
def test_a_report_address_that_is_no_plain_link_is_left_out(url: str) -> None:
    assert "Full report" not in _comment(good_run(12), report_url=url)


def test_several_reasons_of_an_invalid_run_are_listed() -> None:
    text = _comment(good_run(12, fingerprint={"judge": "x", "ragas": "0.4.4"}), good_run(12))
    text = text.replace("&#8203;", "")  # in the hash, which may be a commit
    assert "> - judge differs: baseline sha256:9f2c51d04ab37e66…, run x" in text
    assert "> - ragas differs: baseline 0.4.3, run 0.4.4" in text


def test_an_unproven_judge_stands_in_the_alert() -> None:
    assert "\n> ⚠️ Unproven judge: tiny." in _comment(
        good_run(12, judge_note="Unproven judge: tiny."), good_run(12)
    )


def test_a_comment_never_exceeds_what_github_takes_and_says_what_it_left_out() -> None:
    base = plain_run({metric: [1.0] * 3000 for metric in METRICS})
    run = plain_run({metric: [0.25] * 3000 for metric in METRICS})
    text = _comment(run, base, report_url="https://example.org/")
    assert 60_000 < len(text) <= 65_536
    listed = text.count("\n- **q")
    why = "left out because a comment may be only so long: see [the full report](https://example.org/)"
    assert f"- … and {3000 - listed} more, {why}" in text
    assert "[Full report](https://example.org/)" in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_the_step_summary_has_more_room_but_no_more_than_github_takes() -> None:
    base = plain_run({metric: [1.0] * 2500 for metric in METRICS})
    run = plain_run({metric: [0.25] * 2500 for metric in METRICS})
    run = run.model_copy(
        update={"items": tuple(i.model_copy(update={"question": "é" * 160}) for i in run.items)}
    )
    text = _comment(run, base, longest=LONGEST_SUMMARY)
    assert 250_000 < len(text) <= LONGEST_SUMMARY
    assert len(text.encode()) <= 2**20
    assert "more, left out because a comment may be only so long: see the report\n" in text


def test_power_warnings_and_drift_stand_in_the_comment() -> None:
    base, run = _baseline(good_run()), worse_run()
    gate = decide(base, run, release=base, judge_accuracy=0.75)
    other = gate.model_copy(
        update={"sentence": "FAIL: something else", "warnings": ("3 reserve items were lost",)}
    )
    text = render_comment(run, other, base, notes=["a note | of ours"])
    assert (
        "> - ⚠️ a note \\| of ours\n> - ⚠️ 3 reserve items were lost\n> - against the release: FAIL: faith"
        in text
    )
    assert "faithfulness 7.0 pt, 14.1 pt true by this judge (4.7 pt takes 230 items)" in text
    assert "against the release" not in render_comment(run, gate, base)


def test_the_footer_has_seconds_cache_and_the_commit_that_was_judged() -> None:
    text = render_comment(good_run(), None, None, timings(), commit="3f2a91c7" * 5)
    assert "100 items · 157 s · 71 % of the prompt tokens from the cache · of commit 3f2a91c73f</sub>" in text
    odd = {"seconds": "long", "prompt_tokens_sent": 0, "prompt_tokens_computed": None}
    assert "100 items</sub>" in render_comment(good_run(), None, None, odd)


def test_only_our_own_commits_link_themselves() -> None:
    run = good_run(12)
    items = tuple(item.model_copy(update={"id": f"{i:07x}"}) for i, item in enumerate(run.items))
    ids = {old.id: new.id for old, new in zip(run.items, items, strict=True)}
    scores = tuple(score.model_copy(update={"item": ids[score.item]}) for score in run.scores)
    base = run.model_copy(update={"items": items, "scores": scores})
    text = _comment(*_fallen(base), commit="ab12" * 10)
    linked = re.findall(r"(?<![0-9a-z])[0-9a-f]{7,40}(?![0-9a-z])", text)
    assert linked == [run.fingerprint_id, "ab12ab12ab", "3f2a91c73f"]
    named = _baseline(base).model_copy(update={"commit": "@octocat"})
    assert "baseline @&#8203;octocat, 2025" in render_comment(base, None, named)


def test_a_metric_that_only_the_baseline_has_has_a_row_too() -> None:
    text = _comment(plain_run({"m": [1.0] * 12}), plain_run({"m": [1.0] * 12, "n": [0.5] * 12}))
    assert "| n | 0.500 | – | – | – | – | 0 | ⛔ INVALID |" in text


def test_hostile_texts_of_a_megabyte_everywhere_stay_within_the_limit() -> None:
    long = HOSTILE * 4000
    run, base = _fallen(hostile_run())
    gate = decide(_baseline(base), run)
    huge = gate.model_copy(
        update={
            "sentence": f"FAIL: {long}",
            "way_out": long,
            "reasons": (long,) * 100,
            "warnings": (f"{long} again",) * 100,
            "drift": gate.model_copy(update={"sentence": f"PASS: {long} drift"}),
        }
    )
    long_run = run.model_copy(update={"judge": long, "judge_note": long, "suite": long})
    text = render_comment(long_run, huge, _baseline(base), notes=[long] * 100)
    assert len(text) <= 65_536
    assert "more in the report" in text
    assert not re.search(r"@\w|(?<!&)#\d|://", text)


def test_hostile_texts_of_any_length_stay_within_the_limit() -> None:
    run = hostile_run()
    long = run.model_copy(
        update={"judge_note": HOSTILE * 500, "suite": HOSTILE * 500, "judge": HOSTILE * 500}
    )
    assert len(_comment(long)) <= 65_536


def _fallen(run: Run) -> tuple[Run, Run]:
    """`run` with every score at 0, and `run` itself."""
    scores = tuple(score.model_copy(update={"value": 0.0}) for score in run.scores)
    return run.model_copy(update={"scores": scores}), run


def test_hostile_text_neither_breaks_out_nor_mentions_nor_links() -> None:
    text = _comment(*_fallen(hostile_run()))
    assert text.count("\n- **") == 12
    assert not re.search(r"@\w|(?<!&)#\d|://", text)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", text)
    text.encode()


def test_a_markdown_reader_finds_no_element_of_a_hostile_comment_but_ours() -> None:
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(_comment(*_fallen(hostile_run())))
    calm = MarkdownIt("commonmark", {"html": True}).enable("table").render(_comment(*_fallen(good_run(12))))
    tags = [re.findall(r"<(/?[a-z0-9]+)", page) for page in (html, calm)]
    assert [set(found) for found in tags] == [set(tags[1])] * 2
    assert (
        tags[0].count("li") == tags[1].count("li") + 1 == 13
    )  # the hostile one passes over its clusters, and warns
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "**bold** $x$" in html


def test_the_marker_is_one_comment_whatever_the_suite_is_called() -> None:
    assert comment_marker("llm-serving") == "<!-- ragate:llm-serving -->"
    odd = [
        comment_marker(name) for name in ("a --> <b>\n", "a b", "a-b", "测试", "质量", "x" * 101, "x" * 102)
    ]
    assert len(set(odd)) == len(odd)
    assert all(
        re.fullmatch(r"<!-- ragate:[A-Za-z0-9._-]+ -->", marker) and marker.count("--") == 2 for marker in odd
    )


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("`x`", r"\`x\`"),
        ("@octocat", "@&#8203;octocat"),
        ("fixes #12", "fixes #&#8203;12"),
        ("GH-12", "GH-&#8203;12"),
        ("octo/rag#12 _gh-1_", "octo/rag#&#8203;12 \\_gh-&#8203;1\\_"),
        ("in 3f2a91c", "in 3f2a91&#8203;c"),
        ("octo/rag@3f2a91c7", "octo/rag@&#8203;3f2a91&#8203;c7"),
        ("_3F2A91C7_", "\\_3F2A91&#8203;C7\\_"),
        (
            "3f2a91c7" * 5,
            "3f2a91&#8203;c73f2a&#8203;91c73f&#8203;2a91c7&#8203;3f2a91&#8203;c73f2a&#8203;91c7",
        ),
        ("abc123 defaced8x", "abc123 defaced8x"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("&amp;", "&amp;amp;"),
        ("[a](b)", r"\[a\](b)"),
        ("https://evil.example", "https:&#8203;//evil.example"),
        ("www.evil.example", "www&#8203;.evil.example"),
        ("one\ntwo\r\nthree", "one two three"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\\`", r"\\\`"),
        ("$x^2$", r"\$x^2\$"),
        ("me@example.org", "me@&#8203;example.org"),
        (":tada: at 10:30", ":&#8203;tada: at 10:30"),
        ("- a list", r"\- a list"),
        ("1. a list", "1&#8203;. a list"),
        ("# a title", "#&#8203; a title"),
        ("=====", r"\====="),
    ],
)
def test_each_kind_of_markup_is_disarmed(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@given(st.text())
def test_escaped_text_is_one_line_without_live_markup(text: str) -> None:
    escaped = escape(text)
    assert not set("\r\n<>") & set(escaped)
    assert not re.search(r"@\w|(?<!&)#\d|://", escaped)
    assert not re.search(r"(?<![0-9a-z])[0-9a-f]{7,40}(?![0-9a-z])", escaped)
    assert not re.search(r"(?<!\\)(\\\\)*[`|*_\[\]]", escaped)


@given(st.text())
def test_a_markdown_reader_finds_nothing_in_escaped_text(text: str) -> None:
    reader = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    for before in ("", "> - ", "- **x** ", "| a |\n|:--|\n| "):
        blocks = reader.parse(f"{before}{escape(text)}")
        calm = reader.parse(f"{before}calm")
        inline = [child.type for block in blocks for child in block.children or []]
        assert set(inline) <= {"text", "text_special", "strong_open", "strong_close"}
        assert len(blocks) == len(calm) or not escape(text)
