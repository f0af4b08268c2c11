"""Test sets: the formats and columns that are read, and the sentence that each bad input gets."""

from __future__ import annotations

import contextlib
import csv
import json
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragate import testset
from ragate.errors import TestSetError
from ragate.metrics import METRICS
from ragate.testset import Item, items_hash, load_testset, require, suite_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Record = dict[str, object]
RECORDS: list[Record] = [
    {
        "id": "a",
        "question": "Why, “paged”?",
        "reference": "Because.\nReally;",
        "answer": "So.",
        "contexts": ["x", "y"],
    },
    {"id": "b", "question": "How?", "reference": None, "answer": 'By "hand".', "contexts": ["[1] z"]},
]


def write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_csv(path: Path, records: Sequence[Mapping[str, object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        for r in records:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()})
    return path


def write_parquet(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(r) for r in records]), path)
    return path


def write(folder: Path, suffix: str, records: Sequence[Mapping[str, object]] = RECORDS) -> str:
    """The records as a file of that format, or a spec that `load_testset` takes."""
    path = folder / f"suite{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, records)
    elif suffix == ".json":
        path.write_text(json.dumps(records))
    elif suffix == ".csv":
        write_csv(path, records)
    elif suffix == ".tsv":
        write_csv(path, records, "\t")
    elif suffix == ".parquet":
        write_parquet(path, records)
    else:
        import datasets

        datasets.Dataset.from_list([dict(r) for r in records]).save_to_disk(str(folder / "suite"))
        return f"datasets:{folder / 'suite'}" if suffix == "datasets" else str(folder / "suite")
    return str(path)


FORMATS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", "datasets", "folder"]


def refusal(spec: Path | str) -> str:
    with pytest.raises(TestSetError) as caught:
        load_testset(str(spec))
    return str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_items_and_the_same_hash(tmp_path: Path, suffix: str) -> None:
    loaded = load_testset(write(tmp_path, suffix))
    expected = [
        Item(
            id="a", question="Why, “paged”?", reference="Because.\nReally;", answer="So.", contexts=("x", "y")
        ),
        Item(id="b", question="How?", answer='By "hand".', contexts=("[1] z",)),
    ]
    assert [item.model_copy(update={"line": None}) for item in loaded.items] == expected
    assert loaded.hash == items_hash(expected)
    assert loaded.name == "suite"


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('\n{"question": "one"}\n\n{"question": "two"}\n')
    assert [item.line for item in load_testset(str(jsonl)).items] == [2, 4]
    table = tmp_path / "a.csv"
    table.write_text('question,reference\n"one\nover two lines",x\n\ntwo,y\n')
    assert [item.line for item in load_testset(str(table)).items] == [2, 5]


@pytest.mark.parametrize(
    ("field", "column"),
    [(f, c) for f, cs in testset.COLUMNS.items() for c in cs if f not in ("critical", "reserve")],
)
def test_every_alias_is_read_in_any_case(tmp_path: Path, field: str, column: str) -> None:
    record: Record = {"question": "q"} | {column.upper().replace("_", " "): "value"}
    if field == "question":
        del record["question"]
    (item,) = load_testset(str(write_jsonl(tmp_path / "a.jsonl", [record]))).items
    assert getattr(item, field) == (("value",) if field == "contexts" else "value")


def test_rows_marked_as_reserve_are_kept_apart_and_leave_the_hash_of_the_rest_as_it_is(
    tmp_path: Path,
) -> None:
    rows: list[Record] = [{"id": f"q{i}", "question": f"Question {i}?"} for i in range(4)]
    whole = load_testset(str(write_jsonl(tmp_path / "whole.jsonl", rows[:2])))
    marked = [*rows[:1], rows[2] | {"reserve": True}, *rows[1:2], rows[3] | {"reserve": "yes"}]
    found = load_testset(str(write_jsonl(tmp_path / "marked.jsonl", marked)))
    assert ([i.id for i in found.items], [i.id for i in found.reserve]) == (["q0", "q1"], ["q2", "q3"])
    assert (found.hash, whole.reserve_hash) == (whole.hash, None)
    assert found.reserve_hash == testset.items_hash(found.reserve)
    assert [item.id for item in found.with_reserve().items] == ["q0", "q1", "q2", "q3"]
    limited = load_testset(str(tmp_path / "marked.jsonl"), limit=2)
    assert ([i.id for i in limited.items], limited.reserve, limited.reserve_hash) == (["q0", "q1"], (), None)


