"""GitHub: a pull request's one comment, found again by its marker; the summary and outputs of a step of Actions.

The token comes from the environment (GITHUB_TOKEN) and goes into the Authorization header, nowhere else. Waits and
repeats where GitHub asks for it; what a repeat could do twice is looked for first.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import ValidationError

from ragate.errors import EXIT_INVALID, RagateError, RunError
from ragate.gate.baseline import Baseline, load_baseline
from ragate.gate.verdict import GateResult, shorten
from ragate.metrics import METRICS
from ragate.report.markdown import LONGEST_SUMMARY, comment_marker, render_comment
from ragate.report.untrusted import plain
from ragate.run import Run, load_run, run_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

API = "https://api.github.com"
ATTEMPTS = 5
LONGEST_WAIT = 180.0
"""Seconds that all waits together may take."""
UNTOLD_WAIT = 60.0
"""Seconds to wait at a rate limit that does not say how long."""
WRITERS = ("OWNER", "MEMBER", "COLLABORATOR")
"""Whose comment may be taken for ours, besides a bot's: anybody else could write the marker and edit it later."""
MAX_RUN_BYTES, MAX_BASELINE_BYTES = 64 << 20, 16 << 20
"""Of files in an artefact."""


class GitHubError(RagateError):
    """GitHub refused or could not be reached; says what to do."""


class ReadOnlyError(GitHubError):
    """The token may not write here, as in every run of a fork's pull request."""


