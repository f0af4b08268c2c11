"""Test sets: `Item`s read from json, jsonl, csv, parquet, a folder or `datasets`, with places in errors."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ragate.errors import TestSetError
from ragate.metrics import metrics_named
from ragate.run import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


class Item(Frozen):
    """One test case. `answer` and `contexts` are there when they are stored; else the target gives them."""

    id: str
    question: str
    reference: str | None = None
    answer: str | None = None
    contexts: tuple[str, ...] | None = None
    kind: str | None = None
    cluster: str | None = None
    critical: bool = False
    reserve: bool = False
    """Asked only where the others cannot tell whether the system got worse."""
    line: int | None = None


class TestSet(Frozen):
    """The items of a suite, their reserve, and where they came from."""

    __test__ = False

    name: str
    """Suite name: the file's stem or the folder's name."""
    source: str
    items: tuple[Item, ...]
    reserve: tuple[Item, ...] = ()
    hash: str
    """sha256 over id, question and reference of the items."""
    reserve_hash: str | None = None
    """The same of the reserve; `None` where there is none."""

    def with_reserve(self) -> TestSet:
        """The test set with its reserve among the items."""
        return self.model_copy(update={"items": self.items + self.reserve, "reserve": ()})

    def reserve_alone(self) -> TestSet:
        """The reserve as the items; the hash stays that of the whole suite."""
        return self.model_copy(update={"items": self.reserve, "reserve": ()})


COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "_id", "qid", "case_id", "sample_id"),
    "question": ("question", "user_input", "query", "input", "prompt"),
    "reference": (
        "reference", "ground_truth", "ground_truths", "reference_answer", "expected", "expected_output",
        "answer_gold",
    ),
    "answer": ("answer", "response", "output", "actual_output", "generated_answer"),
    "contexts": ("contexts", "retrieved_contexts", "context", "retrieved_context", "documents"),
    "kind": ("kind", "type", "category"),
    "cluster": ("cluster", "source", "source_id", "document", "sources"),
    "critical": ("critical",),
    "reserve": ("reserve",),
}  # fmt: skip
"""Field -> the column names it goes by (case, spaces and dashes do not matter); the first is ours."""

LIMITS = {
    "id": 200,
    "kind": 200,
    "cluster": 500,
    "question": 100_000,
    "reference": 100_000,
    "answer": 1_000_000,
}
"""Characters at most, per field."""
MAX_CONTEXT_CHARS = 1_000_000
MAX_CONTEXTS = 1_000
MAX_ITEMS = 1_000_000
MAX_LINE_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 30
"""Of formats that are read whole: json, and parquet when unpacked."""

_FIELD_OF = {column: field for field, columns in COLUMNS.items() for column in columns}
_TEXT_FIELDS = ("question", "reference", "answer", "contexts")
_LISTS = ("items", "samples", "examples", "data")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def load_testset(spec: str, *, limit: int | None = None) -> TestSet:
    """Read a test set.

    `spec` is a .jsonl, .json, .csv, .tsv or .parquet file; a folder with core.jsonl and perhaps
    reserve.jsonl, or one that `datasets` saved; or `datasets:NAME[:SPLIT]` (`datasets:NAME:CONFIG:SPLIT`).
    The reserve is that file, and every row whose column `reserve` is true. Column names may be those of ragas
    or any other in `COLUMNS`. `limit` keeps the first items, no reserve.
    Raises TestSetError naming file, line and field.
    """
    if limit is not None and limit < 1:
        raise TestSetError(f"limit must be at least 1, got {limit}")
    core, reserve = _open(spec)
    places: dict[str, str] = {}
    found = _items(core, places, limit)
    items = tuple(item for item in found if not item.reserve)
    if not items:
        raise TestSetError(f"{spec}: there are no items in it{' but the reserve' if found else ''}")
    rest: tuple[Item, ...] = ()
    if limit is None:
        rest = tuple(item for item in found if item.reserve)
        rest += tuple(item.model_copy(update={"reserve": True}) for item in _items(reserve, places, None))
    return TestSet(
        name=suite_name(spec),
        source=spec,
        items=items,
        reserve=rest,
        hash=items_hash(items),
        reserve_hash=items_hash(rest) if rest else None,
    )


def suite_name(spec: str) -> str:
    """What the test set `spec` is called: the file's stem, the folder's name, the last part of a hub name."""
    if spec.startswith("datasets:"):
        return Path(_dataset_parts(spec)[0]).name
    path = Path(spec)
    return path.stem if path.suffix.lower() in _SUFFIXES else path.resolve().name


def items_hash(items: Iterable[Item]) -> str:
    """sha256 over id, question and reference of the items in order, whatever file format they came in."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.question, item.reference]).encode() + b"\n")
    return digest.hexdigest()


