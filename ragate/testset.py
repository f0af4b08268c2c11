"""Test sets: `Item`s read from json, jsonl, csv, parquet, a folder or a `datasets` name, with exact error places."""

from __future__ import annotations

from ragate.run import Frozen


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