def test_a_folders_reserve_is_marked_as_such_and_a_set_of_nothing_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "suite").mkdir()
    write_jsonl(tmp_path / "suite/core.jsonl", [{"id": "a", "question": "A?"}])
    write_jsonl(tmp_path / "suite/reserve.jsonl", [{"id": "b", "question": "B?"}])
    found = load_testset(str(tmp_path / "suite"))
    assert [(item.id, item.reserve) for item in found.with_reserve().items] == [("a", False), ("b", True)]
    write_jsonl(tmp_path / "all.jsonl", [{"question": "A?", "reserve": True}])
    with pytest.raises(TestSetError, match="no items in it but the reserve"):
        load_testset(str(tmp_path / "all.jsonl"))


def test_ragas_version_1_and_2_columns_are_read(tmp_path: Path) -> None:
    v1 = {"question": "q", "ground_truths": ["r"], "answer": "a", "contexts": ["c"]}
    v2 = {"user_input": "q", "reference": "r", "response": "a", "retrieved_contexts": ["c"]}
    items = [load_testset(str(write_jsonl(tmp_path / "a.jsonl", [v]))).items for v in (v1, v2)]
    assert (
        items[0]
        == items[1]
        == (Item(id="item-0001", question="q", reference="r", answer="a", contexts=("c",), line=1),)
    )


@pytest.mark.parametrize("name", ["items", "samples", "examples", "data"])
def test_a_json_object_may_wrap_the_list(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, name: [{"question": "q"}]}))
    assert load_testset(str(path)).items[0].question == "q"


def test_missing_ids_come_from_the_position(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"question": "p"}, {"question": "q", "id": 7}, {"question": "r"}]
    )
    assert [item.id for item in load_testset(str(path)).items] == ["item-0001", "7", "item-0003"]


def test_a_folder_has_a_core_and_a_reserve_with_one_name_space_of_ids(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "core.jsonl", [{"question": "p", "sources": ["doc.md", "other.md"], "critical": True}]
    )
    write_jsonl(tmp_path / "reserve.jsonl", [{"question": "q", "cluster": "c", "sources": ["doc.md"]}])
    loaded = load_testset(str(tmp_path))
    assert [(i.id, i.cluster, i.critical) for i in loaded.items] == [("item-0001", "doc.md", True)]
    assert [(i.id, i.cluster, i.critical) for i in loaded.reserve] == [("item-0002", "c", False)]
    assert (loaded.name, loaded.hash) == (tmp_path.name, items_hash(loaded.items))
    write_jsonl(tmp_path / "reserve.jsonl", [{"question": "q", "id": "item-0001"}])
    assert (
        f"{tmp_path}/reserve.jsonl:1: id: 'item-0001' was used before, at {tmp_path}/core.jsonl:1"
        in refusal(tmp_path)
    )


def test_a_limit_keeps_the_first_items_and_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "p"}\n{"question": "q"}\nnot json\n')
    assert [item.question for item in load_testset(str(path), limit=2).items] == ["p", "q"]
    with pytest.raises(TestSetError, match="limit must be at least 1, got 0"):
        load_testset(str(path), limit=0)


def test_a_split_of_a_saved_dataset_is_read_and_must_be_named_where_there_are_two(tmp_path: Path) -> None:
    import datasets

    splits = {s: datasets.Dataset.from_list([{"question": s}]) for s in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    assert load_testset(f"datasets:{tmp_path / 'set'}:test").items[0].question == "test"
    assert "name a split; it has train, test" in refusal(f"datasets:{tmp_path / 'set'}")
    assert "no split 'dev'; it has train, test" in refusal(f"datasets:{tmp_path / 'set'}:dev")


def test_a_local_folder_is_loaded_by_datasets_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl", RECORDS)
    loaded = load_testset(f"datasets:{tmp_path / 'mine'}:train")
    assert [item.id for item in loaded.items] == ["a", "b"]
    assert loaded.name == "mine"


def test_a_dataset_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(f"datasets:{tmp_path / 'empty'}")
    assert "`datasets` cannot load it: " in message
    assert "\n" not in message
    assert "expected datasets:NAME" in refusal("datasets:a:b:c:d")


def test_suites_are_named_after_the_file_the_folder_or_the_last_part() -> None:
    assert suite_name("testsets/quickstart.jsonl") == "quickstart"
    assert suite_name("testsets/llm-serving/") == "llm-serving"
    assert suite_name("datasets:someone/amnesty:english:eval") == "amnesty"
    assert suite_name("testsets/v1.2") == "v1.2"


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    for suffix, text in (
        (".jsonl", '{"question": "q"}'),
        (".json", '[{"question": "q"}]'),
        (".csv", "question\nq\n"),
    ):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_testset(str(path)).items[0].question == "q"


def test_blank_cells_and_not_a_number_mean_nothing(tmp_path: Path) -> None:
    nan = float("nan")
    row = {"question": "q", "reference": nan, "answer": nan, "contexts": None, "kind": nan, "critical": None}
    empty = Item(id="item-0001", question="q")
    for suffix in (".jsonl", ".parquet"):
        (item,) = load_testset(write(tmp_path, suffix, [row])).items
        assert item.model_copy(update={"line": None}) == empty
    path = tmp_path / "a.csv"
    path.write_text("question,reference,answer,contexts,kind,critical\nq, ,,,,\n")
    assert load_testset(str(path)).items == (empty.model_copy(update={"line": 2}),)


def test_whole_numbers_that_a_table_made_floats_are_ids_again(tmp_path: Path) -> None:
    assert load_testset(write(tmp_path, ".parquet", [{"id": 3.0, "question": "q"}])).items[0].id == "3"


@pytest.mark.parametrize("word", [True, 1, 1.0, "true", "Yes", "1"])
def test_critical_is_read_from_the_usual_words(tmp_path: Path, word: object) -> None:
    assert (
        load_testset(str(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "critical": word}])))
        .items[0]
        .critical
    )