def require(testset: TestSet, metrics: Sequence[str], target_is_stored: bool) -> None:
    """Check that every item has what the metrics need: answer and contexts too when no target gives them.

    Raises TestSetError naming the first item, the field and the metric.
    """
    chosen = metrics_named(metrics)
    given = () if target_is_stored else ("answer", "contexts")
    for file, items in (("core.jsonl", testset.items), ("reserve.jsonl", testset.reserve)):
        for item in items:
            for metric in chosen:
                for field in metric.needs:
                    if field in given or getattr(item, field):
                        continue
                    place = testset.source if Path(testset.source).is_file() else f"{testset.source}/{file}"
                    where = f"{place}:{item.line}" if item.line else place
                    out = f"add a column {' or '.join(COLUMNS[field][:3])}"
                    if field in ("answer", "contexts"):
                        out += ", or name the system that answers with --target"
                    raise TestSetError(
                        f"{where}: {field}: item {item.id} has none and {metric.name} needs it; {out}"
                    )


# Rows to items


@dataclass(frozen=True)
class _Row:
    """A record and where it stands: `place` is file:line or file: row N; `line` only of text files."""

    place: str
    cells: Mapping[str, object]
    line: int | None = None


def _items(rows: Iterable[_Row], places: dict[str, str], limit: int | None) -> tuple[Item, ...]:
    """The items of `rows`; `places` holds where each id was seen, and gets the new ones.

    `limit` ends it after so many that are not of the reserve.
    """
    items: list[Item] = []
    core = 0
    for row in rows:
        item = _item(row, len(places) + 1)
        if item.id in places:
            raise TestSetError(f"{row.place}: id: {item.id!r} was used before, at {places[item.id]}")
        places[item.id] = row.place
        items.append(item)
        core += not item.reserve
        if core == limit:
            break
        if len(places) > MAX_ITEMS:
            raise TestSetError(f"{row.place}: more than {MAX_ITEMS:,} items; split the test set")
    return tuple(items)


def _item(row: _Row, position: int) -> Item:
    cells = _fields(row)
    if "question" not in cells:
        raise TestSetError(f"{row.place}: question: no such column; {_found(row)}")
    question = _text(row, "question", cells["question"])
    if question is None:
        raise TestSetError(f"{row.place}: question: is empty")
    id_ = _label(row, "id", cells.get("id"))
    return Item(
        id=id_ or f"item-{position:04}",
        question=question,
        reference=_text(row, "reference", cells.get("reference")),
        answer=_text(row, "answer", cells.get("answer")),
        contexts=_contexts(row, cells.get("contexts")),
        kind=_label(row, "kind", cells.get("kind")),
        cluster=_label(row, "cluster", cells.get("cluster")),
        critical=_flag(row, "critical", cells.get("critical")),
        reserve=_flag(row, "reserve", cells.get("reserve")),
        line=row.line,
    )


