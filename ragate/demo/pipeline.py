"""`Pipeline`: question -> BM25 over chunks -> answer by a model that ragate serves."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from ragate.demo.chunks import read_documents, split
from ragate.errors import TargetError

PROMPT = (
    "Answer the question in one or two complete sentences, using only the passages. "
    "If the passages do not hold the answer, say that the documents do not say."
)


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, as BM25 sees them."""
    return re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", text.lower())


class Pipeline:
    """A RAG pipeline whose settings are what a pull request changes.

    Settings: `documents` (folder of .md files), `k` (contexts retrieved), `chunk_words`, `prompt` (instruction to
    the writer), `model` (a catalogue name or a path), `max_tokens` of an answer. Raises TargetError for bad ones.
    """

    concurrency = 64
    """Questions asked at once: the engine batches them."""

    def __init__(
        self,
        documents: str = "testsets/llm-serving/documents",
        k: int = 3,
        chunk_words: int = 150,
        prompt: str = PROMPT,
        model: str = "smollm2-135m",
        max_tokens: int = 96,
    ) -> None:
        if k < 1 or chunk_words < 10 or max_tokens < 1:
            raise TargetError("demo pipeline: k and max_tokens must be at least 1, chunk_words at least 10")
        from rank_bm25 import BM25Okapi

        self.k = k
        self.prompt = prompt
        self.model = model
        self.max_tokens = max_tokens
        self.chunks = [
            c for text in read_documents(Path(documents)).values() for c in split(text, chunk_words)
        ]
        self._index = BM25Okapi([words_of(chunk) for chunk in self.chunks])

    def retrieve(self, question: str) -> list[str]:
        """The `k` best chunks, best first; equal scores keep the documents' order."""
        scores = self._index.get_scores(words_of(question))
        best = sorted(range(len(self.chunks)), key=lambda i: (-scores[i], i))[: self.k]
        return [self.chunks[i] for i in best]

    def messages(self, question: str, contexts: list[str]) -> list[dict[str, str]]:
        """The conversation that the writer completes."""
        passages = "\n\n".join(f"[{i}] {context}" for i, context in enumerate(contexts, 1))
        return [
            {"role": "user", "content": f"{self.prompt}\n\nPassages:\n{passages}\n\nQuestion: {question}"}
        ]

    async def __call__(self, question: str) -> dict[str, Any]:
        """Answer one question: {"answer": str, "contexts": [str]}."""
        from ragate_engine import SamplingParams

        contexts = self.retrieve(question)
        engine = await asyncio.to_thread(self._engine)
        prompt = engine.chat_prompt(self.messages(question, contexts))
        future = engine.submit(prompt, SamplingParams(max_tokens=self.max_tokens))
        completion = await asyncio.wrap_future(future)
        return {"answer": completion.text.strip(), "contexts": contexts}

    def _engine(self) -> Any:
        from ragate.catalog import model_path
        from ragate.session import open_engine

        path = Path(self.model)
        return open_engine(path if path.exists() else model_path(self.model))
