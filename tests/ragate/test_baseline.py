"""Baselines: what is kept, how it reads in a diff, and what a bad file says."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from runs import errored_run, good_run, partial_run, plain_run, worse_run

from ragate.errors import BaselineError
from ragate.gate.baseline import (
    age_of,
    baseline_of,
    baseline_path,
    diff_baselines,
    git_commit,
    load_baseline,
    save_baseline,
)

DATE = datetime(2025, 11, 20, 9, 30, 15, tzinfo=UTC)
COMMIT = "3f2a91c0" * 5


def test_a_saved_baseline_comes_back_with_every_bit_of_its_scores(tmp_path: Path) -> None:
    baseline = baseline_of(plain_run({"faithfulness": [1 / 3, 0.1 + 0.2, 1.0, 0]}), commit=COMMIT, date=DATE)
    path = tmp_path / "suite.json"
    save_baseline(baseline, path)
    loaded = load_baseline(path)
    assert loaded == baseline
    assert loaded.values("faithfulness") == {"q000": 1 / 3, "q001": 0.1 + 0.2, "q002": 1.0, "q003": 0.0}


def test_a_change_of_one_item_is_a_diff_of_one_line(tmp_path: Path) -> None:
    texts = []
    for value in (1.0, 0.5):
        save_baseline(
            baseline_of(plain_run({"m": [1.0, value, 0.25]}), commit=None, date=DATE), tmp_path / "b.json"
        )
        texts.append((tmp_path / "b.json").read_text().splitlines())
    different = [(a, b) for a, b in zip(*texts, strict=True) if a != b]
    assert different == [('  "q001": {"m": 1.0},', '  "q001": {"m": 0.5},')]


def test_states_are_kept_in_place_of_scores_and_never_averaged() -> None:
    baseline = baseline_of(plain_run({"m": [1.0, "timeout", 0.5, "nan"]}), commit=None, date=DATE)
    assert baseline.items["q001"] == {"m": "timeout"}
    assert baseline.mean("m") == 0.75
    assert [baseline.state(f"q00{i}", "m") for i in range(5)] == ["ok", "timeout", "ok", "nan", "missing"]


def test_a_baseline_of_a_hundred_items_is_small(tmp_path: Path) -> None:
    save_baseline(baseline_of(good_run(), commit=COMMIT, date=DATE), tmp_path / "b.json")
    assert (tmp_path / "b.json").stat().st_size < 20_000


def test_the_date_is_kept_in_utc_whatever_zone_the_caller_is_in() -> None:
    local = datetime(2025, 11, 20, 11, 30, 15, 999, tzinfo=timezone(timedelta(hours=2)))
    assert (
        baseline_of(good_run(12), commit=None, date=local).model_dump(mode="json")["date"]
        == "2025-11-20T09:30:15Z"
    )


def test_a_partial_run_cannot_become_a_baseline() -> None:
    with pytest.raises(BaselineError, match="PARTIAL"):
        baseline_of(partial_run(12), commit=None, date=DATE)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf")])
def test_a_score_outside_0_to_1_cannot_enter_a_baseline(value: float) -> None:
    with pytest.raises(BaselineError, match=r"items\.q001\.m"):
        baseline_of(plain_run({"m": [1.0, value]}), commit=None, date=DATE)


def test_a_missing_baseline_names_the_command_that_makes_one_and_exits_3(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="`ragate baseline set`") as e:
        load_baseline(tmp_path / "none.json")
    assert e.value.exit_code == 3


def _text(**changes: object) -> str:
    fields = baseline_of(plain_run({"m": [1.0]}), commit=None, date=DATE).model_dump(mode="json")
    return json.dumps(fields | changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a baseline"),
        ("<<<<<<< HEAD\n{}", "not a baseline"),
        ("[]", "not a baseline"),
        ("[" * 100_000, "not a baseline"),
        (_text(version=4), "newer than this ragate"),
        (_text(version=0), "older than this ragate reads (1); make a new one with `ragate baseline set`"),
        (_text(items={"q000": {"m": 7}}), "items.q000.m"),
        (_text(items={"q000": {"m": "0.5"}}), "items.q000.m"),
        (_text(items={"q000": {"m": True}}), "items.q000.m"),
        (_text(items={"q000": {"m": float("nan")}}), "items.q000.m"),
        (_text(date="yesterday"), "date"),
        (_text(extra=1), "extra"),
        ('{"items": {"q1": {}, "q1": {}}}', "'q1' is there twice"),
    ],
)
def test_a_malformed_baseline_is_one_sentence_naming_the_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(BaselineError) as e:
        load_baseline(path)
    assert str(e.value).startswith(f"{path}: ")
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_bytes_that_are_not_utf8_are_a_malformed_baseline(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b'{"suite": "\xff\xfe"}')
    with pytest.raises(BaselineError, match="not a baseline"):
        load_baseline(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("llm-serving", "llm-serving"),
        ("org/name", "org-name"),
        ("../../x", "x"),
        ("..", "suite"),
        ("质" * 5000, "质" * 66),  # a file's name has room for 255 bytes
    ],
)
def test_a_suite_name_never_leaves_the_baseline_folder(tmp_path: Path, suite: str, name: str) -> None:
    assert baseline_path(tmp_path, suite) == tmp_path / f"{name}.json"


def test_the_commit_is_read_from_git_and_absent_outside_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit(tmp_path) is None, "a repository without a commit has none to name"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x", "--no-gpg-sign"], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None
    assert len(commit) == 40


def test_a_diff_of_baselines_has_means_items_and_fields() -> None:
    old = baseline_of(plain_run({"a": [1.0, 0.5, 0.5], "b": [1.0, 1.0, 1.0]}), commit=None, date=DATE)
    run = plain_run({"a": [0.25, 0.5, 1.0], "c": [1.0, 1.0, 1.0]}, fingerprint={"judge": "other"})
    diff = diff_baselines(old, baseline_of(run, commit=None, date=DATE))
    a, b, c = diff.metrics
    assert (a.metric, a.old_mean, a.new_mean) == ("a", pytest.approx(2 / 3), pytest.approx(1.75 / 3))
    assert a.change == pytest.approx(-0.25 / 3)
    assert [(i.item, i.drop) for i in a.changed] == [("q000", 0.75), ("q002", -0.5)]
    assert (b.new_mean, b.change, c.old_mean, c.change) == (None, None, None, None)
    assert ("judge", old.fingerprint["judge"], "other") in [(f.field, f.old, f.new) for f in diff.fingerprint]
    assert not diff.testset_changed


def test_a_diff_names_items_that_came_and_went() -> None:
    old = baseline_of(good_run(12), commit=None, date=DATE)
    new = baseline_of(worse_run(14), commit=None, date=DATE)
    diff = diff_baselines(old, new)
    assert diff.testset_changed
    assert (diff.added, diff.removed) == (("serving-012", "serving-013"), ())


def test_a_baseline_keeps_the_cluster_of_each_item_one_a_line(tmp_path: Path) -> None:
    run = plain_run({"m": [1.0, 0.5, 0.0]})
    items = tuple(
        item.model_copy(update={"cluster": name})
        for item, name in zip(run.items, ("a.md", None, "b.md"), strict=True)
    )
    kept = baseline_of(run.model_copy(update={"items": items}), commit=None, date=DATE)
    save_baseline(kept, tmp_path / "b.json")
    assert load_baseline(tmp_path / "b.json").clusters == {"q000": "a.md", "q002": "b.md"}
    assert '  "q000": "a.md",\n  "q002": "b.md"\n' in (tmp_path / "b.json").read_text()
    moved = kept.model_copy(update={"clusters": {"q000": "a.md", "q002": "a.md"}})
    assert diff_baselines(kept, moved).moved == ("q002",)
    assert diff_baselines(kept.model_copy(update={"clusters": None}), kept).moved == ()


def test_a_baseline_of_version_2_is_still_read_and_knows_no_clusters(tmp_path: Path) -> None:
    fields = baseline_of(good_run(12), commit=None, date=DATE).model_dump(mode="json")
    del fields["clusters"]
    (tmp_path / "b.json").write_text(json.dumps(fields | {"version": 2}))
    old = load_baseline(tmp_path / "b.json")
    assert (old.version, old.clusters, old.critical) == (2, None, ("serving-004",))


def test_a_baseline_of_version_1_is_still_read_and_kept_as_version_3(tmp_path: Path) -> None:
    fields = baseline_of(plain_run({"m": [1.0, 0.5]}), commit=None, date=DATE).model_dump(mode="json")
    for name in ("reserve_hash", "reserve", "critical", "reason", "clusters"):
        del fields[name]
    (tmp_path / "b.json").write_text(json.dumps(fields | {"version": 1}))
    old = load_baseline(tmp_path / "b.json")
    assert (old.values("m"), old.reserve_hash, old.critical) == ({"q000": 1.0, "q001": 0.5}, None, ())
    save_baseline(old, tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["version"] == 3


def test_the_committed_baseline_of_the_quickstart_is_read() -> None:
    old = load_baseline(Path(__file__).parents[2] / "baselines/quickstart.json")
    assert (len(old.items), old.suite, old.judge) == (12, "quickstart", "qwen-0.5b-judge")


def test_a_baseline_holds_what_is_critical_what_is_reserve_and_why_it_was_accepted() -> None:
    run = plain_run({"m": [1.0, 0.5, 0.0]}, reserve_hash="r" * 64)
    marks: tuple[dict[str, object], ...] = ({"critical": True}, {}, {"reserve": True})
    items = tuple(item.model_copy(update=mark) for item, mark in zip(run.items, marks, strict=True))
    kept = baseline_of(run.model_copy(update={"items": items}), commit=None, date=DATE, reason="k = 5")
    assert (kept.critical, kept.reserve, kept.reserve_hash) == (("q000",), ("q002",), "r" * 64)
    assert kept.reason == "k = 5"


def test_the_age_of_a_baseline_is_told_in_days_and_commits(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    commit = [*git, "commit", "-q", "--allow-empty", "-m", "x", "--no-gpg-sign"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run(commit, check=True)
    baseline = baseline_of(plain_run({"m": [1.0]}), commit=git_commit(tmp_path), date=DATE)
    short = (baseline.commit or "")[:10]
    assert age_of(baseline, DATE, tmp_path) == f"made today; commit {short}, 0 commits ago"
    for _ in range(3):
        subprocess.run(commit, check=True)
    assert (
        age_of(baseline, DATE + timedelta(days=12), tmp_path) == f"12 days old; commit {short}, 3 commits ago"
    )
    old = age_of(baseline, DATE + timedelta(days=91), tmp_path)
    assert old.startswith(f"91 days old; commit {short}, 3 commits ago; old: make it anew")
    gone = baseline.model_copy(update={"commit": "--version"})
    assert age_of(gone, DATE + timedelta(days=1), tmp_path) == "1 day old; commit --version"


def test_equal_baselines_have_an_empty_diff() -> None:
    baseline = baseline_of(errored_run(12), commit=None, date=DATE)
    diff = diff_baselines(baseline, baseline)
    assert all(m.change == 0.0 and not m.changed for m in diff.metrics)
    assert (diff.fingerprint, diff.added, diff.removed, diff.testset_changed) == ((), (), (), False)