class _TryAgainError(Exception):
    """GitHub asks to come back, after `wait` seconds where it says so."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class GitHub:
    """The used part of GitHub's REST API for one repository.

    Raises GitHubError where `api` would carry the token in the clear, or where the token cannot be one.
    """

    def __init__(
        self, repository: str, token: str, api: str = API, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        try:
            url = httpx.URL(api)
        except httpx.InvalidURL:
            raise GitHubError(f"GITHUB_API_URL is no address: {plain(api)!r}") from None
        if url.scheme != "https" and url.host not in ("127.0.0.1", "localhost", "::1"):
            raise GitHubError(f"GITHUB_API_URL must be an https address, got {plain(api)!r}")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise GitHubError(f"GITHUB_REPOSITORY must be OWNER/NAME, got {plain(repository)[:100]!r}")
        if not re.fullmatch(r"[!-~]+", token):  # httpx would quote a header that it refuses
            raise GitHubError(
                "GITHUB_TOKEN is not a token: it is empty or holds spaces or control characters"
            )
        self._root = f"{api.rstrip('/')}/repos/{repository}"
        self._sleep = sleep
        self._client = httpx.Client(
            headers={
                "Authorization": f"Bearer {token}",
                "Accept": "application/vnd.github+json",
                "X-GitHub-Api-Version": "2022-11-28",
                "User-Agent": "ragate",
            },
            timeout=30.0,
            follow_redirects=True,  # a renamed repository; httpx drops the token for another host
        )

    def __enter__(self) -> GitHub:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def upsert_comment(self, number: int, body: str, marker: str) -> str:
        """Write `body`, which begins with `marker`, as the one comment of pull request `number` that does.

        Returns `created`, `updated` or `unchanged`. Raises ReadOnlyError, GitHubError.
        """
        return self._insist(lambda: self._upsert_once(number, body, marker))

    def pull_request_at(self, owner: str, branch: str, commit: str, repository: str) -> int | None:
        """Number of the open pull request whose head is `commit` on `branch` of the fork `repository` of `owner`.

        `None` where there is none, or none any more at this commit. Raises GitHubError.
        """

        def look() -> int | None:
            for pull in self._pages("/pulls", state="open", head=f"{owner}:{branch}"):
                head = _part(pull, "head")
                if head.get("sha") == commit and _part(head, "repo").get("full_name") == repository:
                    return _number(pull.get("number"))
            return None

        return self._insist(look)

    def _upsert_once(self, number: int, body: str, marker: str) -> str:
        ours = next((c for c in self._pages(f"/issues/{number}/comments") if _is_ours(c, marker)), None)
        if ours is None:
            self._send("POST", f"/issues/{number}/comments", json={"body": body})
            return "created"
        if _same_text(ours["body"], body):
            return "unchanged"
        answer = self._send(
            "PATCH", f"/issues/comments/{_number(ours.get('id'))}", json={"body": body}, gone=True
        )
        if answer is None:  # somebody deleted it meanwhile
            self._send("POST", f"/issues/{number}/comments", json={"body": body})
            return "created"
        return "updated"

    def _pages(self, path: str, **query: str) -> Sequence[dict[str, Any]]:
        """The objects of every page of a listing."""
        found: list[dict[str, Any]] = []
        page = 1
        while True:
            answer = self._send("GET", path, params={**query, "per_page": "100", "page": str(page)})
            assert answer is not None
            try:
                rows = answer.json()
            except ValueError:
                raise GitHubError(f"{path}: GitHub's answer is not JSON") from None
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise GitHubError(f"{path}: GitHub's answer is no list of objects")
            found += rows
            if not rows or "next" not in answer.links:
                return found
            page += 1

    def _send(self, method: str, path: str, *, gone: bool = False, **options: Any) -> httpx.Response | None:
        """The answer to one request; `None` for 404 where `gone` says that this may be."""
        try:
            answer = self._client.request(method, self._root + path, **options)
        except httpx.RequestError as e:
            raise _TryAgainError(f"GitHub cannot be reached: {type(e).__name__}") from None
        code = answer.status_code
        if answer.is_success:
            return answer
        if gone and code == 404:
            return None
        said = f"GitHub answered {code} to {method} {path}: {_message(answer)}"
        if code >= 500:
            raise _TryAgainError(said)
        limited = "retry-after" in answer.headers or answer.headers.get("x-ratelimit-remaining") == "0"
        if code == 429 or (code == 403 and (limited or "rate limit" in _message(answer).lower())):
            raise _TryAgainError(said, _wait_of(answer))
        if code in (401, 403, 404):
            raise ReadOnlyError(
                f"{said}; the token may not do this: it takes `permissions: pull-requests: write`"
            )
        raise GitHubError(said)

    def _insist(self, action: Callable[[], T]) -> T:
        """What `action` gives, tried again from its beginning where GitHub asks for patience."""
        waited = 0.0
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except _TryAgainError as e:
                wait = 2.0 ** (attempt - 1) if e.wait is None else e.wait
                waited += wait
                if attempt == ATTEMPTS or waited > LONGEST_WAIT:
                    raise GitHubError(f"{e}; gave up after {attempt} attempts") from None
                self._sleep(wait)
        raise AssertionError("unreachable")


def _is_ours(comment: dict[str, Any], marker: str) -> bool:
    body = comment.get("body")
    if not isinstance(body, str) or not body.startswith(marker):
        return False
    return _part(comment, "user").get("type") == "Bot" or comment.get("author_association") in WRITERS


def _same_text(a: str, b: str) -> bool:
    """GitHub stores line ends as CRLF at times, and cuts the last one."""
    return a.replace("\r\n", "\n").strip() == b.strip()


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside an object; empty where there is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GitHubError(f"expected a number from GitHub, got {plain(repr(value))[:40]}")
    return value


def _message(answer: httpx.Response) -> str:
    """What GitHub said, in one short line."""
    try:
        said = answer.json()
    except ValueError:
        said = {}
    text = said.get("message") if isinstance(said, dict) else None
    errors = said.get("errors") if isinstance(said, dict) else None
    details = f" ({json.dumps(errors)})" if errors else ""
    return shorten(plain(f"{text or answer.reason_phrase}{details}"), 300)


def _wait_of(answer: httpx.Response) -> float:
    """Seconds until the limit ends: by Retry-After, else by the time at which it resets."""
    for header, since in (("retry-after", 0.0), ("x-ratelimit-reset", time.time())):
        try:
            wait = float(answer.headers.get(header, "")) - since
        except ValueError:
            continue
        if math.isfinite(wait):
            return max(0.0, wait)
    return UNTOLD_WAIT


# A job of GitHub Actions


def github_of(environment: Mapping[str, str]) -> GitHub:
    """The client of the repository that this job belongs to. Raises GitHubError naming what is missing."""
    missing = [name for name in ("GITHUB_REPOSITORY", "GITHUB_TOKEN") if not environment.get(name)]
    if missing:
        raise GitHubError(
            f"{' and '.join(missing)} not set: give the step `env: GITHUB_TOKEN: ${{{{ github.token }}}}`"
        )
    api = environment.get("GITHUB_API_URL") or API
    return GitHub(environment["GITHUB_REPOSITORY"], environment["GITHUB_TOKEN"].strip(), api)


def event_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """The event that started this job; empty outside Actions. Raises GitHubError: it cannot be read."""
    path = environment.get("GITHUB_EVENT_PATH")
    if not path:
        return {}
    try:
        event = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise GitHubError(f"{path}: GITHUB_EVENT_PATH names no event that can be read") from None
    return event if isinstance(event, dict) else {}


def judged_commit(environment: Mapping[str, str]) -> str | None:
    """The commit under judgement: a pull request's head, not the merge that Actions makes of it."""
    head = _part(_part(event_of(environment), "pull_request"), "head").get("sha")
    commit = head if isinstance(head, str) else environment.get("GITHUB_SHA", "")
    return commit if re.fullmatch("[0-9a-f]{7,64}", commit) else None


