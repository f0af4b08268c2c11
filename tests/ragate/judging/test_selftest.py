"""`ragate judge selftest`: what moves the verdicts of a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Ragate
from fake_engine import FakeEngine

from ragate import session
from ragate.judging.asks import Heard, Said
from ragate.judging.selftest import REWRITES, SelfTest, compared, introduced, reworded, spaced

PATH = Path(".ragate/judge/judge.gguf/selftest.json")


def cases(count: int = 6) -> str:
    rows = [
        {
            "id": f"c{i}",
            "question": f"What is {i}?",
            "contexts": [f"{i} is a number.", f"{i} is the first."],
            "answer": f"{i} is a big number. It comes first.",
        }
        for i in range(count)
    ]
    Path("cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "cases.jsonl"


def test_a_judge_of_the_prompt_alone_is_steady_and_rewrites_are_counted(
    ragate: Ragate, engines: list[FakeEngine]
) -> None:
    ended = ragate("judge", "selftest", "--testset", cases(), "--judge", "judge.gguf", "-q")
    assert ended.code == 0, ended.err
    assert "moved nothing" in ended.out
    found = SelfTest.model_validate_json(PATH.read_text())
    by_name = {probe.name: probe for probe in found.probes}
    assert [probe.name for probe in found.probes[:3]] == [
        "the same again",
        "last item first",
        "one at a time",
    ]
    assert by_name["the same again"].verdicts == 6 * (2 + 2)  # two sentences, two contexts
    assert by_name["answer: synonyms"].verdicts == 6  # only the sentence with "big" is another
    assert by_name["answer: spaces doubled"].verdicts == 12
    assert by_name["contexts: last one first"].verdicts == 12
    assert by_name["contexts: last one first"].mean_shift > 0


def test_every_round_is_computed_anew_and_one_engine_takes_one_at_a_time(
    ragate: Ragate, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    monkeypatch.setattr(session, "configure", lambda config: batches.append(config.max_batch))
    assert ragate("judge", "selftest", "--testset", cases(), "--judge", "judge.gguf", "-q").code == 0
    once = 6 * (1 + 2)
    assert len(engines[0].prompts) == 3 * once + (len(REWRITES) + 1) * 6
    assert engines[0].prompts[:once] == engines[0].prompts[once : 2 * once]
    assert engines[0].prompts[2 * once : 3 * once] == engines[0].prompts[:once][::-1]
    assert len(engines[1].prompts) == once and batches == [None, 1]


def test_a_judge_that_changes_its_mind_fails(ragate: Ragate, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def moody(prompt: str, schema: str) -> str | None:
        asked[prompt] = asked.get(prompt, 0) + 1
        if '"statements"' in schema:
            return None
        return json.dumps({"reason": "why", "verdict": asked[prompt] % 2}, separators=(",", ":"))

    engine = FakeEngine(answer=moody)
    monkeypatch.setattr(session, "open_engine", lambda *_: engine)
    Path("judge.gguf").touch()
    ended = ragate(
        "judge", "selftest", "--testset", cases(), "--judge", "judge.gguf", "-q", "--format", "json"
    )
    engine.close()
    assert ended.code == 1
    assert json.loads(ended.out)["probes"][0]["moved"] == 12


def test_a_judge_that_says_nothing_is_not_called_steady(
    ragate: Ragate, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(max_len=10)
    monkeypatch.setattr(session, "open_engine", lambda *_: engine)
    Path("judge.gguf").touch()
    ended = ragate("judge", "selftest", "--testset", cases(), "--judge", "judge.gguf", "-q")
    engine.close()
    assert ended.code == 4 and "moved nothing" not in ended.out
    assert "the judge gave no verdict on any item: context too long" in ended.err


def test_a_test_set_without_stored_answers_is_refused(ragate: Ragate, engines: list[FakeEngine]) -> None:
    Path("bare.jsonl").write_text('{"question": "Why?", "contexts": ["x"]}\n')
    ended = ragate("judge", "selftest", "--testset", "bare.jsonl", "--judge", "judge.gguf", "-q")
    assert ended.code == 4 and "answer" in ended.err and not engines


def heard(**verdicts: tuple[int, float]) -> Heard:
    said = {
        ("nli", name, 0): (Said(text=name, verdict=verdict, probability=p, reason=""),)
        for name, (verdict, p) in verdicts.items()
    }
    return Heard(said, {})


def test_moved_verdicts_and_shifts_are_counted() -> None:
    probe = compared("x", heard(a=(1, 0.9), b=(0, 0.4)), heard(a=(0, 0.4), b=(0, 0.3)), strict=True)
    assert (probe.verdicts, probe.moved, probe.moved_share) == (2, 1, 0.5)
    assert probe.mean_shift == pytest.approx(0.3) and probe.largest_shift == pytest.approx(0.5)


def test_a_verdict_that_one_side_lacks_has_moved() -> None:
    assert compared("x", heard(a=(1, 0.9)), heard(), strict=True).moved == 1
    assert compared("x", heard(a=(1, 0.9)), heard(), strict=False).verdicts == 0


def test_a_shift_without_another_verdict_is_not_steady_either() -> None:
    probe = compared("x", heard(a=(1, 0.9)), heard(a=(1, 0.9000001)), strict=True)
    found = SelfTest(judge="j", testset="t", items=1, failed=0, probes=(probe,))
    assert probe.moved == 0 and not found.steady


def test_rewrites_change_no_meaning() -> None:
    assert spaced("a b c") == "a  b  c"
    assert introduced("It is.") == "In short, It is."
    assert reworded("Many use a big tool; bigger helps.") == "Many employ a large tool; bigger assists."