def _fields(row: _Row) -> dict[str, object]:
    """Field -> value. Two filled columns for a text field are an error; for a label the first name wins."""
    found: dict[str, tuple[int, str, object]] = {}
    for column, value in row.cells.items():
        name = column.strip().lower().replace(" ", "_").replace("-", "_")
        field = _FIELD_OF.get(name)
        if field is None:
            continue
        value = None if _is_missing(value) else value
        rank = COLUMNS[field].index(name)
        if field not in found:
            found[field] = (rank, column, value)
            continue
        other_rank, other, other_value = found[field]
        if value is not None and other_value is not None and (field in _TEXT_FIELDS or rank == other_rank):
            raise TestSetError(
                f"{row.place}: {field}: the columns {other!r} and {column!r} both mean it; rename or drop one"
            )
        if other_value is None or (value is not None and rank < other_rank):
            found[field] = (rank, column, value)
    return {field: value for field, (_, _, value) in found.items()}


def _found(row: _Row) -> str:
    """What was there and what was expected, with the nearest column where there is one."""
    columns = list(row.cells)
    shown = ", ".join(repr(c[:40]) for c in columns[:20]) + (" …" if len(columns) > 20 else "")
    text = f"found {shown or 'nothing'}; expected one of {', '.join(COLUMNS['question'])}"
    for column in columns:
        if near := difflib.get_close_matches(column.lower(), COLUMNS["question"], 1, 0.75):
            return f"{text}; did you mean {near[0]!r} by {column!r}?"
    return text


def _is_missing(value: object) -> bool:
    """None, NaN (how tables say nothing) or blank text."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _text(row: _Row, field: str, value: object) -> str | None:
    if field == "reference" and isinstance(value, list) and len(value) == 1:  # ragas' old `ground_truths`
        value = None if _is_missing(value[0]) else value[0]
    if value is None:
        return None
    if not isinstance(value, str):
        raise TestSetError(f"{row.place}: {field}: expected text, got {_kind_of(value)}")
    return _bounded(row, field, value, LIMITS[field])


def _label(row: _Row, field: str, value: object) -> str | None:
    """A short text; numbers are taken as they are written, of a list its first."""
    if isinstance(value, list):
        value = value[0] if value else None
    if _is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a table with a hole turns its whole numbers into floats
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise TestSetError(f"{row.place}: {field}: expected text, got {_kind_of(value)}")
    if not value.strip().isprintable():
        raise TestSetError(f"{row.place}: {field}: holds a control character")
    return _bounded(row, field, value.strip(), LIMITS[field])


def _contexts(row: _Row, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise TestSetError(f"{row.place}: contexts: expected a list of texts, got {_kind_of(value)}")
    if not parts:
        raise TestSetError(
            f"{row.place}: contexts: the list is empty; give what was retrieved or leave it out"
        )
    if len(parts) > MAX_CONTEXTS:
        raise TestSetError(f"{row.place}: contexts: {len(parts):,} of them; at most {MAX_CONTEXTS:,}")
    for i, part in enumerate(parts):
        if not isinstance(part, str):
            raise TestSetError(f"{row.place}: contexts[{i}]: expected text, got {_kind_of(part)}")
        if not part.strip():
            raise TestSetError(f"{row.place}: contexts[{i}]: is blank")
        _bounded(row, f"contexts[{i}]", part, MAX_CONTEXT_CHARS)
    return tuple(parts)


def _flag(row: _Row, field: str, value: object) -> bool:
    word = str(value).strip().lower()
    if value is None or word in ("false", "0", "0.0", "no"):
        return False
    if word in ("true", "1", "1.0", "yes"):
        return True
    raise TestSetError(f"{row.place}: {field}: expected true or false, got {word[:40]!r}")


def _bounded(row: _Row, field: str, text: str, limit: int) -> str:
    if len(text) > limit:
        raise TestSetError(f"{row.place}: {field}: {len(text):,} characters; at most {limit:,}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TestSetError(f"{row.place}: {field}: half of a surrogate pair at character {e.start}") from None
    return text


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())[:500]


def _kind_of(value: object) -> str:
    names = {
        dict: "an object",
        str: "text",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}") if value is not None else "nothing"


# Files to rows


def _open(spec: str) -> tuple[Iterable[_Row], Iterable[_Row]]:
    """The core rows and the reserve rows of `spec`."""
    if not spec:
        raise TestSetError("no test set is named; give one with --testset or as `testset` in ragate.toml")
    if spec.startswith("datasets:"):
        return _read_dataset(spec), ()
    path = Path(spec)
    if len(path.name) > 255:
        raise TestSetError(f"{spec[:80]}…: no such test set; the name is too long for a file")
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "name one with --testset"
        raise TestSetError(f"{spec}: no such test set; {hint}")
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TestSetError(
            f"{spec}: {path.suffix or 'no suffix'!r} is not a test set; use {', '.join(_SUFFIXES)}"
        )
    return reader(path), ()


def _open_folder(path: Path) -> tuple[Iterable[_Row], Iterable[_Row]]:
    if (path / "core.jsonl").is_file():
        reserve = path / "reserve.jsonl"
        return _read_jsonl(path / "core.jsonl"), _read_jsonl(reserve) if reserve.is_file() else ()
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _read_dataset(f"datasets:{path}"), ()
    raise TestSetError(f"{path}: this folder holds neither core.jsonl nor a saved `datasets` set")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of a UTF-8 file; a byte order mark is skipped, an endless line refused unread."""
    at = 0
    try:
        with path.open("rb") as f:
            number = 0
            while line := f.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise TestSetError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MB")
                yield number, _decode(path, line, number, at)
                at += len(line)
    except OSError as e:
        raise TestSetError(f"{path}: cannot be read: {e.strerror}") from None


