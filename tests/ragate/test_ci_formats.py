"""Annotations, JUnit and badge: what a CI system reads, and that no text of others means anything to it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    HOSTILE,
    METRICS,
    broken_run,
    errored_run,
    good_run,
    hostile_run,
    partial_run,
    plain_run,
    worse_run,
)

from ragate.cli import run as ragate
from ragate.gate.baseline import Baseline, baseline_of
from ragate.gate.verdict import GateResult, decide
from ragate.report.annotations import command, place_of, render_annotations
from ragate.report.badge import COLOURS, render_badge
from ragate.report.junit import render_junit
from ragate.run import ItemRecord, Run, save_run

DATE = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


def held(run: Run, base: Run, **options: object) -> tuple[Run, GateResult, Baseline]:
    made = baseline_of(base, commit=None, date=DATE)
    return run, decide(made, run, **options), made  # type: ignore[arg-type]


def unescaped(text: str) -> str:
    """As the runner reads a command (actions/runner, ActionCommand.cs)."""
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, character)
    return text


def read(line: str) -> tuple[str, dict[str, str], str]:
    """(level, properties, message) of a workflow command."""
    match = re.fullmatch(r"::(\w+) ([^:]*)::(.*)", line)
    assert match, line
    pairs = (pair.split("=", 1) for pair in match[2].split(","))
    return match[1], {name: unescaped(value) for name, value in pairs}, unescaped(match[3])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which `rag` has the test set, and is the current folder."""
    folder = tmp_path / "rag" / "testsets" / "llm-serving"
    folder.mkdir(parents=True)
    rows = [{"id": item.id, "question": item.question} for item in good_run().items]
    (folder / "core.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path / "rag")
    return tmp_path


# Annotations


def test_the_verdict_comes_first_then_the_items_at_their_lines(checkout: Path) -> None:
    lines = render_annotations(*held(worse_run(), good_run()), checkout).splitlines()
    level, properties, message = read(lines[0])
    assert (level, properties) == ("error", {"title": "RAG gate FAIL: llm-serving"})
    assert message.startswith("faithfulness fell 11.3 pt (limit 4.7 pt = 5 %")
    assert "9 of 26 items are marked, the report has all" in message
    level, properties, message = read(lines[1])
    assert level == "error"
    assert properties == {
        "file": "rag/testsets/llm-serving/core.jsonl",
        "line": "2",
        "title": "serving-001 got worse",
    }
    assert message.startswith(
        "context_recall 1.00 to 0.00: Why is the KV cache split into blocks of 16 tokens? (No"
    )


def test_no_level_has_more_than_github_shows(checkout: Path) -> None:
    base = plain_run({metric: [1.0] * 300 for metric in METRICS})
    run = plain_run(
        {METRICS[0]: [0.0] * 300, METRICS[1]: [0.99] * 300, METRICS[2]: [1.0] * 300, METRICS[3]: [1.0] * 300}
    )
    for pair in ((run, base), (worse_run(), good_run()), (base, run), (partial_run(), good_run())):
        levels = [read(line)[0] for line in render_annotations(*held(*pair)).splitlines()]
        assert all(levels.count(level) <= 10 for level in levels)
        assert len(levels) >= 1


def test_a_run_that_passes_marks_only_what_broke(checkout: Path) -> None:
    small = plain_run({"m": [0.9] * 49 + [0.89]})
    (line,) = render_annotations(*held(small, plain_run({"m": [0.9] * 50}))).splitlines()
    assert read(line)[0] == "notice"
    broke = plain_run({"m": [1.0] * 299 + [0.1]})
    lines = render_annotations(*held(broke, plain_run({"m": [1.0] * 300}))).splitlines()
    assert [read(line)[0] for line in lines] == ["notice", "warning"]
    assert read(lines[1])[1]["title"] == "q299 got worse"


def test_a_run_without_a_baseline_is_an_error() -> None:
    level, _, message = read(render_annotations(good_run(), None, None).splitlines()[0])
    assert (level, message) == ("error", "no baseline to compare with; `ragate baseline set` makes one")


def test_an_item_is_marked_where_it_stands_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    Path("set/core.jsonl").write_text('{"question": "a"}\n\n{"query": "b", "reserve": true}\n')
    Path("set/reserve.jsonl").write_text('{"question": "c"}\nnot JSON\n')
    Path("one.csv").write_text("question\nx\n")
    places = {
        ("set", "a", 1, False): ("set/core.jsonl", 1),
        ("set", "b", 3, True): ("set/core.jsonl", 3),
        ("set", "c", 1, True): ("set/reserve.jsonl", 1),
        ("set", "c", 2, True): None,
        ("set", "a", 99, False): None,
        ("one.csv", "x", 2, False): ("one.csv", 2),
        ("one.csv", "x", None, False): None,
        ("gone.csv", "x", 2, False): None,
        ("datasets:hub/name", "x", 2, False): None,
        ("x" * 5000, "x", 2, False): None,
        ("x\0", "x", 2, False): None,
    }
    for (testset, question, line, reserve), expected in places.items():
        item = ItemRecord(id="i", question=question, line=line, reserve=reserve)
        assert place_of(testset, item) == expected, testset
    item = ItemRecord(id="i", question="a", line=1)
    assert place_of("one.csv", item, tmp_path / "set") is None  # outside the checkout


@given(st.text(), st.text())
def test_a_command_is_one_line_that_reads_back_and_begins_no_other(message: str, title: str) -> None:
    line = command("error", f"x{message}", title=f"y{title}")
    assert not set("\r\n") & set(line)
    assert len(line.splitlines()) == 1
    level, properties, said = read(line)
    assert level == "error"
    assert set(properties) == {"title"}
    assert said.startswith("x") and properties["title"].startswith("y")


def test_hostile_texts_become_no_commands() -> None:
    run = hostile_run()
    attack = "\n::set-env name=X::y\r\n::error file=a,line=1::z\n##[add-mask]x %0A::stop-commands::a"
    items = tuple(
        i.model_copy(update={"question": attack * 20_000, "id": f"{i.id[:50]}{n}{attack}"})
        for n, i in enumerate(run.items)
    )
    ids = {old.id: new.id for old, new in zip(run.items, items, strict=True)}
    scores = tuple(s.model_copy(update={"item": ids[s.item], "value": 0.0}) for s in run.scores)
    whole = tuple(s.model_copy(update={"value": 1.0}) for s in scores)
    text = render_annotations(
        *held(
            run.model_copy(update={"items": items, "scores": scores}),
            run.model_copy(update={"items": items, "scores": whole}),
        )
    )
    lines = text.splitlines()
    assert len(lines) == 10
    assert {read(line)[0] for line in lines} == {"error"}
    assert all(len(line) < 8_000 and "%0A" not in unescaped(line).replace("%0A::stop", "") for line in lines)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


# JUnit


def cases(text: str) -> tuple[ElementTree.Element, dict[str, str]]:
    """The XML, and test-case name -> how it ended (the tag of its first element that says so)."""
    root = ElementTree.fromstring(text)
    ended = {}
    for case in root.iter("testcase"):
        tags = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        assert len(tags) <= 1
        ended[f"{case.get('classname')}/{case.get('name')}"] = tags[0] if tags else "passed"
    return root, ended


def test_junit_fails_in_the_metrics_and_items_that_fail_the_gate() -> None:
    root, ended = cases(render_junit(*held(worse_run(), good_run()), "testsets/llm-serving/core.jsonl"))
    assert ended["llm-serving.gate/verdict"] == "failure"
    assert ended["llm-serving.gate/faithfulness"] == "failure"
    assert ended["llm-serving.items/serving-001"] == "failure"
    assert ended["llm-serving.items/serving-000"] == "passed"
    case = root.find(".//testcase[@name='serving-001']")
    assert case is not None
    assert (case.get("file"), case.get("line")) == ("testsets/llm-serving/core.jsonl", "2")
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("message") == "context_recall 1.00 -> 0.00"
    assert int(root.get("tests", "0")) == 105 == len(ended)
    assert int(root.get("failures", "0")) == list(ended.values()).count("failure")


@pytest.mark.parametrize(
    ("run", "base", "options"),
    [
        (good_run(12), good_run(12), {}),
        (worse_run(), good_run(), {}),
        (worse_run(), good_run(), {"strategy": "point", "threshold": 0.9}),
        (worse_run(24), good_run(24), {"on_inconclusive": "warn"}),
        (worse_run(24), good_run(24), {"on_inconclusive": "fail"}),
        (errored_run(), good_run(), {}),
        (partial_run(), good_run(), {}),
        (broken_run(), good_run(), {}),
        (good_run(12, fingerprint={"judge": "x"}), good_run(12), {}),
    ],
)
def test_junit_has_failures_or_errors_exactly_where_the_exit_code_is_not_0(
    run: Run, base: Run, options: dict[str, object]
) -> None:
    made = held(run, base, **options)
    root, _ = cases(render_junit(*made))
    red = int(root.get("failures", "0")) + int(root.get("errors", "0"))
    assert (red > 0) == (made[1].exit_code != 0)


def test_junit_without_a_baseline_is_an_error_and_drift_is_a_case() -> None:
    root, ended = cases(render_junit(good_run(12), None, None))
    assert ended["llm-serving.gate/baseline"] == "error"
    assert root.get("errors") == "1"
    release = baseline_of(good_run(), commit=None, date=DATE)
    base = baseline_of(worse_run(), commit=None, date=DATE)
    gate = decide(base, worse_run(), release=release)
    _, ended = cases(render_junit(worse_run(), gate, base))
    assert ended["llm-serving.gate/verdict"] == ended["llm-serving.gate/drift since the release"] == "failure"
    assert ended["llm-serving.gate/faithfulness"] == "passed"


def test_hostile_texts_are_text_in_junit() -> None:
    run = hostile_run()
    run = run.model_copy(
        update={"scores": tuple(s.model_copy(update={"state": "error", "value": None}) for s in run.scores)}
    )
    text = render_junit(run.model_copy(update={"suite": HOSTILE * 10_000}), None, None)
    root, ended = cases(text)
    assert len(ended) == 13
    assert {element.tag for element in root.iter()} == {
        "testsuites", "testsuite", "testcase", "error", "skipped", "system-out",
    }  # fmt: skip
    assert len(text) < 200_000


@given(st.text())
def test_any_text_makes_xml_that_can_be_read(text: str) -> None:
    run = plain_run({"m": [1.0]}, suite=f"s{text}")
    assert ElementTree.fromstring(render_junit(run, None, None).encode()).tag == "testsuites"
    assert ElementTree.fromstring(render_badge(None, text).encode()).tag.endswith("svg")


# The badge


@pytest.mark.parametrize("word", list(COLOURS))
def test_the_badge_says_the_verdict_in_words_and_colour_that_can_be_read(word: str) -> None:
    gate = held(good_run(12), good_run(12))[1].model_copy(update={"verdict": word})
    root = ElementTree.fromstring(render_badge(None if word == "NO BASELINE" else gate))
    assert root.get("aria-label") == f"RAG gate: {word}"
    assert [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")] == ["RAG gate", word]
    channels = [int(COLOURS[word][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) >= 4.5  # WCAG 2, white on it


# The commands


def test_check_gives_each_format_and_nothing_else_on_stdout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(good_run(), Path("base/run.json"))
    save_run(worse_run(), Path("head/run.json"))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(checkout))
    for variable in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        monkeypatch.setenv(variable, str(checkout / variable))
        (checkout / variable).write_text("before\n")
    out = {}
    for format_ in ("json", "junit", "markdown", "github"):
        assert ragate(["check", "base", "head", "--format", format_]) == 1
        out[format_] = capsys.readouterr().out
        if format_ != "github":
            assert (checkout / "GITHUB_OUTPUT").read_text() == "before\n"
    assert json.loads(out["json"])["gate"]["verdict"] == "FAIL"
    assert cases(out["junit"])[1]["llm-serving.gate/verdict"] == "failure"
    assert out["markdown"].startswith("<!-- ragate:llm-serving -->")
    assert all(read(line) for line in out["github"].splitlines())
    assert "file=rag/testsets/llm-serving/core.jsonl,line=2," in out["github"]
    outputs = dict(line.split("=", 1) for line in (checkout / "GITHUB_OUTPUT").read_text().splitlines()[1:])
    assert (outputs["verdict"], outputs["exit-code"]) == ("FAIL", "1")
    assert outputs["sentence"].startswith("FAIL: faithfulness fell")
    assert outputs["folder"] == str(checkout / "rag" / "head")
    summary = (checkout / "GITHUB_STEP_SUMMARY").read_text()
    assert summary.startswith("before\n<!-- ragate:llm-serving -->\n> [!CAUTION]")
