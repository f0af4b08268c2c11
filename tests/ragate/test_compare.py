"""`ragate compare`, `ragate show` and `ragate eval --dry-run`: what they say, and that no text breaks the terminal."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import FINGERPRINT, HOSTILE, METRICS, errored_run, good_run, hostile_run, plain_run, worse_run

from ragate import rates, session
from ragate.cli import run as command
from ragate.errors import RunError
from ragate.forecast import USUAL_OUTPUT, _computed, duration
from ragate.gate.baseline import baseline_of
from ragate.report.compare import compare, print_compare
from ragate.report.item import LONGEST, item_named, print_item
from ragate.report.untrusted import plain_lines
from ragate.run import Run, load_run, save_run
from ragate_engine.roofline import Ceilings

if TYPE_CHECKING:
    from collections.abc import Callable

DATE = datetime(2025, 11, 20, 9, 30, tzinfo=UTC)


def _printed(printing: Callable[[Console], None], width: int = 120, *, colour: bool = False) -> str:
    file = io.StringIO()
    printing(Console(file=file, width=width, force_terminal=colour, highlight=False))
    return file.getvalue()


def _shown(run: Run, name: str, base: Run | None = None, width: int = 120, **options: Any) -> str:
    baseline = baseline_of(base, commit=None, date=DATE) if base else None
    return _printed(
        lambda console: print_item(console, run, item_named(run, name), baseline, base, **options), width
    )


def _compared(first: Run, second: Run, width: int = 120, listed: int = 20) -> str:
    found = compare(first, second)
    return _printed(lambda console: print_compare(console, found, ("main", "branch"), listed), width)


def _reworded(run: Run) -> Run:
    first = run.items[0].model_copy(update={"answer": "Something else.", "contexts": ("One.", "Two.")})
    return run.model_copy(update={"items": (first, *run.items[1:])})


# Two runs


def test_both_means_their_change_and_its_interval_stand_side_by_side() -> None:
    text = _compared(good_run(), worse_run())
    row = next(line for line in text.splitlines() if line.startswith("faithfulness "))
    cells = ["faithfulness", "0.931", "0.817", "−11.3", "−17.4 to −7.1", "0.002", "17", "2"]
    assert re.split(r"\s{2,}", row.strip()) == cells


def test_the_items_that_changed_are_listed_worst_first_with_both_scores() -> None:
    text = _compared(good_run(), worse_run(), listed=0)
    rows = [line for line in text.splitlines() if line.startswith("serving-")]
    assert len(rows) == 34
    assert rows[0].split() == ["serving-001", "·", "1.00→0.00", "·", "·"]
    assert "… and 32 more: --items 0 lists all" in _compared(good_run(), worse_run(), listed=2)


def test_items_of_which_only_texts_changed_are_listed_too() -> None:
    base = good_run(12)
    text = _compared(base, _reworded(base))
    rows = [line for line in text.splitlines() if line.startswith("serving-")]
    assert [row.split() for row in rows] == [["serving-000", "·", "·", "·", "·", "changed", "2", "new"]]


def test_a_run_beside_itself_has_no_changes() -> None:
    text = _compared(good_run(12), good_run(12))
    assert "no item of both changed" in text
    assert text.count(" 0.0 ") >= 4


def test_what_makes_two_runs_incomparable_is_said_and_they_are_shown_all_the_same() -> None:
    other = plain_run({"m": [1.0, 0.5]}, fingerprint=FINGERPRINT | {"ragas": "0.5"}, partial=True)
    text = _compared(plain_run({"m": [0.5, 0.5, 0.5], "n": [1.0, 1.0, 1.0]}, partial=True), other)
    assert "! ragas differs: A 0.4.3, B 0.5" in text
    assert "! 1 items are only in A" in text
    assert text.count("PARTIAL") == 2
    assert "0.50→1.00" in text
    assert "n " not in text.splitlines()[5][:3]


def test_runs_with_nothing_in_common_are_no_error() -> None:
    assert "no item of both changed" in _compared(plain_run({"m": [1.0]}), plain_run({"n": [1.0]}))


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(width: int) -> None:
    text = _compared(errored_run(), worse_run(), width, listed=0)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "timeout" not in text
    assert "–→1.00" in text or "–→0." in text


def test_compare_is_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in (("a", good_run(12)), ("b", worse_run(12))):
        save_run(run, tmp_path / name / "run.json")
    assert command(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [metric["metric"] for metric in data["metrics"]] == list(METRICS)
    assert all(item["change"] in ("regressed", "fixed") for item in data["items"])
    assert command(["compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 4


# One item


def test_an_item_is_shown_with_its_contexts_claims_verdicts_and_reasons() -> None:
    run = worse_run(12)
    item = run.items[1]
    text = " ".join(_shown(run, item.id).split())
    for part in (item.question, item.reference, item.answer, *item.contexts):
        assert part
        assert " ".join(part.split()) in text
    for score in run.scores:
        if score.item == item.id:
            for claim in score.claims:
                assert claim.text in text
                assert claim.reason in text
    assert "context 1 ✓ useful" in text or "context 1 ✗ not useful" in text
    assert "Context recall 0.000" in text
    assert "0.88 ✗ not covered" in text
    assert "judge call" not in text
    assert "call context_recall: " not in text
    assert "call context_recall: " in _shown(run, item.id, calls=True)


def test_beside_the_baseline_its_scores_and_what_changed_in_answer_and_contexts_are_shown() -> None:
    base = good_run(12)
    run = _reworded(base)
    first = run.items[0].model_copy(update={"contexts": (base.items[0].contexts[1], "A new one.")})
    run = run.model_copy(update={"items": (first, *run.items[1:])})
    text = _shown(run, "serving-000", base)
    assert re.search(r"Faithfulness  1\.000  baseline 1\.000", text)
    assert "{+Something else+}" in text
    assert "was 2  " in text
    assert "new  " in text
    assert text.count("lost  ") == 4


def test_an_item_is_found_by_the_beginning_of_its_id_and_what_is_near_is_named() -> None:
    run = good_run(12)
    assert item_named(run, "serving-007").id == "serving-007"
    with pytest.raises(RunError, match=r"item serving-00: 10 items begin so: serving-000, .*, …"):
        item_named(run, "serving-00")
    with pytest.raises(
        RunError, match=r"item serving-099: the run of llm-serving has none; there are serving-0"
    ):
        item_named(run, "serving-099")
    one = good_run(1)
    assert item_named(one, "serv").id == "serving-000"


def test_an_errored_score_shows_its_state_and_error() -> None:
    text = _shown(errored_run(), "serving-003", good_run())
    assert "Faithfulness  timeout  baseline 1.000" in text
    assert "no answer from the judge in 120 s" in text


def test_show_needs_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(good_run(12), tmp_path / "run" / "run.json")
    assert command(["show", "serving-003", "run"]) == 0
    assert "How many bits a weight" in capsys.readouterr().out
    assert command(["show", "nothing", "run"]) == 4
    assert capsys.readouterr().err.startswith("error: item nothing: the run of llm-serving has none")


# Hostile text


@pytest.mark.parametrize("colour", [False, True])
def test_a_megabyte_of_hostile_text_reaches_no_terminal_raw(colour: bool) -> None:
    base = hostile_run()
    huge = (HOSTILE + " word ") * (1_000_000 // (len(HOSTILE) + 6))
    first = base.items[0].model_copy(update={"question": huge, "answer": huge, "contexts": (huge, huge[1:])})
    scores = tuple(
        s.model_copy(
            update={
                "value": 0.0,
                "error": huge,
                "claims": tuple(c.model_copy(update={"text": huge, "reason": huge}) for c in s.claims),
            }
        )
        for s in base.scores
    )
    run = base.model_copy(update={"items": (first, *base.items[1:]), "scores": scores})
    baseline = baseline_of(base, commit=None, date=DATE)

    def everything(console: Console) -> None:
        print_compare(console, compare(base, run), (HOSTILE, HOSTILE), 0)
        print_item(console, run, run.items[0], baseline, base, calls=True)

    text = _printed(everything, colour=colour)
    assert set(re.findall("\x1b(.)", text)) <= ({"["} if colour else set())
    assert not re.search("\x1b\\[[^m]*[^0-9;m]", text)
    assert not re.search("[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e\u2028]", text)
    assert "more characters: --full)" in text
    assert len(text) < 200 * LONGEST
    text.encode()


@given(st.text())
def test_plain_lines_can_be_written_and_cleaned_twice(text: str) -> None:
    once = plain_lines(text)
    once.encode()
    assert plain_lines(once) == once
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", once)


# What an evaluation would take

ITEMS = [
    {
        "id": f"q{i}",
        "question": f"What does part {i} of a cache keep?",
        "reference": f"Part {i} keeps results.",
        "answer": f"Part {i} keeps results that were computed before.",
        "contexts": [f"Part {i} of a cache keeps results.", "Blocks hold 16 tokens."][: 1 + i % 2],
    }
    for i in range(12)
]


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of an evaluation of twelve items in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("cases.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return ["eval", "--quiet", "--testset", "cases.jsonl"]


def _forecast(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert command([*arguments, "--dry-run", "--format", "json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("way", ["judge", "sentences"])
def test_a_dry_run_counts_the_calls_that_the_run_then_makes(
    cases: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    cases += ["--statements", way]
    found = _forecast([*cases, "--judge", "http://localhost:9/v1#m"], capsys)
    assert not Path(".ragate").exists()
    assert (found["seconds"], found["computed_tokens"]) == (None, None)

    engine = FakeEngine()
    monkeypatch.setattr(session, "open_engine", lambda *_: engine)
    Path("judge.gguf").touch()
    command([*cases, "--judge", "judge.gguf"])
    engine.close()
    made = load_run(Path(".ragate/cases")).tokens
    assert (found["calls"], found["distinct"]) == (made.calls, made.distinct_calls)

    # a token of the fake engine is a character; what it made is the best guess from then on
    again = _forecast([*cases, "--judge", "http://localhost:9/v1#m"], capsys)
    assert again["prompt_tokens"] == pytest.approx(made.prompt_tokens / 4, rel=0.02)
    assert again["output_tokens"] == pytest.approx(made.output_tokens, rel=0.2)
    # but its answers on statements made otherwise are none
    other = [
        *cases,
        "--metrics",
        "faithfulness",
        "--statements",
        "judge" if way == "sentences" else "sentences",
    ]
    guess = _forecast([*other, "--judge", "http://localhost:9/v1#m"], capsys)
    assert guess["output_tokens"] == guess["distinct"] * USUAL_OUTPUT["faithfulness"]


def test_a_dry_run_with_a_model_counts_by_its_tokenizer_and_times_by_the_machines_rates(
    cases: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engine")
    from tiny_gguf import write_tiny

    write_tiny(Path("judge.gguf"))
    monkeypatch.setattr(rates, "of_cpu", lambda threads: Ceilings(1e6, 1e9, "made up"))
    arguments = [*cases, "--judge", "judge.gguf", "--device", "cpu"]
    slow = _forecast(arguments, capsys)
    monkeypatch.setattr(rates, "of_cpu", lambda threads: Ceilings(2e6, 2e9, "made up"))
    fast = _forecast(arguments, capsys)
    assert slow["seconds"][0] == pytest.approx(2 * fast["seconds"][0])
    assert slow["seconds"] == sorted(slow["seconds"])
    assert 0 < slow["computed_tokens"] < slow["prompt_tokens"] / 2
    assert slow["rates"] == "made up"
    few = _forecast([*arguments, "--metrics", "context_recall"], capsys)
    assert (few["calls"], few["distinct"]) == (12, 12)
    command([*arguments, "--dry-run"])
    text = capsys.readouterr().out
    assert "nothing was judged" in text
    assert re.search(r"^time +\S+ .* on the CPU, \d+ cores?, and loading; never under ", text, re.MULTILINE)


def test_a_dry_run_does_not_ask_the_target(cases: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("def answer(question):\n    raise SystemExit(7)\n")
    found = _forecast([*cases, "--judge", "http://localhost:9/v1#m", "--target", "mine:answer"], capsys)
    assert found["notes"][0].startswith(
        "mine:answer is not asked: answers and contexts are taken to be the test set's"
    )


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=70), max_size=8))
def test_what_a_prefix_cache_computes_is_what_no_earlier_prompt_has_in_whole_blocks(
    prompts: list[list[int]],
) -> None:
    expected, before = 0, set[tuple[int, ...]]()
    for prompt in prompts:
        shared = max(
            (n for n in range(0, len(prompt) + 1, 16) if not n or tuple(prompt[:n]) in before), default=0
        )
        expected += len(prompt) - min(shared, len(prompt) - 1)
        before |= {tuple(prompt[:n]) for n in range(16, len(prompt) + 1, 16)}
    assert _computed(prompts) == expected


def test_the_last_token_of_a_prompt_is_computed_though_all_its_blocks_are_known() -> None:
    assert _computed([[1] * 32, [1] * 32]) == 32 + 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (8.4, "8 s"), (99.4, "99 s"), (150, "2 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_a_duration_is_said_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text
