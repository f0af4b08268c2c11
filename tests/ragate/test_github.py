"""The pull request's comment against a server that speaks GitHub's API: one comment, and no run that fails for it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from github_api import REPOSITORY, TOKEN, FakeGitHub, Refusal, serving
from runs import HOSTILE, good_run, hostile_run, worse_run

from ragate import github as module
from ragate.cli import run as ragate
from ragate.config import Settings
from ragate.gate.baseline import Baseline, baseline_of, save_baseline
from ragate.gate.verdict import decide
from ragate.github import (
    GitHub,
    GitHubError,
    ReadOnlyError,
    load_verdict,
    post_artifact,
    post_run,
    read_artifact,
)
from ragate.report.markdown import comment_marker
from ragate.run import Run, save_run
from ragate.suite import verdict_of, write_reports

DATE = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
COMMIT = "ab12" * 10
MARKER = comment_marker("llm-serving")
FORK = {"full_name": "mallory/rag", "owner": {"login": "mallory"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGitHub]:
    with serving() as github:
        yield github


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waited: list[float] = []
    made = GitHub.__init__

    def patched(self: GitHub, *arguments: Any) -> None:
        made(self, *arguments, sleep=waited.append)

    monkeypatch.setattr(GitHub, "__init__", patched)
    return waited


@pytest.fixture
def job(server: FakeGitHub, tmp_path: Path) -> dict[str, str]:
    """The environment of a job for pull request 7."""
    return job_of(server, tmp_path, {"pull_request": {"number": 7, "head": {"sha": COMMIT}}})


def job_of(server: FakeGitHub, folder: Path, event: Mapping[str, Any]) -> dict[str, str]:
    (folder / "event.json").write_text(json.dumps(event))
    return {
        "GITHUB_ACTIONS": "true",
        "GITHUB_API_URL": server.url,
        "GITHUB_SERVER_URL": "https://github.example",
        "GITHUB_REPOSITORY": REPOSITORY,
        "GITHUB_RUN_ID": "42",
        "GITHUB_SHA": "0" * 40,
        "GITHUB_EVENT_PATH": str(folder / "event.json"),
        "GITHUB_TOKEN": TOKEN,
    }


def baseline(run: Run) -> Baseline:
    return baseline_of(run, commit="3f2a91c7" * 5, date=DATE)


def post(job: Mapping[str, str], run: Run) -> str:
    base = baseline(good_run())
    return post_run(job, run, decide(base, run), base, None)


# One comment


def test_ten_runs_leave_one_comment_which_says_what_the_last_one_found(
    server: FakeGitHub, job: dict[str, str]
) -> None:
    said = [post(job, worse_run() if i % 2 else good_run()) for i in range(10)]
    assert said == ["comment created on pull request 7"] + ["comment updated on pull request 7"] * 9
    (body,) = server.bodies(7)
    assert "**❌ FAIL** llm-serving" in body
    assert "[Full report](https://github.example/octo/rag/actions/runs/42)" in body
    assert "of commit ab12ab12ab" in body


def test_the_same_text_is_not_written_again(server: FakeGitHub, job: dict[str, str]) -> None:
    post(job, good_run())
    server.comments[7][0]["body"] = server.comments[7][0]["body"].replace("\n", "\r\n").rstrip()
    server.requests.clear()
    assert post(job, good_run()) == "comment unchanged on pull request 7"
    assert [request.split(" ")[0] for request in server.requests] == ["GET"]


def test_the_comment_is_found_on_the_last_of_several_pages(server: FakeGitHub, job: dict[str, str]) -> None:
    for i in range(250):
        server.add_comment(7, f"I talk about {MARKER} number {i}")
    server.add_comment(7, f"{MARKER}\nan older verdict")
    assert post(job, good_run()) == "comment updated on pull request 7"
    assert len(server.bodies(7)) == 251
    assert "PASS" in server.bodies(7)[-1]
    assert [r for r in server.requests if r.startswith("GET")][-1].endswith("page=3")


def test_suites_have_a_comment_each_and_other_pull_requests_none(
    server: FakeGitHub, job: dict[str, str]
) -> None:
    post(job, good_run())
    post(job, good_run(suite="other"))
    post(job, worse_run())
    assert [body.split("\n")[0] for body in server.bodies(7)] == [MARKER, comment_marker("other")]
    assert set(server.comments) == {7}


@pytest.mark.parametrize(("role", "taken"), [("NONE", False), ("CONTRIBUTOR", False), ("MEMBER", True)])
def test_a_strangers_comment_with_our_marker_is_not_made_ours(
    server: FakeGitHub, job: dict[str, str], role: str, taken: bool
) -> None:
    server.add_comment(7, f"{MARKER}\nPASS, honestly", {"login": "mallory", "type": "User"}, role)
    assert post(job, worse_run()) == f"comment {'updated' if taken else 'created'} on pull request 7"
    assert ("PASS, honestly" in server.bodies(7)[0]) is not taken


def test_a_comment_that_is_deleted_meanwhile_is_written_anew(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    server.add_comment(7, f"{MARKER}\nold")
    server.refusals.append(Refusal(404, method="PATCH"))
    assert post(job, good_run()) == "comment created on pull request 7"


# What GitHub refuses


def test_a_token_that_may_only_read_fails_nothing(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    server.read_only = True
    said = post(job, worse_run())
    assert said.startswith(
        "not commented: GitHub answered 403 to POST /issues/7/comments: Resource not accessible by integration; "
        "the token may not do this: it takes `permissions: pull-requests: write`"
    )
    assert waits == []
    assert len(server.requests) == 2


def test_a_limit_is_waited_for_as_long_as_github_says(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    reset = str(int(time.time()) + 30)
    server.refusals += [
        Refusal(429, "slow down", {"Retry-After": "7"}),
        Refusal(403, "API rate limit exceeded", {"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}),
        Refusal(403, "You have exceeded a secondary rate limit"),
    ]
    assert post(job, good_run()) == "comment created on pull request 7"
    assert waits[0] == 7
    assert 25 < waits[1] <= 30
    assert waits[2] == 60


def test_a_limit_that_lasts_is_given_up_and_said(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    server.refusals.append(Refusal(429, "slow down", {"Retry-After": "3600"}))
    said = post(job, good_run())
    assert (
        said
        == "not commented: GitHub answered 429 to GET /issues/7/comments: slow down; gave up after 1 attempts"
    )
    assert waits == []


def test_a_server_error_is_tried_again(server: FakeGitHub, job: dict[str, str], waits: list[float]) -> None:
    server.refusals += [Refusal(502), Refusal(503), Refusal(500)]
    assert post(job, good_run()) == "comment created on pull request 7"
    assert waits == [1, 2, 4]


def test_a_comment_that_was_written_though_the_answer_was_502_is_not_written_twice(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    server.refusals.append(Refusal(502, method="POST", also=True))
    assert post(job, good_run()) == "comment unchanged on pull request 7"
    assert len(server.bodies(7)) == 1


def test_a_server_that_stays_broken_or_away_fails_nothing(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    server.refusals += [Refusal(500, "oops")] * 9
    assert "oops; gave up after 5 attempts" in post(job, good_run())
    assert waits == [1, 2, 4, 8]
    assert "GitHub cannot be reached: ConnectError" in post(
        job | {"GITHUB_API_URL": "http://127.0.0.1:9"}, good_run()
    )


def test_what_is_invalid_to_github_is_said_in_its_own_words(
    server: FakeGitHub, job: dict[str, str], waits: list[float]
) -> None:
    server.refusals.append(Refusal(422, "Validation Failed\n::error::x", method="POST"))
    said = post(job, good_run())
    assert (
        said == "not commented: GitHub answered 422 to POST /issues/7/comments: Validation Failed ::error::x"
    )
    assert waits == []


def test_a_hostile_run_of_a_megabyte_is_within_what_github_takes(
    server: FakeGitHub, job: dict[str, str]
) -> None:
    run = hostile_run()
    long = HOSTILE * 5000
    items = tuple(item.model_copy(update={"question": long, "answer": long}) for item in run.items)
    assert post(job, run.model_copy(update={"items": items})).startswith("comment created")
    assert "@octocat" not in server.bodies(7)[0]


# The token


def test_the_token_goes_into_the_header_and_nowhere_else(
    server: FakeGitHub, job: dict[str, str], waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusals += [Refusal(502), Refusal(401, "Bad credentials")]
    said = post(job, good_run()) + "".join(capsys.readouterr())
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in said + "".join(server.requests)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "bell\x07"])
def test_what_is_no_token_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(GitHubError) as caught:
        GitHub(REPOSITORY, token)
    assert "two" not in str(caught.value) and "bell" not in str(caught.value)


def test_the_token_is_not_sent_in_the_clear() -> None:
    with pytest.raises(GitHubError, match=r"must be an https address, got 'http://github.example/api'"):
        GitHub(REPOSITORY, TOKEN, "http://github.example/api")
    with pytest.raises(GitHubError, match="must be OWNER/NAME"):
        GitHub("octo/rag/../../user", TOKEN)


def test_a_job_without_token_or_pull_request_says_so(
    server: FakeGitHub, job: dict[str, str], tmp_path: Path
) -> None:
    assert post(job | {"GITHUB_TOKEN": ""}, good_run()).startswith(
        "not commented: GITHUB_TOKEN not set: give the step"
    )
    push = job_of(server, tmp_path, {"ref": "refs/heads/main"})
    assert post(push, good_run()) == "not commented: this job is for no pull request"
    Path(job["GITHUB_EVENT_PATH"]).write_text("{")
    assert "names no event that can be read" in post(job, good_run())
    assert server.requests == []


# Forks: the poster


def fork_job(server: FakeGitHub, folder: Path, **changes: Any) -> dict[str, str]:
    run = {"id": 41, "head_sha": COMMIT, "head_branch": "better prompts&x=1", "head_repository": FORK}
    return job_of(server, folder, {"workflow_run": {**run, "pull_requests": [], **changes}})


def pull(
    number: int, sha: str = COMMIT, state: str = "open", repository: str = "mallory/rag"
) -> dict[str, Any]:
    head = {"label": "mallory:better prompts&x=1", "sha": sha, "repo": {"full_name": repository}}
    return {"number": number, "state": state, "head": head}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """What a failing run leaves."""
    folder = tmp_path / "artifact"
    base, run = baseline(good_run()), worse_run()
    save_run(run, folder / "run.json")
    write_reports(folder, run, verdict_of(Settings(), base, run), base, None)
    return folder


def post_fork(job: Mapping[str, str], folder: Path, trusted: Baseline | None = None) -> str:
    return post_artifact(job, folder, decide, lambda run: trusted or baseline(good_run()))


def test_the_poster_comments_on_the_pull_request_that_the_api_names(
    server: FakeGitHub, tmp_path: Path, artifact: Path
) -> None:
    server.pulls = [pull(3, sha="0" * 40), pull(4, state="closed"), pull(5, repository="x/y"), pull(9)]
    (artifact / "pr-number").write_text("1")
    job = fork_job(server, tmp_path)
    assert post_fork(job, artifact) == "comment created on pull request 9"
    assert post_fork(job, artifact) == "comment unchanged on pull request 9"
    (body,) = server.bodies(9)
    assert "**❌ FAIL** llm-serving: faithfulness fell 11.3 pt" in body
    assert "its scores are what that run says" in body
    assert "the pull request's own" in body
    assert "actions/runs/41" in body
    assert "is the pull request's own and not the one of this branch" not in body
    assert (
        server.requests[0]
        == "GET /repos/octo/rag/pulls?state=open&head=mallory%3Abetter+prompts%26x%3D1&per_page=100&page=1"
    )


def test_the_poster_makes_verdict_and_text_itself_and_posts_none_of_the_artefacts(
    server: FakeGitHub, tmp_path: Path, artifact: Path
) -> None:
    server.pulls = [pull(9)]
    for name in ("comment.md", "verdict.json", "report.html"):
        (artifact / name).write_text("PASS @everyone [win](https://evil.example)")
    post_fork(fork_job(server, tmp_path), artifact)
    assert "❌ FAIL" in server.bodies(9)[0]
    assert "evil" not in server.bodies(9)[0]


def test_the_poster_says_where_the_pull_request_has_a_baseline_of_its_own(
    server: FakeGitHub, tmp_path: Path, artifact: Path
) -> None:
    server.pulls = [pull(9)]
    save_baseline(baseline(worse_run()), artifact / "baseline.json")
    post_fork(fork_job(server, tmp_path), artifact)
    assert "✅ PASS" in server.bodies(9)[0]
    assert "the baseline is the pull request's own and not the one of this branch" in server.bodies(9)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_sha": "1" * 40}, "no open pull request is at commit 1111111111"),
        ({"head_repository": None}, "tells of no workflow run of a pull request whose fork is still there"),
        ({"head_branch": None}, "tells of no workflow run of a pull request"),
    ],
)
def test_the_poster_comments_nowhere_where_no_pull_request_fits(
    server: FakeGitHub, tmp_path: Path, artifact: Path, changes: dict[str, Any], said: str
) -> None:
    server.pulls = [pull(9)]
    assert said in post_fork(fork_job(server, tmp_path, **changes), artifact)
    assert server.comments == {}


def test_the_poster_fails_where_it_may_not_comment(
    server: FakeGitHub, tmp_path: Path, artifact: Path
) -> None:
    server.pulls, server.read_only = [pull(9)], True
    with pytest.raises(ReadOnlyError, match="pull-requests: write"):
        post_fork(fork_job(server, tmp_path), artifact)


def hostile_files(folder: Path) -> dict[str, Any]:
    run = json.loads((folder / "run.json").read_text())
    return {
        "not JSON": "{" * 100_000,
        "nested": "[" * 100_000,
        "another field": {**run, "command": "rm"},
        "another metric": {**run, "metrics": ["@everyone"], "scores": []},
        "a metric twice": {**run, "metrics": ["faithfulness"] * 2},
        "a huge score": {**run, "scores": [{**run["scores"][0], "value": 1e308}]},
        "no number": json.dumps({**run, "scores": [{**run["scores"][0], "value": 7}]}).replace(
            '"value": 7', '"value": NaN'
        ),
        "no item": {**run, "items": None},
    }


@pytest.mark.parametrize(
    "name",
    [
        "not JSON",
        "nested",
        "another field",
        "another metric",
        "a metric twice",
        "a huge score",
        "no number",
        "no item",
    ],
)
def test_an_artefact_that_is_no_run_is_refused_in_one_sentence(
    server: FakeGitHub, tmp_path: Path, artifact: Path, name: str
) -> None:
    made = hostile_files(artifact)[name]
    (artifact / "run.json").write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(Exception) as caught:
        read_artifact(artifact)
    assert type(caught.value).__name__ == "RunError"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(artifact))


def test_links_and_giants_in_an_artefact_are_not_read(
    artifact: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (artifact / "run.json").rename(tmp_path / "secret.json")
    (artifact / "run.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(Exception, match="the artefact holds no such file"):
        read_artifact(artifact)
    (artifact / "run.json").unlink()
    (tmp_path / "secret.json").rename(artifact / "run.json")
    monkeypatch.setattr(module, "MAX_RUN_BYTES", 1000)
    with pytest.raises(Exception, match="bytes; at most 1,000"):
        read_artifact(artifact)


def test_a_fork_that_leaves_its_baseline_out_is_held_against_the_one_of_this_branch(
    server: FakeGitHub, tmp_path: Path, artifact: Path
) -> None:
    server.pulls = [pull(9)]
    (artifact / "baseline.json").unlink()
    post_fork(fork_job(server, tmp_path), artifact)
    (body,) = server.bodies(9)
    assert "❌ FAIL" in body and "left no baseline" in body


def test_a_hostile_fork_can_mention_and_link_nothing(
    server: FakeGitHub, tmp_path: Path, artifact: Path
) -> None:
    server.pulls = [pull(9)]
    run = hostile_run().model_copy(update={"fingerprint": {HOSTILE + str(i): HOSTILE for i in range(500)}})
    text = json.dumps(run.model_dump()).replace("\\ud800", "")  # which no JSON of ours can hold
    (artifact / "run.json").write_text(text)
    post_fork(fork_job(server, tmp_path), artifact)
    (body,) = server.bodies(9)
    assert len(body) <= 65_536
    assert "@octocat" not in body and "evil.example" in body and "://evil.example" not in body
    assert "<script" not in body and "<img" not in body


# The command


def test_ragate_comment_posts_the_verdict_that_eval_left(
    server: FakeGitHub, job: dict[str, str], artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(artifact.parent)
    for expected in ("created", "unchanged"):
        assert ragate(["comment", "artifact", "--report-url", "https://github.example/artifact/1"]) == 0
        assert capsys.readouterr().out == f"comment {expected} on pull request 7\n"
    assert "[Full report](https://github.example/artifact/1)" in server.bodies(7)[0]
    server.read_only = True
    assert ragate(["comment", "artifact"]) == 0
    assert "not commented: GitHub answered 403" in capsys.readouterr().out
    assert ragate(["comment", "artifact", "--artifact", "artifact"]) == 4


def test_ragate_comment_without_a_baseline_says_that_there_is_none(
    server: FakeGitHub, job: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path, good_run(), None, None, None)
    assert load_verdict(tmp_path, good_run()) == (None, None)
    assert post_run(job, good_run(), None, None, None) == "comment created on pull request 7"
    assert "NO BASELINE" in server.bodies(7)[0]


def test_a_verdict_is_of_the_run_file_beside_it_and_of_no_other(
    server: FakeGitHub, job: dict[str, str], artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(artifact.parent)
    told = json.loads((artifact / "verdict.json").read_text())["run_digest"]
    assert told == hashlib.sha256((artifact / "run.json").read_bytes()).hexdigest()
    save_run(good_run(), artifact / "run.json")
    assert ragate(["comment", "artifact"]) == 4
    assert capsys.readouterr().err == (
        f"error: {Path('artifact/verdict.json')}: a verdict on another run than the one beside it; "
        "`ragate report` makes it anew\n"
    )
    assert not server.bodies(7)
    assert ragate(["report", "artifact", "--baseline", "artifact/baseline.json"]) == 0
    assert ragate(["comment", "artifact"]) == 0
    assert "✅ PASS" in server.bodies(7)[0]


def test_ragate_comment_for_a_fork_holds_the_scores_against_the_settings_of_this_checkout(
    server: FakeGitHub, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    server.pulls = [pull(9)]
    for name, value in fork_job(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    Path("ragate.toml").write_text('testset = "x.jsonl"\nthreshold = 0.5\n')
    assert ragate(["comment", "--artifact", "artifact"]) == 0
    assert capsys.readouterr().out == "comment created on pull request 9\n"
    assert "✅ PASS" in server.bodies(9)[0]
    assert "not the one of this branch" in server.bodies(9)[0]
