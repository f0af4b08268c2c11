"""What tells the labels of the lessons that judges are trained on: a statement's words alone, and its word overlap.

A logistic regression on the statements of the NLI lessons, fitted on half of the clusters and tested on the other: once
on the words of the statement alone, once on how much of it the passages hold and how long it is. The first would be a
leak: near 0.5 a judge has to read the passages. The second is evidence, in the lessons as in the world; with --labelled
it is fitted on all lessons and applied to people's labels, where it should do no worse than overlap alone.

    python -m ragate.tuning DATA --out lessons.jsonl.gz
    python -m bench.label_leaks lessons.jsonl.gz --labelled DATA/ragtruth_qa_dev.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

from bench.result import header, save
from ragate.judging.sentences import sentences_of
from ragate.metrics import INPUT_MARK
from ragate.tuning.text import content_words, nearest, overlap, words_of

BUCKETS = 1 << 16


@dataclass(frozen=True)
class Row:
    """A statement of an NLI lesson."""

    text: str
    passages: str
    label: int
    cluster: str


def rows_of(path: Path) -> list[Row]:
    """The statements of all NLI lessons of a file with their verdicts."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for lesson in map(json.loads, lines):
            if lesson["call"] == "nli":
                given, _ = json.JSONDecoder().raw_decode(lesson["prompt"].partition(INPUT_MARK)[2])
                judged = json.loads("".join(piece for piece, _ in lesson["answer"]))["statements"]
                found += [
                    Row(said["statement"], given["context"], said["verdict"], lesson["cluster"])
                    for said in judged
                ]
    return found


def bag(texts: Sequence[str]) -> csr_matrix:
    """[texts, BUCKETS]: words and pairs of words, hashed; each row of length 1."""
    columns, starts, values = [], [0], []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        marks = {*words, *map(" ".join, zip(words, words[1:], strict=False))}
        columns += [zlib.crc32(mark.encode()) % BUCKETS for mark in marks]
        values += [len(marks) ** -0.5] * len(marks)
        starts.append(len(columns))
    return csr_matrix((values, columns, starts), shape=(len(texts), BUCKETS))


def shallow(rows: Sequence[Row]) -> csr_matrix:
    """[rows, 9]: overlap with all passages and with the nearest sentence, length, and their squares and products."""
    table = []
    for row in rows:
        whole = overlap(row.text, words_of([row.passages]))
        near = overlap(row.text, set(content_words(nearest(row.text, [row.passages]))))
        length = min(len(row.text), 400) / 400
        table.append(
            [whole, near, length, whole**2, near**2, length**2, whole * near, whole * length, near * length]
        )
    return csr_matrix(np.array(table))


def held_out_auroc(
    features: csr_matrix, labels: np.ndarray, clusters: Sequence[str], penalty: float
) -> float:
    """AUROC on one half of the clusters of a logistic regression fitted on the other, mean over both directions."""
    half = np.array([zlib.crc32(f"half {cluster}".encode()) % 2 for cluster in clusters])
    found = []
    for train in (half == 0, half == 1):
        weights = fitted(features[train], labels[train], penalty)
        found.append(auroc(features[~train] @ weights[:-1], labels[~train]))
    return float(np.mean(found))


def fitted(seen: csr_matrix, labels: np.ndarray, penalty: float) -> np.ndarray:
    """[features + 1]: weights of a logistic regression with an L2 penalty, the constant last."""
    signs = 2.0 * labels - 1

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = signs * (seen @ weights[:-1] + weights[-1])
        pull = -signs / (1 + np.exp(np.clip(margin, -30, 30))) / len(signs)
        slope = np.append(seen.T @ pull + 2 * penalty * weights[:-1], pull.sum())
        return float(np.logaddexp(0, -margin).mean() + penalty * weights[:-1] @ weights[:-1]), slope

    start = np.zeros(seen.shape[1] + 1)
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a random 1 scores above a random 0, ties counted half."""
    ranks, ones = rankdata(scores), int(labels.sum())
    return float((ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


def leaks(rows: Sequence[Row]) -> dict[str, Any]:
    """AUROC of each shallow model, and of overlap and length each for itself."""
    labels = np.array([row.label for row in rows])
    clusters = [row.cluster for row in rows]
    features = shallow(rows)
    dense = features.toarray()
    text = max(held_out_auroc(bag([r.text for r in rows]), labels, clusters, p) for p in (1e-6, 1e-5, 1e-4))
    return {
        "statements": len(rows),
        "supported": int(labels.sum()),
        "auroc_text_alone": round(text, 4),
        "auroc_overlap_and_length": round(held_out_auroc(features, labels, clusters, 1e-7), 4),
        "auroc_overlap": round(auroc(dense[:, 0], labels), 4),
        "auroc_overlap_nearest": round(auroc(dense[:, 1], labels), 4),
        "auroc_length": round(auroc(dense[:, 2], labels), 4),
    }


def labelled_rows(path: Path) -> list[Row]:
    """The sentences of labelled answers, 0 where a labelled span touches them; the cluster is the answer."""
    found = []
    for answer in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for text in sentences_of(answer["answer"]):
            start = answer["answer"].find(text[:40])
            touched = any(s["start"] < start + len(text) and s["end"] > start for s in answer["spans"])
            if start >= 0:  # a lead-in joined to its item is not there in one piece
                found.append(Row(text, "\n".join(answer["contexts"]), int(not touched), answer["id"]))
    return found


def transfer(rows: Sequence[Row], labelled: Sequence[Row]) -> dict[str, Any]:
    """AUROC on labelled sentences, and on whole answers by the product, of overlap and of what lessons teach of it.

    An answer is faithful where none of its sentences is labelled 0.
    """
    labels = np.array([row.label for row in labelled])
    features = shallow(labelled)
    weights = fitted(shallow(rows), np.array([row.label for row in rows]), 1e-7)
    chances = -np.logaddexp(0, -(features @ weights[:-1] + weights[-1]))  # log P(supported)
    shares = np.log(np.maximum(features.toarray()[:, 0], 0.02))
    answers = {row.cluster: number for number, row in enumerate(labelled)}
    at = np.array([answers[row.cluster] for row in labelled])
    whole = np.array([labels[at == number].min() for number in answers.values()])
    scores = {"overlap": shares, "lessons": chances}
    return {f"labelled_sentences_auroc_{name}": round(auroc(s, labels), 4) for name, s in scores.items()} | {
        f"labelled_answers_auroc_{name}": round(
            auroc(np.array([s[at == number].sum() for number in answers.values()]), whole), 4
        )
        for name, s in scores.items()
    }


def main() -> None:
    """Read lessons, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lessons", type=Path, help="file of lessons")
    parser.add_argument("--labelled", type=Path, help="answers with spans that people labelled, as .jsonl")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = rows_of(args.lessons)
    result = header("cpu") | leaks(rows)
    if args.labelled:
        result |= transfer(rows, labelled_rows(args.labelled))
    print(json.dumps(result, indent=2))
    save(result, args.out)


if __name__ == "__main__":
    main()