def run_page(environment: Mapping[str, str], run: object = None) -> str | None:
    """Address of the page of a workflow run, where its artefacts are; by default of this one."""
    server, repository = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    number = environment.get("GITHUB_RUN_ID") if run is None else str(run)
    return f"{server}/{repository}/actions/runs/{number}" if server and repository and number else None


def write_step_files(
    environment: Mapping[str, str],
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: Mapping[str, object] | None,
    folder: Path,
) -> None:
    """Add the summary and the outputs (verdict, exit-code, sentence, folder) of this step, where Actions has files for
    them. Raises RunError where they cannot be written."""
    summary = render_comment(
        run,
        gate,
        baseline,
        timings,
        report_url=run_page(environment),
        commit=judged_commit(environment),
        longest=LONGEST_SUMMARY,
    )
    outputs = {
        "verdict": gate.verdict if gate else "INVALID",
        "exit-code": str(gate.exit_code if gate else EXIT_INVALID),
        "sentence": plain(gate.sentence) if gate else "INVALID: no baseline to compare with",
        "folder": plain(folder.resolve().as_posix()),
    }
    texts = {
        "GITHUB_STEP_SUMMARY": summary,
        "GITHUB_OUTPUT": "".join(f"{name}={value}\n" for name, value in outputs.items()),
    }
    for variable, text in texts.items():
        path = environment.get(variable)
        if not path:
            continue
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(text)
        except OSError as e:
            raise RunError(f"{path}: {variable} cannot be written: {e.strerror}") from None


def post_run(
    environment: Mapping[str, str],
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: Mapping[str, object] | None,
    report_url: str | None = None,
) -> str:
    """Comment on the pull request that this job is for; returns what was done, also where nothing could be."""
    try:
        number = _part(event_of(environment), "pull_request").get("number")
        if number is None:
            return "not commented: this job is for no pull request"
        body = render_comment(
            run,
            gate,
            baseline,
            timings,
            report_url=report_url or run_page(environment),
            commit=judged_commit(environment),
        )
        with github_of(environment) as github:
            done = github.upsert_comment(_number(number), body, comment_marker(run.suite))
    except ReadOnlyError as e:
        return f"not commented: {e}; where this is a fork's run, the comment workflow does it"
    except GitHubError as e:
        return f"not commented: {e}"
    return f"comment {done} on pull request {number}"


