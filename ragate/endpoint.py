"""The URL of a judge taken apart: its root, the model, who asks; what it is called holds no secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ragate.errors import ConfigError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "RAGATE_JUDGE_KEY"
"""Environment variable with the API key of a judge by URL."""


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible API is."""

    name: str
    """The API's root without user, password, query and fragment: what files and messages call it."""
    root: httpx.URL = field(repr=False)
    """The root with its query, which may hold a secret."""
    model: str | None
    """The URL's fragment."""
    auth: tuple[str, str] | None = field(repr=False)
    """User and password, for basic authentication."""

    def at(self, path: str) -> httpx.URL:
        """The URL of `path` below the root."""
        return self.root.copy_with(path=self.root.path.rstrip("/") + path)


def is_url(spec: str) -> bool:
    """True when a judge or target is named by URL."""
    return spec.startswith(("http://", "https://"))


def endpoint_of(spec: str) -> Endpoint:
    """Take a URL such as `https://user:password@host/v1#model` apart. Raises ConfigError, without the URL."""
    import httpx

    try:
        url = httpx.URL(spec)
    except httpx.InvalidURL:  # its text may quote a part of the password
        url = httpx.URL("")
    if not url.host:
        raise ConfigError(
            "judge: not a URL: write it as http://host:8000/v1#model, special characters of a user or password as %XX"
        )
    root = url.copy_with(
        username=None,
        password=None,
        fragment=None,
        path=url.path.rstrip("/").removesuffix("/chat/completions"),
    )
    return Endpoint(
        name=str(root.copy_with(query=None)).rstrip("/"),
        root=root,
        model=url.fragment or None,
        auth=(url.username, url.password) if url.userinfo else None,
    )


def shown(spec: str) -> str:
    """What may be shown of the spec of a judge or target: all of it, or a URL without its secrets."""
    if not is_url(spec):
        return spec
    try:
        return endpoint_of(spec).name
    except ConfigError:
        return "not a URL"
