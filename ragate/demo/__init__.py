"""The demo: a small, real RAG pipeline over Markdown documents, for this repository's own gate.

Chunks of words, BM25, and a model that ragate serves as the writer. Everything that a pull request might change for
the worse is a setting: chunk size, number of contexts, prompt, model.
"""

from ragate.demo.pipeline import Pipeline as pipeline

__all__ = ["pipeline"]
