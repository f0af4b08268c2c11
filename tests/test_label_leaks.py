"""The measure of leaks finds a planted one and none where there is none."""

from __future__ import annotations

import random

import numpy as np

from bench.label_leaks import Row, auroc, leaks, transfer

WORDS = "amber birch cedar delta ember fjord grove heron inlet juniper kelp larch".split()  # noqa: SIM905


def rows(planted: bool) -> list[Row]:
    rng = random.Random(0)
    found = []
    for i in range(400):
        label = rng.randint(0, 1)
        text = " ".join(rng.choices(WORDS, k=6)) + (" surely" if planted and not label else "")
        found.append(Row(text, " ".join(WORDS), label, f"cluster {i}"))
    return found


def test_auroc_counts_ties_half() -> None:
    assert auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 0, 1, 1])) == 0.875


def test_a_word_of_one_label_is_found() -> None:
    found = leaks(rows(planted=True))
    assert found["auroc_text_alone"] > 0.95
    assert found["auroc_overlap"] > 0.95  # the passages lack that word too


def test_random_labels_are_not_told() -> None:
    found = leaks(rows(planted=False))
    assert 0.4 < found["auroc_text_alone"] < 0.6
    assert found["auroc_overlap"] == 0.5


def test_what_overlap_tells_in_lessons_is_applied_to_labelled_sentences() -> None:
    found = transfer(
        rows(planted=True), [Row("amber surely", "amber", 0, "a"), Row("amber", "amber", 1, "b")]
    )
    assert found == {
        "labelled_sentences_auroc_overlap": 1.0,
        "labelled_sentences_auroc_lessons": 1.0,
        "labelled_answers_auroc_overlap": 1.0,
        "labelled_answers_auroc_lessons": 1.0,
    }
