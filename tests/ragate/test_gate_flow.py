"""The gate from the command line: the reserve, blessed and rescored baselines, drift, and how little `check` needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Ragate
from fake_engine import FakeEngine
from runs import METRICS, broken_run, good_run, plain_run, worse_run

from ragate import session
from ragate.gate.baseline import load_baseline
from ragate.run import Run, load_run, save_run
from ragate_engine import DeviceError


class Judge:
    """A judge without a model: context recall is 1, and 0 for the parts that `fallen` names."""

    def __init__(self) -> None:
        self.fallen: set[int] = set()
        self.name = "first"
        self.asked: list[int] = []
        self.lost_after: int | None = None
        self.engines: list[FakeEngine] = []

    def open(self, path: Path, progress: object, adapter: Path | None) -> FakeEngine:
        self.engines.append(FakeEngine(name=self.name, answer=self.answer, fail=self.fail))
        return self.engines[-1]

    def answer(self, prompt: str, schema: str) -> str:
        part = int(re.findall(r"part (\d+) of", prompt)[-1])
        self.asked.append(part)
        claim = {
            "statement": "It keeps results.",
            "reason": "so it says",
            "attributed": int(part not in self.fallen),
        }
        return json.dumps({"classifications": [claim]}, separators=(",", ":"))

    def fail(self, prompt: str) -> Exception | None:
        lost = self.lost_after is not None and len(self.asked) >= self.lost_after
        return DeviceError("the card was lost") if lost else None


TARGET = """
def answer(question):
    with open("asked.txt", "a") as f:
        f.write(question + "\\n")
    return {"answer": "It keeps results.", "contexts": ["A cache keeps results."]}
