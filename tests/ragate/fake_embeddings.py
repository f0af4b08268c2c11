"""Embeddings without a model: 16 numbers that depend on the text alone, of both signs."""

from __future__ import annotations

from typing import Any

from fake_engine import Chance
from ragas.embeddings.base import BaseRagasEmbedding


class FakeEmbeddings(BaseRagasEmbedding):  # type: ignore[misc]
    """Stands in for `ragate.embeddings.MiniLM`."""

    sha256 = "fake"

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def embed_text(self, text: str, **kwargs: Any) -> list[float]:
        """A vector that is mostly common to all texts, so that cosines look like those of sentences."""
        chance = Chance(text)
        return [0.4 + chance.below(1000) / 1000 - 0.5 for _ in range(16)]

    async def aembed_text(self, text: str, **kwargs: Any) -> list[float]:
        """As `embed_text`."""
        self.seconds += 0.001
        return self.embed_text(text)