def post_artifact(
    environment: Mapping[str, str],
    folder: Path,
    decided: Callable[[Baseline, Run], GateResult],
    trusted: Callable[[Run], Baseline | None],
) -> str:
    """Comment on a fork's pull request with the artefact that its run left in `folder`: nothing in it is trusted.

    The job is one of `workflow_run`, on the repository's own branch. Which pull request it is, the event and the API
    say; verdict and comment are made here, by `decided`, from the scores, after both files were checked; `trusted`
    gives the baseline of this checkout. Returns what was done. Raises GitHubError, RunError, BaselineError.
    """
    event = _part(event_of(environment), "workflow_run")
    head, commit, branch = _part(event, "head_repository"), event.get("head_sha"), event.get("head_branch")
    owner, repository = _part(head, "owner").get("login"), head.get("full_name")
    if not all(isinstance(part, str) and part for part in (commit, branch, owner, repository)):
        return (
            "not commented: this event tells of no workflow run of a pull request whose fork is still there"
        )
    run, baseline = read_artifact(folder)
    with github_of(environment) as github:
        number = github.pull_request_at(str(owner), str(branch), str(commit), str(repository))
        if number is None:
            return f"not commented: no open pull request is at commit {str(commit)[:10]} (closed, or pushed to since)"
        notes = [
            "made from the files that the pull request's own run left: its scores are what that run says"
        ]
        own = trusted(run)
        if baseline is None and own is not None:
            baseline = own
            notes.append("the pull request's run left no baseline: it is held against the one of this branch")
        elif baseline is not None and (own is None or not _same(own, baseline)):
            notes.append(
                "the baseline is the pull request's own and not the one of this branch: see what changed in it"
            )
        body = render_comment(
            run,
            decided(baseline, run) if baseline else None,
            baseline,
            report_url=run_page(environment, event.get("id")),
            commit=str(commit),
            notes=notes,
        )
        done = github.upsert_comment(number, body, comment_marker(run.suite))
    return f"comment {done} on pull request {number}"


def _same(one: Baseline, other: Baseline) -> bool:
    """Whether two baselines say the same; an older version says it in fewer fields."""
    return one == other.model_copy(update={"version": one.version})


def read_artifact(folder: Path) -> tuple[Run, Baseline | None]:
    """run.json and, where it is there, baseline.json of an untrusted artefact, checked for shape, size and range.

    Raises RunError or BaselineError naming what is wrong.
    """
    _refuse_odd_file(folder / "run.json", MAX_RUN_BYTES)
    run = load_run(folder / "run.json")
    odd = [metric for metric in run.metrics if metric not in METRICS]
    odd += [score.metric for score in run.scores if score.metric not in METRICS]
    if odd or len(set(run.metrics)) < len(run.metrics):
        raise RunError(
            f"{folder / 'run.json'}: metrics: {shorten(plain(' '.join(odd[:1])), 40)!r} is none of ours"
        )
    if any(score.value is not None and not 0 <= score.value <= 1 for score in run.scores):
        raise RunError(f"{folder / 'run.json'}: scores: a value lies outside [0, 1]")
    if not (folder / "baseline.json").exists():
        return run, None
    _refuse_odd_file(folder / "baseline.json", MAX_BASELINE_BYTES)
    return run, load_baseline(folder / "baseline.json")


def _refuse_odd_file(path: Path, most: int) -> None:
    if path.is_symlink() or not path.is_file():
        raise RunError(
            f"{path}: the artefact holds no such file; the run it is of ended before its scores were made"
        )
    if path.stat().st_size > most:
        raise RunError(f"{path}: {path.stat().st_size:,} bytes; at most {most:,}")


def load_verdict(folder: Path, run: Run) -> tuple[GateResult | None, Baseline | None]:
    """The verdict and the baseline that `ragate eval` left beside `run`; `None` where there was no baseline.

    Raises RunError or BaselineError where they cannot be read, or where the verdict is that on another run.
    """
    verdict = folder / "verdict.json"
    if not verdict.is_file():
        return None, None
    try:
        gate = GateResult.model_validate_json(verdict.read_bytes())
    except (OSError, ValidationError) as e:
        raise RunError(
            f"{verdict}: no verdict that can be read ({type(e).__name__}); run `ragate report`"
        ) from None
    if gate.run_digest != run_digest(run):
        raise RunError(
            f"{verdict}: a verdict on another run than the one beside it; `ragate report` makes it anew"
        )
    return gate, load_baseline(folder / "baseline.json")