def _decode(path: Path, data: bytes, line: int = 1, at: int = 0) -> str:
    """`data`, which begins at line `line` and byte `at` of the file, as text."""
    if at == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TestSetError(f"{path}:1: is UTF-16; save it as UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise TestSetError(
            f"{path}:{line}: byte {at + e.start} (0x{data[e.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if at == 0 else text


def _parse(place: str, text: str) -> object:
    """JSON, or a TestSetError: also for nesting too deep and numbers too long."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise TestSetError(f"{place}: not JSON: {e.msg} at column {e.colno}") from None
    except (ValueError, RecursionError):
        raise TestSetError(
            f"{place}: not JSON that can be read: nested too deep or a number too long"
        ) from None


def _read_jsonl(path: Path) -> Iterator[_Row]:
    for number, text in _read_lines(path):
        if not text.strip():
            continue
        place = f"{path}:{number}"
        record = _parse(place, text.rstrip())
        if not isinstance(record, dict):
            raise TestSetError(f"{place}: expected a JSON object, got {_kind_of(record)}")
        yield _Row(place, record, number)


def _read_json(path: Path) -> Iterator[_Row]:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TestSetError(f"{path}: {size:,} bytes; a .json is read whole, so write this one as .jsonl")
        text = _decode(path, path.read_bytes())
    except OSError as e:
        raise TestSetError(f"{path}: cannot be read: {e.strerror}") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        hint = "; JSON lines belong in a .jsonl" if e.msg == "Extra data" else ""
        raise TestSetError(f"{path}:{e.lineno}: not JSON: {e.msg} at column {e.colno}{hint}") from None
    except (ValueError, RecursionError):
        raise TestSetError(f"{path}: nested too deep or a number too long") from None
    if isinstance(data, dict):
        lists = [data[name] for name in _LISTS if isinstance(data.get(name), list)]
        if len(lists) != 1:
            raise TestSetError(f"{path}: expected a list, or an object with one of {', '.join(_LISTS)}")
        data = lists[0]
    if not isinstance(data, list):
        raise TestSetError(f"{path}: expected a list of objects, got {_kind_of(data)}")
    for i, record in enumerate(data, 1):
        place = f"{path}: item {i}"
        if not isinstance(record, dict):
            raise TestSetError(f"{place}: expected a JSON object, got {_kind_of(record)}")
        yield _Row(place, record)


def _read_csv(path: Path) -> Iterator[_Row]:
    """Rows of a csv with a header, whose commonest of comma, semicolon and tab is the delimiter."""
    lines = _read_lines(path)
    _, header = next(lines, (1, ""))
    delimiter = max(",;\t", key=header.count)
    default = csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process: put back below
    try:
        reader = csv.reader(_chain(header, lines), delimiter=delimiter, strict=True)
        columns = [column.strip() for column in next(reader, [])]
        if len(set(columns)) < len(columns):
            twice = next(c for c in columns if columns.count(c) > 1)
            raise TestSetError(f"{path}:1: the column {twice!r} is there twice")
        first = reader.line_num + 1
        for cells in reader:
            place = f"{path}:{first}"
            if cells and len(cells) != len(columns):
                raise TestSetError(
                    f"{place}: {len(cells)} cells under a header of {len(columns)}; quote commas"
                )
            if cells:
                record = {c: _cell(place, c, v) for c, v in zip(columns, cells, strict=True)}
                yield _Row(place, record, first)
            first = reader.line_num + 1
    except csv.Error as e:
        raise TestSetError(f"{path}:{reader.line_num}: not csv: {e}") from None
    finally:
        csv.field_size_limit(default)


def _chain(header: str, lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    yield header
    for _, text in lines:
        yield text


def _cell(place: str, column: str, text: str) -> object:
    """A cell; where a list belongs and it looks like one, the JSON list that it must be."""
    name = column.lower().replace(" ", "_").replace("-", "_")
    is_list = _FIELD_OF.get(name) == "contexts" or name in ("ground_truths", "sources")
    stripped = text.strip()
    if not (is_list and stripped.startswith("[") and stripped.endswith("]")):
        return text
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        raise TestSetError(
            f"{place}: {column}: looks like a list but is not JSON; write it as JSON"
        ) from None


def _read_parquet(path: Path) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            meta = file.metadata
            unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            if unpacked > MAX_FILE_BYTES:
                raise TestSetError(f"{path}: {unpacked:,} bytes when unpacked; at most {MAX_FILE_BYTES:,}")
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield _Row(f"{path}: row {number}", record)
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise TestSetError(f"{path}: not parquet that can be read: {_one_line(e)}") from None
    except OSError as e:
        raise TestSetError(f"{path}: cannot be read: {e.strerror or _one_line(e)}") from None


def _dataset_parts(spec: str) -> tuple[str, str | None, str | None]:
    """(name, config, split) of `datasets:NAME[[:CONFIG]:SPLIT]`."""
    name, *rest = spec.removeprefix("datasets:").split(":")
    if not name or len(rest) > 2:
        raise TestSetError(
            f"{spec}: expected datasets:NAME, datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT"
        )
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None


def _read_dataset(spec: str) -> Iterator[_Row]:
    name, config, split = _dataset_parts(spec)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    path = Path(name)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, config)
    except Exception as e:  # what it raises is not documented: hub, network, format and script errors
        raise TestSetError(f"{spec}: `datasets` cannot load it: {_one_line(e)}") from None
    if isinstance(data, dict):
        splits = ", ".join(data)
        if split is None and len(data) == 1:
            (split,) = data
        if split not in data:
            raise TestSetError(
                f"{spec}: {'name a split' if split is None else f'no split {split!r}'}; it has {splits}"
            )
        data = data[split]
    elif split is not None:
        raise TestSetError(f"{spec}: this saved set has no splits; leave out {split!r}")
    for number, record in enumerate(data, 1):
        yield _Row(f"{spec}: row {number}", record)
