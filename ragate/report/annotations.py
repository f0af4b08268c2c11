"""Annotations for GitHub Actions: workflow commands that mark the test-set lines of the items that broke."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ragate.errors import EXIT_PASS
from ragate.gate.baseline import SAME
from ragate.gate.verdict import BROKEN, INTACT, shorten
from ragate.report.rows import rows_of
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from ragate.gate.baseline import Baseline
    from ragate.gate.verdict import GateResult
    from ragate.report.rows import ItemRow
    from ragate.run import ItemRecord, Run

Level = Literal["error", "warning", "notice"]
SHOWN = 10
"""Annotations of each level that GitHub shows of one step; the rest it drops without a word."""
LONGEST = 1_000
"""Characters of a message."""


def render_annotations(
    run: Run, gate: GateResult | None, baseline: Baseline | None, workspace: Path | None = None
) -> str:
    """The workflow commands, one a line: the verdict, then the items, largest drop first, at most `SHOWN` a level.

    Items that fell on a metric that FAILs are errors, others warnings; of a run that passes only those that broke
    (0.8 or more to 0.2 or less) are marked. Paths are relative to `workspace`, the checkout; an item whose test set
    is no text file in it is marked without a place.
    """
    level, title, message = _verdict(gate)
    failed = {v.metric for v in gate.metrics if v.verdict == "FAIL"} if gate else set()
    marked: dict[Level, list[ItemRow]] = {"error": [], "warning": []}
    for row in rows_of(run, baseline):
        fell = {c.metric for c in row.cells if c.drop is not None and c.drop > 0}
        if fell & failed:
            marked["error"].append(row)
        elif fell and (gate is None or gate.verdict != "PASS" or _broke(row)):
            marked["warning"].append(row)
    lines: list[str] = []
    for kind, rows in marked.items():
        room = SHOWN - (kind == level)
        lines += [_item(kind, row, run, workspace) for row in rows[:room]]
        if len(rows) > room:
            message += f"; {room} of {len(rows)} items are marked, the report has all"
    if run.partial:
        message = f"PARTIAL: {message}"
    return "\n".join([command(level, message, title=f"{title}: {run.suite}"), *lines]) + "\n"


def command(level: Level, message: str, **properties: str | int | None) -> str:
    """One workflow command, escaped as actions/toolkit does it: nothing in it begins another or ends its line."""
    told = ",".join(f"{k}={_property(plain(str(v)))}" for k, v in properties.items() if v is not None)
    return f"::{level} {told}::{_data(shorten(plain(message), LONGEST))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(shorten(text, LONGEST)).replace(":", "%3A").replace(",", "%2C")


def _verdict(gate: GateResult | None) -> tuple[Level, str, str]:
    """Level, title and message of the verdict itself."""
    if gate is None:
        return "error", "RAG gate INVALID", "no baseline to compare with; `ragate baseline set` makes one"
    _, _, sentence = gate.sentence.partition(": ")
    level: Level = (
        "error" if gate.exit_code != EXIT_PASS else "notice" if gate.verdict == "PASS" else "warning"
    )
    way_out = f"; {gate.way_out}" if gate.way_out else ""
    return level, f"RAG gate {gate.verdict}", f"{shorten(plain(sentence), 600)}{way_out}"


def _broke(row: ItemRow) -> bool:
    return any(
        c.base is not None and c.value is not None and c.base >= INTACT - SAME and c.value <= BROKEN + SAME
        for c in row.cells
    )


def _item(level: Level, row: ItemRow, run: Run, workspace: Path | None) -> str:
    fallen = sorted(
        (c for c in row.cells if c.drop is not None and c.drop > 0), key=lambda c: -(c.drop or 0.0)
    )
    changes = ", ".join(f"{plain(c.metric)} {c.base:.2f} to {c.value:.2f}" for c in fallen)
    scores = {s.metric: s for s in run.scores if s.item == row.item.id}
    told = scores.get(fallen[0].metric)
    against = next((c.reason for c in told.claims if c.verdict != 1 and c.reason), "") if told else ""
    place = place_of(run.testset, row.item, workspace)
    message = f"{changes}: {shorten(plain(row.item.question), 300)}" + (f" ({against})" if against else "")
    file, line = place if place else (None, None)
    return command(level, message, file=file, line=line, title=f"{shorten(plain(row.item.id), 80)} got worse")


def file_of(run: Run) -> str | None:
    """The test set's text file as the run names it, where it is one; of a folder its core.jsonl."""
    path = Path(run.testset)
    file = path / "core.jsonl" if os.path.isdir(path) else path
    return file.as_posix() if os.path.isfile(file) else None


def place_of(testset: str, item: ItemRecord, workspace: Path | None = None) -> tuple[str, int] | None:
    """(path relative to `workspace`, line) of an item of the test set at `testset`, where both are known and there.

    `workspace` is the current folder where it is not given. In a folder the item is looked for in reserve.jsonl and
    core.jsonl by what the line holds: a mark on a wrong line is worse than none.
    """
    if item.line is None:
        return None
    path = Path(testset)
    if os.path.isdir(path):  # not path.is_dir(): what is no name of a file at all would raise
        # a reserve item may stand in either: in core.jsonl by its column
        names = ("reserve.jsonl", "core.jsonl") if item.reserve else ("core.jsonl",)
        path = next((path / name for name in names if _holds(path / name, item)), path)
    if not os.path.isfile(path):
        return None
    relative = os.path.relpath(path.resolve(), (workspace or Path.cwd()).resolve())
    return None if relative.startswith("..") else (Path(relative).as_posix(), item.line)


def _holds(file: Path, item: ItemRecord) -> bool:
    """Whether line `item.line` of `file` is a row with the item's question."""
    try:
        with file.open("rb") as lines:
            row = json.loads(next(islice(lines, (item.line or 1) - 1, None), b""))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and item.question in row.values()