def test_one_plain_string_is_one_context_and_a_json_list_in_a_cell_is_many(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,contexts\np,"one, only"\nq,"[""a"", ""b""]"\nr,[1] a footnote\n')
    assert [i.contexts for i in load_testset(str(path)).items] == [
        ("one, only",),
        ("a", "b"),
        ("[1] a footnote",),
    ]


def test_semicolons_delimit_where_the_header_has_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question;reference\np, q;r\n")
    assert load_testset(str(path)).items[0].question == "p, q"


# What the input may get wrong: one sentence with the place


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_misnamed_question_column_names_what_was_found_and_the_nearest(tmp_path: Path, suffix: str) -> None:
    spec = write(tmp_path, suffix, [{"qestion": "q", "reference": "r"}])
    line = 1 if suffix == ".jsonl" else 2
    assert refusal(spec) == (
        f"{spec}:{line}: question: no such column; found 'qestion', 'reference'; expected one of question, "
        "user_input, query, input, prompt; did you mean 'question' by 'qestion'?"
    )


def test_a_column_missing_from_a_later_line_is_found_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}, {"frage": "q"}])
    assert (
        f"{path}:2: question: no such column; found 'frage'; expected one of question, user_input"
        in refusal(path)
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_two_columns_that_mean_one_field_are_refused(tmp_path: Path, suffix: str) -> None:
    spec = write(tmp_path, suffix, [{"question": "q", "ground_truth": "a", "Reference": "b"}])
    assert (
        "reference: the columns 'ground_truth' and 'Reference' both mean it; rename or drop one"
        in refusal(spec)
    )


def test_an_empty_second_column_does_no_harm_and_of_two_labels_ours_is_taken(tmp_path: Path) -> None:
    record = {
        "question": "q",
        "ground_truth": None,
        "reference": "b",
        "category": "c",
        "kind": "k",
        "_id": 1,
        "id": 2,
    }
    (item,) = load_testset(str(write_jsonl(tmp_path / "a.jsonl", [record]))).items
    assert (item.reference, item.kind, item.id) == ("b", "k", "2")


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", ":1"), (".csv", ":2"), (".parquet", ": row 1")])
def test_an_empty_question_is_refused(tmp_path: Path, suffix: str, place: str) -> None:
    spec = write(tmp_path, suffix, [{"question": "  ", "reference": "r"}])
    assert refusal(spec) == f"{spec}{place}: question: is empty"


@pytest.mark.parametrize(
    ("suffix", "places"),
    [(".jsonl", (":1", ":3")), (".csv", (":2", ":4")), (".json", (": item 1", ": item 3"))],
)
def test_a_duplicate_id_names_both_places(tmp_path: Path, suffix: str, places: tuple[str, str]) -> None:
    spec = write(tmp_path, suffix, [{"id": i, "question": "q"} for i in ("a", "b", "a")])
    assert refusal(spec) == f"{spec}{places[1]}: id: 'a' was used before, at {spec}{places[0]}"


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([], "contexts: the list is empty; give what was retrieved or leave it out"),
        (["a", " \n"], "contexts[1]: is blank"),
        (["a", None], "contexts[1]: expected text, got nothing"),
        ([{"text": "a"}], "contexts[0]: expected text, got an object"),
        (7, "contexts: expected a list of texts, got a number"),
        ({"a": "b"}, "contexts: expected a list of texts, got an object"),
        (["a"] * 1001, "contexts: 1,001 of them; at most 1,000"),
        (["a" * 1_000_001], "contexts[0]: 1,000,001 characters; at most 1,000,000"),
    ],
)
def test_contexts_of_the_wrong_shape_are_refused(tmp_path: Path, contexts: object, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "contexts": contexts}])
    assert refusal(path) == f"{path}:1: {message}"


