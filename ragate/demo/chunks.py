"""Markdown documents -> chunks of at most so many words, cut between paragraphs where possible."""

from __future__ import annotations

import re
from pathlib import Path

from ragate.errors import TargetError


def read_documents(folder: Path) -> dict[str, str]:
    """File name -> text of every .md file in `folder`, in name order. Raises TargetError where there are none."""
    documents = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    if not documents:
        raise TargetError(f"{folder}: no .md documents to answer from; set the target option `documents`")
    return documents


def split(text: str, chunk_words: int) -> list[str]:
    """Chunks of one document, each with the document's title in front so that it can stand alone.

    Paragraphs are packed together up to `chunk_words`; a longer paragraph is cut between words.
    """
    title = next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("# ")), "")
    pieces: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if not words or paragraph.startswith("# "):
            continue
        for start in range(0, len(words), chunk_words):
            piece = words[start : start + chunk_words]
            if pieces and len(pieces[-1]) + len(piece) <= chunk_words:
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return [f"{title}: {' '.join(piece)}" if title else " ".join(piece) for piece in pieces]
