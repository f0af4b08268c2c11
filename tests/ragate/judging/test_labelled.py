"""Labelled answers as they are read, and what is said of a row that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ragate.errors import TestSetError
from ragate.judging.labelled import NO_QUESTION, load_labelled, spread
from ragate.judging.overlap import content_words, overlap

ROW = {"id": "a", "question": "Why?", "contexts": ["Because.", "So."], "answer": "So.", "faithful": 1}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "labelled.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_row_is_read_with_its_source_and_generator(tmp_path: Path) -> None:
    path = written(tmp_path, ROW | {"source_id": 7, "generator": "g"})
    items, unlabelled = load_labelled(path, "faithfulness")
    (item,) = items
    assert (item.id, item.cluster, item.generator, item.faithful, unlabelled) == ("a", "7", "g", 1, 0)
    assert item.contexts == ("Because.", "So.")


def test_rows_without_a_source_are_of_one_where_their_contexts_are(tmp_path: Path) -> None:
    path = written(tmp_path, ROW, ROW | {"id": "b", "answer": "No."}, ROW | {"id": "c", "contexts": ["X."]})
    clusters = [item.cluster for item in load_labelled(path, "faithfulness")[0]]
    assert clusters[0] == clusters[1] != clusters[2]


def test_supporting_sentences_label_contexts_and_a_claim_needs_no_question(tmp_path: Path) -> None:
    row = {"context_sentences": ["a", "b", "c"], "answer": "x", "supporting_sentences": [[0], [0, 2]]}
    path = written(tmp_path, row, row | {"supporting_sentences": [[]]})
    first, second = load_labelled(path, "relevance")[0]
    assert first.context_relevant == (1, 0, 1) and second.context_relevant == (0, 0, 0)
    assert first.question == NO_QUESTION and (first.id, second.id) == ("1", "2")


def test_rows_without_the_label_are_counted_and_left_out(tmp_path: Path) -> None:
    items, unlabelled = load_labelled(
        written(tmp_path, ROW, ROW | {"id": "b", "faithful": None}), "faithfulness"
    )
    assert ([item.id for item in items], unlabelled) == (["a"], 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: expected a JSON object"),
        ({"answer": "x"}, ":1: contexts: missing"),
        (ROW | {"contexts": "text"}, ":1: contexts: expected a list of texts, got 'text'"),
        (ROW | {"answer": " "}, ":1: answer: expected a text"),
        (ROW | {"faithful": 2}, ":1: faithful: expected 1, 0 or null, got 2"),
        (ROW | {"question": 3}, ":1: question: expected a text"),
        (ROW | {"context_relevant": [1]}, ":1: context_relevant: expected 1 or 0 for each of 2"),
        (ROW | {"supporting_sentences": [[5]]}, ":1: supporting_sentences: expected positions below 2"),
        (ROW | {"faithful": None}, "faithful: no row has it"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_field(tmp_path: Path, row: Any, said: str) -> None:
    path = written(tmp_path, row)
    with pytest.raises(TestSetError) as caught:
        load_labelled(path, "faithfulness")
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_an_id_twice_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TestSetError, match=":2: id: 'a' is that of line 1"):
        load_labelled(written(tmp_path, ROW, ROW), "faithfulness")
    with pytest.raises(TestSetError, match="cannot be read"):
        load_labelled(tmp_path / "none.jsonl", "faithfulness")


def test_fewer_items_are_evenly_spaced(tmp_path: Path) -> None:
    rows = [ROW | {"id": str(i)} for i in range(10)]
    items = load_labelled(written(tmp_path, *rows), "faithfulness")[0]
    assert [item.id for item in spread(items, 4)] == ["0", "2", "5", "7"]
    assert spread(items, None) == items == spread(items, 99)


def test_word_overlap_counts_content_words_found_in_any_context() -> None:
    assert content_words("The cat isn't on the Mat, based on Passage 3.") == ["cat", "isn't", "mat", "3"]
    assert overlap("The black cat sat on 2 mats", ["A cat SAT.", "two mats"]) == pytest.approx(3 / 5)
    assert overlap("it is the", ["anything"]) == 1.0


def test_a_line_ends_at_its_newline_and_at_no_other_separator_of_unicode(tmp_path: Path) -> None:
    row = ROW | {"answer": "One.\u2028Two.\x85Three."}
    path = tmp_path / "labelled.jsonl"
    path.write_bytes(
        b"".join(json.dumps(row | {"id": i}, ensure_ascii=False).encode() + b"\r\n" for i in "ab")
    )
    items, _ = load_labelled(path, "faithfulness")
    assert [item.answer for item in items] == [row["answer"]] * 2


@pytest.mark.parametrize("field", ["id", "answer", "question", "generator", "source_id"])
def test_text_that_is_no_unicode_is_refused_by_its_field(tmp_path: Path, field: str) -> None:
    path = written(tmp_path, ROW, ROW | {"id": "b", field: "x\ud800"})
    with pytest.raises(TestSetError, match=f":2: {field}: half of a surrogate pair at character 1"):
        load_labelled(path, "faithfulness")
    path = written(tmp_path, ROW | {"contexts": ["a", "\ud800"]})
    with pytest.raises(TestSetError, match=":1: contexts: half of a surrogate pair at character 0"):
        load_labelled(path, "faithfulness")
