"""Lessons as token ids with a loss weight each, and files of them.

The files hold numbers only and are read with numpy alone: a machine that trains needs neither ragas nor the data.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragate.errors import TestSetError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ragate.tuning.lessons import Lesson
    from ragate_engine import Example, Tokenizer

MAX_TOKENS = 2000
"""Prompt and answer together: a longer lesson costs more than it teaches."""


def examples_of(lessons: Sequence[Lesson], tokenizer: Tokenizer, most: int = MAX_TOKENS) -> list[Example]:
    """The lessons as the engine's judge would see them, in order, without those of more than `most` tokens.

    The answer ends with the token that ends the assistant's turn, of weight 0: a grammar ends the answer.
    """
    found = []
    for lesson in lessons:
        example = example_of(lesson, tokenizer)
        if len(example.prompt) + len(example.answer) <= most:
            found.append(example)
    return found


def example_of(lesson: Lesson, tokenizer: Tokenizer) -> Example:
    """One lesson as token ids; a token over several pieces of the answer has the largest of their weights."""
    from ragate_engine import Example

    prompt = tokenizer.encode_chat([{"role": "user", "content": lesson.prompt}])
    tokens = tokenizer.encode(lesson.text, special=False)
    by_byte = [weight for piece, weight in lesson.answer for _ in piece.encode()]
    weights: list[float] = []
    at = 0
    for token in tokens:
        size = len(tokenizer.token_bytes(token))
        weights.append(max(by_byte[at : at + size], default=0.0))
        at += size
    assert at == len(by_byte), "the tokens spell the answer"
    assert tokenizer.eos_id is not None, "a model that chats has an end"
    return Example(tuple(prompt), (*tokens, tokenizer.eos_id), (*weights, 0.0))


def save_examples(examples: Sequence[Example], path: Path) -> None:
    """Write examples as .npz: lengths, all prompts, all answers, all weights in a row."""
    import numpy as np

    np.savez_compressed(
        path,
        prompt_lengths=np.array([len(e.prompt) for e in examples], np.int32),
        answer_lengths=np.array([len(e.answer) for e in examples], np.int32),
        prompts=np.array([token for e in examples for token in e.prompt], np.int32),
        answers=np.array([token for e in examples for token in e.answer], np.int32),
        weights=np.array([weight for e in examples for weight in e.weights], np.float32),
    )


def load_examples(*paths: Path) -> list[Example]:
    """The examples of some .npz files in a row. Raises TestSetError for a file that is none of ours."""
    import numpy as np

    from ragate_engine import Example

    found: list[Example] = []
    for path in paths:
        try:
            with np.load(path) as file:
                prompts = _split(file["prompts"], file["prompt_lengths"])
                answers = _split(file["answers"], file["answer_lengths"])
                exact = file["weights"].astype(np.float64).round(6)  # 0.1, not its nearest float32
                weights = _split(exact, file["answer_lengths"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
            raise TestSetError(
                f"{path}: no file of examples: {e}; make it with python -m ragate.tuning"
            ) from None
        found += [Example(*parts) for parts in zip(prompts, answers, weights, strict=True)]
    return found


def _split(row: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> list[tuple[Any, ...]]:
    flat = row.tolist()
    found, at = [], 0
    for length in lengths.tolist():
        found.append(tuple(flat[at : at + length]))
        at += length
    return found


def save_lessons(lessons: Sequence[Lesson], path: Path) -> None:
    """Write lessons as gzipped JSON Lines; equal lessons make equal bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as out:
        for lesson in lessons:
            out.write((json.dumps(asdict(lesson), ensure_ascii=False) + "\n").encode())
