"""A judge that answers at once and without a model, and a file of answers that people labelled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Ragate
from fake_engine import FakeEngine

from ragate import session


@pytest.fixture
def engines(ragate: Ragate, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """The engines that were opened, one for each time that `judge.gguf` was loaded."""
    made: list[FakeEngine] = []

    def open_engine(path: Path, progress: object, adapter: Path | None) -> FakeEngine:
        made.append(FakeEngine())
        return made[-1]

    monkeypatch.setattr(session, "open_engine", open_engine)
    Path("judge.gguf").touch()
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def labelled(ragate: Ragate) -> Callable[..., str]:
    """Writes labelled rows and returns the file's name."""

    def write(count: int = 12, path: str = "labelled.jsonl", **changes: Any) -> str:
        rows = [
            {
                "id": f"item-{i}",
                "source_id": i // 2,
                "question": f"What is {i}?",
                "contexts": [f"{i} is the first.", f"{i} is also a number."],
                "answer": f"{i} is the first. It is number {i}, <script>alert({i})</script> they say.",
                "faithful": (i + i // 2) % 2,
                "context_relevant": [i % 2, 1 - i % 2],
                "generator": f"model {i % 2}",
            }
            | changes
            for i in range(count)
        ]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
