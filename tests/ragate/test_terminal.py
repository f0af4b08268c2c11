"""Results in a terminal: table, verdict sentence, and no escape sequence that is not ours."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import HOSTILE, errored_run, good_run, hostile_run, partial_run, plain_run, worse_run

from ragate.gate.baseline import Baseline, baseline_of, diff_baselines
from ragate.gate.verdict import decide
from ragate.report.terminal import print_baseline_diff, print_gate, print_run
from ragate.report.untrusted import plain, visible
from ragate.run import Run

DATE = datetime(2025, 11, 20, 9, 30, tzinfo=UTC)


def _console(*, colour: bool = False, width: int = 120) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _baseline(run: Run) -> Baseline:
    return baseline_of(run, commit=None, date=DATE)


def _gate(run: Run, base: Run, width: int = 120) -> str:
    console = _console(width=width)
    print_gate(console, run, decide(_baseline(base), run))
    return _text(console)


def test_the_gate_prints_a_row_for_each_metric_and_the_sentence_last_but_the_way_out() -> None:
    lines = _gate(worse_run(), good_run()).splitlines()
    row = next(line for line in lines if "faithfulness" in line)
    cells = ["faithfulness", "0.931", "0.817", "−11.3", "−4.7", "7.1 to 17.4", "100", "0.008", "4/0"]
    *first, drawing, verdict = re.split(r"\s{2,}", row.strip())
    assert (first, verdict) == (cells, "✗ FAIL")
    assert drawing.index("│") < drawing.index("┊") < drawing.index("●")
    assert lines[-2].startswith(
        "✗ FAIL: faithfulness fell 11.3 pt (limit 4.7 pt = 5 %, 90 % interval of the drop 7.1 to 17.4 pt, p 0.008), "
        "from 0.931 to 0.817 over 100 items"
    )
    assert "`ragate baseline bless`" in lines[-1]


@pytest.mark.parametrize("run", [worse_run(), errored_run(), good_run(fingerprint={"judge": "x"})])
def test_no_number_is_cut_in_a_terminal_of_80_columns(run: Run) -> None:
    lines = _gate(run, good_run(), width=80).splitlines()
    rows = [line for line in lines if re.match(r"\w+ +0\.\d{3} ", line)]
    assert len(rows) == 4
    assert not any("…" in row or len(row) > 80 for row in rows)
    # nothing of the table is wrapped: a row each, under two lines of headings and a rule
    assert [bool(line.strip()) for line in lines[:8]] == [True] * 8
    assert not lines[8].strip()


def test_failing_metrics_list_their_largest_drops() -> None:
    text = _gate(worse_run(), good_run())
    assert "context_recall, largest drops" in text
    assert "serving-001  1.00 -> 0.00" in text
    assert "… and " in text


def test_a_passing_gate_ends_with_its_sentence() -> None:
    last = _gate(good_run(12), good_run(12)).splitlines()[-1]
    assert last.startswith("✓ PASS: no score changed; 4 metrics over 12 items; every drop is 0.0 pt, ")


def test_what_drop_could_be_seen_is_always_printed_and_warnings_are() -> None:
    lines = _gate(worse_run(), good_run()).splitlines()
    seen = next(line for line in lines if line.startswith("detectable drop: "))
    assert "faithfulness 7.0 pt (4.7 pt takes 230 items)" in seen
    few = _gate(worse_run(20), good_run(20)).splitlines()
    assert sum("too few to tell how clusters differ" in line for line in few) <= 1


def test_states_that_are_not_ok_are_counted_in_the_table() -> None:
    text = _gate(errored_run(), good_run())
    assert "1 error, 1 timeout, 1 truncated" in text
    assert "∅ INVALID" in text


def test_every_reason_of_an_invalid_run_is_printed() -> None:
    text = _gate(good_run(12, fingerprint={"judge": "x", "ragas": "0.4.4"}), good_run(12))
    assert "  - ragas differs: baseline 0.4.3, run 0.4.4" in text


def test_a_run_alone_prints_scores_and_notes() -> None:
    console = _console()
    print_run(console, partial_run(12).model_copy(update={"judge_note": "Unproven judge: tiny."}))
    text = _text(console)
    assert re.search(r"context_recall\s+0\.\d{3}\s+6\s+none", text)
    assert "PARTIAL" in text
    assert "! Unproven judge: tiny." in text


def test_the_verdict_sentence_is_one_line_however_narrow_the_terminal_is() -> None:
    lines = _gate(worse_run(), good_run(), width=60).splitlines()
    assert any(
        line.startswith("✗ FAIL: faithfulness") and line.endswith("over 100 items of 11 clusters")
        for line in lines
    )


def test_a_diff_of_baselines_prints_means_items_and_fields() -> None:
    old = _baseline(plain_run({"m": [1.0, 0.5, 0.5]}))
    new = _baseline(plain_run({"m": [0.25, 0.5, 0.75, 1.0]}, fingerprint={"judge": "other"}))
    console = _console()
    print_baseline_diff(console, diff_baselines(old, new))
    text = _text(console)
    assert re.search(r"m\s+0\.667\s+0\.625\s+−4\.2\s+2", text)
    assert "q000  1.00 -> 0.25" in text
    assert "q002  0.50 -> 0.75" in text
    assert "fingerprint: judge: sha256:9f2c51d0" in text
    assert "the test set changed: 1 items added, 0 removed" in text


def test_colours_are_ours_alone_and_hostile_text_brings_none() -> None:
    run = hostile_run()
    scores = tuple(score.model_copy(update={"value": 0.0}) for score in run.scores)
    worse = run.model_copy(update={"scores": scores, "fingerprint": {"judge": HOSTILE + "x"}})
    for colour in (False, True):
        console = _console(colour=colour, width=200)
        print_run(console, worse)
        print_gate(console, worse, decide(_baseline(run), worse))
        print_baseline_diff(console, diff_baselines(_baseline(run), _baseline(worse)))
        text = _text(console)
        assert set(re.findall("\x1b(.)", text)) <= ({"["} if colour else set())
        assert not re.search("\x1b\\[[^m]*[^0-9;m]", text)
        assert not re.search("[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e\u2028]", text)
        assert "[red]markup[/red]" in text
        text.encode()


def test_no_colour_means_no_escape_at_all() -> None:
    assert "\x1b" not in _gate(worse_run(), good_run())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never closed", ""),
        ("a\x1b(Bb\x1bcd", "abd"),
        ("\x9b31mred", "31mred"),
        ("one\r\ntwo\tthree\u2028four", "one two three four"),
        ("\u202eevil", "evil"),
        ("bell\x07", "bell"),
        ("\ud800", "?"),
        ("żółć 中文 🙂", "żółć 中文 🙂"),
    ],
)
def test_plain_text_has_no_escapes_and_one_line(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_visible_text_keeps_lines_and_shows_control_characters() -> None:
    assert visible("a\r\nb\rc\x1b[0m\x00\x7f\x85\tend") == "a\nb\nc␛[0m␀␡\n\tend"


@given(st.text())
def test_plain_and_visible_text_can_always_be_written_and_cleaned_twice(text: str) -> None:
    for clean in (plain, visible):
        once = clean(text)
        once.encode()
        assert clean(once) == once
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", once)