def test_an_empty_list_in_a_parquet_column_is_refused(tmp_path: Path) -> None:
    spec = write(
        tmp_path, ".parquet", [{"question": "q", "contexts": ["c"]}, {"question": "r", "contexts": []}]
    )
    assert refusal(spec).startswith(f"{spec}: row 2: contexts: the list is empty")


def test_a_python_list_in_a_cell_is_not_taken_for_one_context(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,contexts\nq,\"['a', 'b']\"\n")
    assert refusal(path) == f"{path}:2: contexts: looks like a list but is not JSON; write it as JSON"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("question", 7, "expected text, got a number"),
        ("question", ["a"], "expected text, got a list"),
        ("question", "a" * 100_001, "100,001 characters; at most 100,000"),
        ("question", "\ud800", "half of a surrogate pair at character 0"),
        ("reference", ["a", "b"], "expected text, got a list"),
        ("answer", {"a": 1}, "expected text, got an object"),
        ("id", "a" * 201, "201 characters; at most 200"),
        ("id", "a\x1b[2J", "holds a control character"),
        ("kind", True, "expected text, got true or false"),
        ("cluster", "a" * 501, "501 characters; at most 500"),
        ("critical", "perhaps", "expected true or false, got 'perhaps'"),
    ],
)
def test_a_field_of_the_wrong_type_or_length_is_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"} | {field: value}])
    assert refusal(path) == f"{path}:1: {field}: {message}"


def test_bytes_that_are_not_utf8_are_named_with_line_and_offset(tmp_path: Path) -> None:
    data = b'{"question": "a"}\n{"question": "caf\xe9"}\n'
    for name, bytes_, line in (
        ("a.jsonl", data, 2),
        ("a.json", b"[\n\n" + data, 4),
        ("a.csv", b"question\n\xe9\n", 2),
    ):
        path = tmp_path / name
        path.write_bytes(bytes_)
        at = bytes_.index(b"\xe9")
        assert refusal(path) == f"{path}:{line}: byte {at} (0xe9) is not UTF-8; save the file as UTF-8"


def test_utf16_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("question\nq\n".encode("utf-16"))
    assert refusal(path) == f"{path}:1: is UTF-16; save it as UTF-8"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "question\n"), ("a.csv", "")],
)
def test_no_items_at_all_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert refusal(path) == f"{path}: there are no items in it"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_a_line_of_a_gigabyte_is_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as f:
        f.write(b"question\n" if suffix == ".csv" else b"")
        f.truncate((1 << 30) + 100)  # sparse: takes no disk
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 << 20
    if suffix == ".json":
        assert "a .json is read whole, so write this one as .jsonl" in message
    else:
        assert message == f"{path}:{1 if suffix == '.jsonl' else 2}: the line is longer than 16 MB"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["question"]', "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got nothing"),
        ('"question"', "expected a JSON object, got text"),
        ('{"question": "q"', "not JSON: Expecting ',' delimiter at column 17"),
        ("[" * 100_000, "not JSON that can be read: nested too deep or a number too long"),
        (
            '{"question": ' + "1" * 5000 + "}",
            "not JSON that can be read: nested too deep or a number too long",
        ),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q"}\n' + line + "\n")
    assert refusal(path) == f"{path}:2: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "q"}', ": expected a list, or an object with one of items, samples, examples, data"),
        (
            '{"items": [], "data": []}',
            ": expected a list, or an object with one of items, samples, examples, data",
        ),
        ('"q"', ": expected a list of objects, got text"),
        ('[{"question": "q"}, 7]', ": item 2: expected a JSON object, got a number"),
        ('{"a": 1}\n{"a": 2}', ":2: not JSON: Extra data at column 1; JSON lines belong in a .jsonl"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert refusal(path) == f"{path}{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,reference\nq\n", ":2: 1 cells under a header of 2; quote commas"),
        ("question,reference\na,b\nq,r,s\n", ":3: 3 cells under a header of 2; quote commas"),
        ("question,question\nq,r\n", ":1: the column 'question' is there twice"),
        ('question,reference\n"q,r\n', ":2: not csv: unexpected end of data"),
    ],
)
def test_csv_that_is_out_of_shape_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert refusal(path) == f"{path}{message}"


