"""`ragate compare`: two stored runs side by side: their means, what made them, and the items that changed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ragate.gate.baseline import FieldDiff, baseline_of, diff_fields
from ragate.gate.verdict import MetricVerdict, chance, decide, shorten
from ragate.report.diff import context_changes
from ragate.report.rows import ItemRow, rows_of
from ragate.report.terminal import in_points, number, table_of
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ragate.run import Run


class ItemDiff(NamedTuple):
    """An item of both runs of which anything changed."""

    row: ItemRow
    answer_changed: bool
    contexts_new: int
    """Contexts that only the second run retrieved."""

    @property
    def size(self) -> float:
        """The largest change of a score, whichever way."""
        return max((abs(c.drop) for c in self.row.cells if c.drop is not None), default=0.0)


class Comparison(NamedTuple):
    """Two runs side by side; it is no verdict, and runs that a gate would not compare are shown all the same."""

    first: Run
    second: Run
    metrics: tuple[MetricVerdict, ...]
    """Of both runs; their verdicts mean nothing here."""
    fields: tuple[FieldDiff, ...]
    """What differs of the fingerprint."""
    items: tuple[ItemDiff, ...]
    """Largest drop first, then those that rose, then those of which only texts changed."""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare(first: Run, second: Run) -> Comparison:
    """What changed from the first run to the second. Raises BaselineError for scores outside [0, 1]."""
    whole = first.model_copy(update={"partial": False})
    base = baseline_of(whole, commit=None, date=datetime(2000, 1, 1, tzinfo=UTC))
    metrics = [metric for metric in first.metrics if metric in second.metrics]
    verdicts = decide(base, second, metrics=metrics).metrics if metrics else ()
    before = {item.id: item for item in first.items}
    diffs = []
    for row in rows_of(second, base, metrics) if metrics else ():
        old = before.get(row.item.id)
        if old is None:
            continue
        new = sum(change.old is None for change in context_changes(old.contexts, row.item.contexts))
        diff = ItemDiff(row, old.answer != row.item.answer, new)
        ended_otherwise = any(c.base_state != c.state for c in row.cells)
        if row.change in ("regressed", "fixed") or ended_otherwise or diff.answer_changed or new:
            diffs.append(diff)
    order = ("regressed", "fixed", "unchanged", "new")
    diffs.sort(key=lambda diff: (order.index(diff.row.change), -diff.size))
    after = {item.id for item in second.items}
    return Comparison(
        first=first,
        second=second,
        metrics=verdicts,
        fields=diff_fields(first.fingerprint, second.fingerprint),
        items=tuple(diffs),
        only_first=tuple(item for item in before if item not in after),
        only_second=tuple(item.id for item in second.items if item.id not in before),
    )


def as_data(found: Comparison) -> dict[str, Any]:
    """For `--format json`."""
    return {
        "metrics": [
            {
                "metric": v.metric,
                "first": v.base_mean,
                "second": v.head_mean,
                "drop": v.drop,
                "lower": v.lower,
                "upper": v.upper,
                "p": v.p,
                "paired": v.paired,
                "broke": v.items_broken,
                "mended": v.items_mended,
            }
            for v in found.metrics
        ],
        "fingerprint": [field.model_dump() for field in found.fields],
        "items": [
            {
                "item": diff.row.item.id,
                "question": diff.row.item.question,
                "change": diff.row.change,
                "answer_changed": diff.answer_changed,
                "contexts_new": diff.contexts_new,
                "scores": {c.metric: {"first": c.base, "second": c.value} for c in diff.row.cells},
            }
            for diff in found.items
        ],
        "only_first": found.only_first,
        "only_second": found.only_second,
    }


def print_compare(console: Console, found: Comparison, names: tuple[str, str], listed: int) -> None:
    """Means with their change and its interval, then the items that changed, at most `listed` of them (0: all)."""
    from rich.text import Text

    for letter, name, run in zip("AB", names, (found.first, found.second), strict=True):
        what = f"{len(run.items)} items, judge {shorten(plain(run.judge), 40)}"
        partial = ", PARTIAL" if run.partial else ""
        console.print(Text.assemble((letter, "bold"), f"  {shorten(plain(name), 60)}: {what}{partial}"))
    console.print()
    table = table_of("", ("metric", "A", "B", "change\npt", "interval", "p", "fell", "rose"))
    table.title = None
    for v in found.metrics:
        fell = sum(change.drop > 0 for change in v.changed)
        # a change is B less A, a drop is the other way round
        interval = "–" if v.lower is None or v.upper is None else f"{_change(v.upper)} to {_change(v.lower)}"
        table.add_row(
            Text(plain(v.metric)),
            number(v.base_mean),
            number(v.head_mean),
            Text(in_points(None if v.drop is None else -v.drop, sign=True), _style(v.drop)),
            interval,
            "–" if v.p_alone is None else chance(v.p_alone),
            str(fell),
            str(len(v.changed) - fell),
        )
    console.print(table)
    console.print()
    for field in found.fields:
        old, new = (shorten(plain(value or "none"), 40) for value in (field.old, field.new))
        console.print(Text(f"! {plain(field.field)} differs: A {old}, B {new}", "yellow"))
    for letter, only in (("A", found.only_first), ("B", found.only_second)):
        if only:
            console.print(Text(f"! {len(only)} items are only in {letter}", "yellow"))
    _print_diffs(console, found, listed)


def _print_diffs(console: Console, found: Comparison, listed: int) -> None:
    from rich.text import Text

    if not found.items:
        console.print(Text("no item of both changed", "dim"))
        return
    metrics = [v.metric for v in found.metrics]
    heads = [plain(metric).replace("_", "\n", 1) for metric in metrics]
    table = table_of("items that changed", ("item", *heads, "answer", "contexts"))
    room = console.width - 12 * len(metrics) - 9 - 9
    shown = found.items[: listed or None]
    for diff in shown:
        table.add_row(
            Text(shorten(plain(diff.row.item.id), max(room, 12))),
            *(_cell(cell.base, cell.value, cell.drop) for cell in diff.row.cells),
            Text("changed" if diff.answer_changed else ""),
            Text(f"{diff.contexts_new} new" if diff.contexts_new else ""),
        )
    console.print(table)
    if more := len(found.items) - len(shown):
        console.print(Text(f"… and {more} more: --items 0 lists all", "dim"))


def _cell(base: float | None, value: float | None, drop: float | None) -> Text:
    """`1.00→0.25`, or nothing where the score stayed."""
    from rich.text import Text

    if drop == 0 or (base is None and value is None):
        return Text("·", "dim")
    old, new = ("–" if score is None else f"{score:.2f}" for score in (base, value))
    return Text(f"{old}→{new}", _style(drop))


def _change(drop: float) -> str:
    return in_points(-drop if drop else 0.0, sign=True)


def _style(drop: float | None) -> str:
    return "" if not drop else "red" if drop > 0 else "green"