"""


@pytest.fixture
def judge(ragate: Ragate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    """A judge, and a suite `cases` of 30 items with a reserve of 30."""
    made = Judge()
    monkeypatch.setattr(session, "open_engine", made.open)
    Path("judge.gguf").touch()
    Path("cases").mkdir()
    for file, parts in (("core", range(30)), ("reserve", range(30, 60))):
        rows = (
            {
                "id": f"q{i}",
                "question": f"What does part {i} of a cache keep?",
                "reference": "It keeps results.",
                "answer": "It keeps results.",
                "contexts": [f"This is part {i} of a cache."],
            }
            for i in parts
        )
        Path(f"cases/{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield made
    for engine in made.engines:
        engine.close()


EVAL = ("eval", "-q", "--testset", "cases", "--judge", "judge.gguf", "--metrics", "context_recall")


def store(run: Run, folder: str) -> str:
    save_run(run, Path(folder) / "run.json")
    return folder


# The reserve


def test_a_baseline_holds_the_reserve_and_a_run_that_passes_does_not_judge_it(
    ragate: Ragate, judge: Judge
) -> None:
    assert ragate(*EVAL, "--update-baseline").code == 0
    baseline = load_baseline(Path("baselines/cases.json"))
    assert (len(baseline.items), len(baseline.reserve)) == (60, 30)
    assert ragate(*EVAL, "--out", "again").code == 0
    assert len(load_run(Path("again")).items) == 30
    assert "60 items (30 in reserve)" in ragate("baseline", "show", "baselines/cases.json").out


def test_a_run_without_the_reserve_does_not_replace_a_baseline_that_holds_it(
    ragate: Ragate, judge: Judge
) -> None:
    ragate(*EVAL, "--update-baseline")
    ragate(*EVAL, "--out", "again")
    ended = ragate("baseline", "bless", "again")
    assert ended.code == 4 and "judge it with `ragate eval --reserve always`" in ended.err
    assert load_baseline(Path("baselines/cases.json")).reserve
    assert ragate("baseline", "bless", "again", "--force").code == 0
    assert not load_baseline(Path("baselines/cases.json")).reserve


def test_a_run_full_of_errors_becomes_no_baseline(ragate: Ragate) -> None:
    store(plain_run({"m": ["error"] * 3 + [0.9] * 97}), "broken")
    ended = ragate("baseline", "set", "broken")
    assert (
        ended.code == 4
        and "m has no score for 3 of 100 items (3 error), too many for a baseline" in ended.err
    )
    assert not Path("baselines/llm-serving.json").exists()
    assert ragate("baseline", "set", "broken", "--force").code == 0


def test_an_inconclusive_run_judges_the_reserve_once_and_decides_with_it(
    ragate: Ragate, judge: Judge
) -> None:
    ragate(*EVAL, "--update-baseline")
    judge.fallen = {0, 1, 30, 31, 32, 33}  # of the 30 two are 6.7 points, and chance in one case of four
    never = ragate(*EVAL, "--reserve", "never", "--out", "never")
    assert (never.code, len(load_run(Path("never")).items)) == (2, 30)
    assert "INCONCLUSIVE: too few items to tell" in never.out

    judge.asked.clear()
    decided = ragate(*EVAL, "--out", "decided")
    assert decided.code == 1
    assert "warning: INCONCLUSIVE so far: judging the reserve of 30 items" in decided.err
    assert "FAIL: context_recall fell 10.0 pt (limit 5.0 pt = 5 %" in decided.out
    assert sorted(judge.asked) == list(range(60))
    assert ragate(*EVAL, "--reserve", "always", "--out", "always").code == 1
    assert Path("decided/run.json").read_bytes() == Path("always/run.json").read_bytes()
    timings = json.loads(Path("decided/timings.json").read_text())
    assert (timings["calls_judged"], timings["calls_resumed"]) == (60, 0)
    assert ragate("check", "baselines/cases.json", "decided").code == 1  # a stored run needs nothing else


def test_a_baseline_without_the_reserve_leaves_it_alone_and_names_the_way_out(
    ragate: Ragate, judge: Judge
) -> None:
    ragate(*EVAL, "--update-baseline", "--reserve", "never")
    judge.fallen = {0, 1}
    ended = ragate(*EVAL, "--out", "head")
    assert ended.code == 2
    assert (
        "the reserve of 30 items was not judged: the baseline holds none; `ragate eval --update-b"
        in ended.out
    )
    assert len(load_run(Path("head")).items) == 30


def test_a_run_that_is_stopped_in_the_reserve_goes_on_without_asking_anybody_twice(
    ragate: Ragate, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("flow_target.py").write_text(TARGET)
    monkeypatch.syspath_prepend(Path.cwd())
    command = (*EVAL, "--target", "flow_target:answer")
    ragate(*command, "--update-baseline", "--out", "base")
    judge.fallen = {0, 1, 30, 31, 32, 33}
    assert ragate(*command, "--out", "undisturbed").code == 1

    Path("asked.txt").unlink()
    judge.asked.clear()
    judge.lost_after = 40
    assert ragate(*command, "--out", "out").code == 4
    assert not Path("out/run.json").exists()
    judge.lost_after = None
    assert ragate(*command, "--out", "out").code == 1
    questions = Path("asked.txt").read_text().splitlines()
    assert len(questions) == len(set(questions)) == 60
    assert sorted(judge.asked) == list(range(60))
    assert Path("out/run.json").read_bytes() == Path("undisturbed/run.json").read_bytes()


# Baselines: bless, rescore


def test_bless_accepts_a_run_shows_what_it_changes_and_keeps_the_reason(ragate: Ragate) -> None:
    store(good_run(40), "good")
    store(worse_run(40), "worse")
    assert "no baseline yet" in ragate("baseline", "bless", "worse").err
    ragate("baseline", "set", "good")
    ended = ragate("baseline", "bless", "worse", "--reason", "k = 1 is twice as fast")
    assert ended.code == 0
    assert re.search(r"faithfulness +0\.\d{3} +0\.\d{3} +−\d", ended.out)
    kept = load_baseline(Path("baselines/llm-serving.json"))
    assert kept.reason == "k = 1 is twice as fast"
    assert kept.mean("faithfulness") == pytest.approx(worse_run(40).mean("faithfulness"))
    shown = ragate("baseline", "show", "baselines/llm-serving.json").out
    assert "accepted because: k = 1 is twice as fast" in shown
    assert "made today" in shown


def test_another_judge_is_invalid_until_the_stored_answers_are_rescored(ragate: Ragate, judge: Judge) -> None:
    assert ragate(*EVAL, "--update-baseline").code == 0
    before = load_baseline(Path("baselines/cases.json"))
    judge.name, judge.fallen = "second", {5}  # it is stricter, too
    refused = ragate(*EVAL)
    assert refused.code == 3
    assert "judge_weights differs" in refused.out
    assert "`ragate baseline rescore` judges the baseline's stored answers anew" in refused.out

    judge.asked.clear()
    ended = ragate("baseline", "rescore", "-q", "--testset", "cases", "--judge", "judge.gguf")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(judge.asked) == list(range(60))
    after = load_baseline(Path("baselines/cases.json"))
    assert (after.commit, after.reserve, after.reserve_hash) == (
        before.commit,
        before.reserve,
        before.reserve_hash,
    )
    assert (after.reason, after.items["q5"], after.items["q6"]) == (
        "rescored by judge.gguf",
        {"context_recall": 0.0},
        {"context_recall": 1.0},
    )
    passed = ragate(*EVAL)
    assert (passed.code, "no score changed" in passed.out) == (0, True)
    again = ragate("baseline", "rescore", "-q", "--testset", "cases", "--judge", "judge.gguf")
    assert again.code == 0  # the kept run was rescored with it
    assert load_baseline(Path("baselines/cases.json")).items == after.items


def test_each_baseline_keeps_a_run_of_its_own(ragate: Ragate, judge: Judge) -> None:
    ragate(*EVAL, "--update-baseline")
    judge.fallen = {7}
    ragate(*EVAL, "--reserve", "always", "--out", "old")
    ragate("baseline", "set", "old", "--baseline", "baselines/release.json")
    judge.name, judge.fallen = "second", set()
    rescore = ("baseline", "rescore", "-q", "--testset", "cases", "--judge", "judge.gguf")
    assert ragate(*rescore).code == 0
    assert ragate(*rescore, "--baseline", "baselines/release.json").code == 0
    kept = {path.parent.name: load_run(path) for path in Path(".ragate/cases/baselines").rglob("run.json")}
    assert kept.keys() == {"cases", "release"}


def test_answers_of_another_run_are_not_taken_for_the_baselines(ragate: Ragate, judge: Judge) -> None:
    ragate(*EVAL, "--update-baseline")
    judge.fallen = {7}
    ragate(*EVAL, "--reserve", "always", "--out", "other")
    before = Path("baselines/cases.json").read_bytes()
    ended = ragate("baseline", "rescore", "other", "-q", "--testset", "cases", "--judge", "judge.gguf")
    assert ended.code == 4
    assert "other: not the run that the baseline was made of" in ended.err
    assert Path("baselines/cases.json").read_bytes() == before


# Settings of the gate


def test_check_takes_two_paths_and_the_whole_gate_of_the_settings(ragate: Ragate) -> None:
    base, head = store(good_run(), "base"), store(worse_run(), "head")
    assert ragate("check", base, base).code == 0
    assert ragate("check", base, head).code == 1
    tenth = ("check", base, head, "--threshold", "0.105", "--metrics", "faithfulness")
    assert ragate(*tenth).code == 1
    assert ragate(*tenth, "--strategy", "point").code == 1
    assert ragate("check", base, head, "--threshold", "0.5").code == 0
    Path("ragate.toml").write_text("threshold = 0.5\n[gate.faithfulness]\nmin = 0.9\n")
    assert "faithfulness is at 0.817, below 0.9, its floor" in ragate("check", base, head).out
    Path("ragate.toml").write_text("threshold = 0.5\n[gate.faithfulness]\nthreshold = 0.01\n")
    assert ragate("check", base, head).code == 1


def test_a_change_of_clusters_stands_in_the_diff_of_baselines(ragate: Ragate) -> None:
    run = good_run(40)
    first = run.items[0].model_copy(update={"cluster": "elsewhere"})
    store(run, "base")
    store(run.model_copy(update={"items": (first, *run.items[1:])}), "head")
    ragate("baseline", "set", "base")
    assert "1 item changed cluster: serving-000" in ragate("baseline", "diff", "head").out
    assert "1 item changed cluster: those of the baseline count" in ragate("check", "base", "head").out


def test_a_run_whose_names_are_no_names_of_files_is_reported_all_the_same(ragate: Ragate) -> None:
    store(good_run(12, suite="s" * 5000, testset="t" * 5000), "long")
    store(good_run(12, suite="../../up", testset="\0"), "odd")
    for folder in ("long", "odd"):
        ended = ragate("report", folder)
        assert (ended.code, ended.err) == (0, "")
        assert " file=" not in Path(folder, "junit.xml").read_text()
        assert ragate("baseline", "set", folder).code == 0
    assert Path(".ragate/up/baselines/up/run.json").is_file()


def test_an_open_verdict_exits_0_or_2_as_the_flag_says(ragate: Ragate) -> None:
    base, head = (
        store(plain_run({"m": [1.0] * 40}), "base"),
        store(plain_run({"m": [0.0] * 3 + [1.0] * 37}), "head"),
    )
    ended = ragate("check", base, head)
    assert ended.code == 2
    assert ragate("check", base, head, "--on-inconclusive", "warn").code == 0
    gate = json.loads(ragate("check", base, head, "--format", "json").out)["gate"]
    assert (gate["verdict"], gate["exit_code"]) == ("INCONCLUSIVE", 2)


def test_a_pinned_release_is_held_against_too(ragate: Ragate) -> None:
    for name, level in (("release", 1.0), ("base", 0.96), ("head", 0.94)):
        store(plain_run({"faithfulness": [level] * 50}), name)
    ragate("baseline", "set", "release", "--baseline", "release.json")
    assert ragate("check", "base", "head").code == 0
    drifted = ragate("check", "base", "head", "--release", "release.json")
    assert drifted.code == 1
    assert re.search(r"FAIL: against the release of \d{4}-\d\d-\d\d, faithfulness fell 6\.0 pt", drifted.out)
    assert "`ragate baseline diff --baseline release.json`" in drifted.out
    narrowed = ragate("check", "base", "head", "--release", "release.json", "--metrics", "faithfulness")
    assert (narrowed.code, narrowed.out) == (1, drifted.out)
    Path("ragate.toml").write_text('release = "gone.json"\n')
    assert ragate("check", "base", "head").code == 3


def test_warnings_about_the_release_reach_terminal_report_comment_and_junit(ragate: Ragate) -> None:
    run = good_run(40)
    store(run, "base")
    ragate("baseline", "set", "base")
    ragate("baseline", "set", "base", "--baseline", "release.json")
    old = json.loads(Path("release.json").read_text())
    del old["clusters"]
    Path("release.json").write_text(json.dumps(old | {"version": 2}))
    store(run, "head")
    Path("ragate.toml").write_text('release = "release.json"\n')
    told = "clusters count, which a change may edit; "
    assert (
        "! against the release: the baseline is of an older version and does not know which items belong"
        in (ragate("check", "baselines/llm-serving.json", "head").out)
    )
    assert ragate("report", "head").code == 0
    command = "ragate baseline set --baseline release.json"
    for file in ("report.html", "comment.md", "junit.xml"):
        text = Path("head", file).read_text()
        assert text.count(told) >= 1, file
        assert command in text, file
    assert "<code>ragate baseline set --baseline release.json</code>" in Path("head/report.html").read_text()
    assert "`ragate baseline set --baseline release.json`" in Path("head/comment.md").read_text()


def test_a_critical_item_that_broke_fails_check(ragate: Ragate) -> None:
    ended = ragate("check", store(good_run(), "base"), store(broken_run(), "head"))
    assert ended.code == 1
    assert "critical item serving-004 broke on faithfulness" in ended.out


def test_check_imports_neither_an_engine_nor_a_table_library(ragate: Ragate, tmp_path: Path) -> None:
    store(good_run(), "base")
    store(worse_run(), "head")
    code = (
        "import sys; from ragate.cli import run; "
        "code = run(['check', 'base', 'head', '--format', 'json']); print(code, *sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    code_seen, *modules = ended.stderr.split()
    assert code_seen == "1"
    assert not {"torch", "ragas", "pandas", "transformers", "scipy.stats", "datasets"} & set(modules)
    assert {metric["metric"] for metric in json.loads(ended.stdout)["gate"]["metrics"]} == set(METRICS)