def test_long_cells_are_read_and_the_csv_limit_of_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    spec = write(tmp_path, ".csv", [{"question": "q", "answer": "a" * 500_000}])
    assert len(load_testset(spec).items[0].answer or "") == 500_000
    load_testset(spec, limit=1)
    assert csv.field_size_limit() == before


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    spec = write(tmp_path, ".parquet")
    data = (tmp_path / "suite.parquet").read_bytes()
    for damaged in (b"", b"PAR1", data[: len(data) // 2], data[:4] + bytes(100) + data[104:]):
        (tmp_path / "suite.parquet").write_bytes(damaged)
        message = refusal(spec)
        assert (
            message.startswith(f"{spec}: not parquet that can be read: ") or ": cannot be read: " in message
        )
        assert "\n" not in message


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testset, "MAX_FILE_BYTES", 100)
    assert "bytes when unpacked; at most 100" in refusal(write(tmp_path, ".parquet"))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl")
    assert refusal(tmp_path / "siute.jsonl").endswith(
        f"no such test set; did you mean {tmp_path}/suite.jsonl?"
    )
    assert refusal(tmp_path / "nowhere" / "a.jsonl").endswith("no such test set; name one with --testset")
    assert "too long for a file" in refusal("a" * 5000)
    assert "no test set is named; give one with --testset" in refusal("")


def test_other_suffixes_and_other_folders_say_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("")
    assert "'.xlsx' is not a test set; use .jsonl, .json, .csv, .tsv, .parquet" in refusal(
        tmp_path / "a.xlsx"
    )
    assert "holds neither core.jsonl nor a saved `datasets` set" in refusal(tmp_path)


def test_more_items_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testset, "MAX_ITEMS", 2)
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}] * 3)
    assert refusal(path) == f"{path}:3: more than 2 items; split the test set"


# What the metrics need


@pytest.mark.parametrize(
    ("metric", "missing"),
    [
        ("faithfulness", "answer"),
        ("faithfulness", "contexts"),
        ("context_precision", "reference"),
        ("context_precision", "contexts"),
        ("context_recall", "reference"),
        ("context_recall", "contexts"),
        ("answer_relevance", "answer"),
    ],
)
def test_a_metric_without_its_field_names_item_and_field(tmp_path: Path, metric: str, missing: str) -> None:
    whole: Record = {"id": "a", "question": "q", "reference": "r", "answer": "a", "contexts": ["c"]}
    part = {k: v for k, v in whole.items() if k != missing} | {"id": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [whole, part])
    loaded = load_testset(str(path))
    require(loaded, [name for name, row in METRICS.items() if missing not in row.needs], True)
    with pytest.raises(TestSetError) as caught:
        require(loaded, [metric], True)
    assert f"{path}:2: {missing}: item b has none and {metric} needs it; add a column {missing} or " in str(
        caught.value
    )
    if missing != "reference":
        assert "--target" in str(caught.value)
        require(loaded, [metric], False)


def test_the_reserve_is_checked_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "core.jsonl", [{"question": "q", "reference": "r"}])
    write_jsonl(tmp_path / "reserve.jsonl", [{"question": "q"}])
    with pytest.raises(TestSetError, match=r"reserve\.jsonl:1: reference: item item-0002 has none"):
        require(load_testset(str(tmp_path)), ["context_recall"], False)


# Properties

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1).filter(str.strip)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(TEXT, st.none() | TEXT, st.none() | st.lists(TEXT, min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_survives_every_format(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, object, object]]
) -> None:
    records = [{"question": q, "reference": r, "contexts": c} for q, r, c in rows]
    folder = tmp_path_factory.mktemp("t")
    hashes = {
        load_testset(write(folder, suffix, records)).hash
        for suffix in (".jsonl", ".json", ".csv", ".parquet")
    }
    assert len(hashes) == 1


@settings(max_examples=200)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def test_no_bytes_whatever_raise_anything_but_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(TestSetError):
        assert load_testset(str(path)).items


def test_the_hash_depends_on_order_id_question_and_reference_and_nothing_else() -> None:
    a, b = Item(id="a", question="p"), Item(id="b", question="q", reference="r")
    same = a.model_copy(update={"answer": "x", "contexts": ("c",), "kind": "k", "line": 9})
    assert items_hash([a, b]) == items_hash([same, b])
    others = [
        [b, a],
        [a],
        [a, b.model_copy(update={"reference": None})],
        [a.model_copy(update={"id": "c"}), b],
    ]
    assert len({items_hash(items) for items in [[a, b], *others]}) == 5
