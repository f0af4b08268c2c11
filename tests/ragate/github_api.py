"""A server that speaks the part of GitHub's REST API that ragate uses: comments and pull requests of one repository."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

REPOSITORY = "octo/rag"
TOKEN = "ghs_a-secret-token"
LONGEST = 65_536


@dataclass
class Refusal:
    """What the next matching request is answered instead; `also` does the work all the same."""

    status: int
    message: str = "no"
    headers: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    also: bool = False


@dataclass
class FakeGitHub:
    """The state of the repository, and every request that came."""

    url: str = ""
    comments: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    read_only: bool = False
    page: int = 100
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    login: dict[str, Any] = field(default_factory=lambda: {"login": "github-actions[bot]", "type": "Bot"})
    last: int = 100

    def add_comment(
        self, number: int, body: str, user: dict[str, Any] | None = None, role: str = "NONE"
    ) -> int:
        """A comment of `user`, by default of the bot; returns its id."""
        self.last += 1
        comment = {"id": self.last, "body": body, "user": user or self.login, "author_association": role}
        self.comments.setdefault(number, []).append(comment)
        return self.last

    def bodies(self, number: int) -> list[str]:
        return [comment["body"] for comment in self.comments.get(number, [])]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON, headers) of a request."""
        self.requests.append(f"{method} {path}")
        refusal = next((r for r in self.refusals if r.method in (None, method)), None)
        if refusal is not None:
            self.refusals.remove(refusal)
            if refusal.also:
                self._do(method, path, body)
            return refusal.status, {"message": refusal.message}, refusal.headers
        return self._do(method, path, body)

    def _do(self, method: str, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        url = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        root, *parts = url.path.removeprefix(f"/repos/{REPOSITORY}/").split("/")
        if not url.path.startswith(f"/repos/{REPOSITORY}/"):
            return 404, {"message": "Not Found"}, {}
        if method == "GET" and root == "pulls":
            head, state = query.get("head"), query.get("state", "open")
            found = [p for p in self.pulls if p["head"]["label"] == head and p["state"] == state]
            return self._paged(url.path, query, found)
        if method == "GET" and root == "issues" and parts[1:] == ["comments"]:
            return self._paged(url.path, query, self.comments.get(int(parts[0]), []))
        if self.read_only:
            return (
                403,
                {"message": "Resource not accessible by integration"},
                {"x-ratelimit-remaining": "4999"},
            )
        if len(body["body"]) > LONGEST:
            error = {"resource": "IssueComment", "field": "data", "message": "Body is too long"}
            return 422, {"message": "Validation Failed", "errors": [error]}, {}
        if method == "POST":
            return 201, {"id": self.add_comment(int(parts[0]), body["body"])}, {}
        every = [comment for comments in self.comments.values() for comment in comments]
        comment = next((c for c in every if c["id"] == int(parts[1])), None)
        if comment is None:
            return 404, {"message": "Not Found"}, {}
        comment["body"] = body["body"]
        return 200, comment, {}

    def _paged(self, path: str, query: dict[str, str], rows: list[Any]) -> tuple[int, Any, dict[str, str]]:
        size, page = min(self.page, int(query.get("per_page", "30"))), int(query.get("page", "1"))
        more = len(rows) > size * page
        headers = {"Link": f'<{self.url}{path}?page={page + 1}>; rel="next"'} if more else {}
        return 200, rows[size * (page - 1) : size * page], headers


@contextmanager
def serving() -> Iterator[FakeGitHub]:
    """A server on this machine until the end of the block."""
    github = FakeGitHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            github.tokens.add(self.headers.get("Authorization", ""))
            status, answer, headers = github.answer(self.command, self.path, json.loads(data or b"null"))
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = handle_any

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    github.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield github
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
