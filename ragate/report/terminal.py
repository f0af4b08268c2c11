"""Results in a terminal: a table, the verdict sentence, and what changed between two baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ragate.gate.verdict import points, shorten
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ragate.gate.baseline import BaselineDiff, ItemChange
    from ragate.gate.verdict import GateResult, MetricVerdict
    from ragate.run import Run

STYLES = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow", "INVALID": "bold magenta"}
ICONS = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "INVALID": "∅"}
LISTED = 10
"""Changed items that are listed for each metric."""


def print_run(console: Console, run: Run) -> None:
    """The scores of a run by themselves: metric, mean, number scored, and the states that are not ok."""
    from rich.text import Text

    table = _table(
        f"{run.suite}: {len(run.items)} items, judge {run.judge}", ("metric", "score", "n", "states")
    )
    for metric in run.metrics:
        states = run.states(metric)
        table.add_row(
            Text(plain(metric)), _number(run.mean(metric)), str(states.get("ok", 0)), _bad_states(states)
        )
    console.print(table)
    _print_notes(console, run)


def print_gate(console: Console, run: Run, gate: GateResult) -> None:
    """The run beside its baseline, metric by metric, and the verdict sentence last."""
    from rich.text import Text

    columns = ("metric", "base", "head", "delta", "limit", "n", "states", "verdict")
    table = _table(f"{run.suite}: {len(run.items)} items, judge {run.judge}", columns)
    for verdict in gate.metrics:
        table.add_row(
            Text(plain(verdict.metric)),
            _number(verdict.base_mean),
            _number(verdict.head_mean),
            _delta(verdict.drop),
            "–" if verdict.limit is None else f"−{points(verdict.limit)}",
            str(verdict.paired),
            _bad_states(run.states(verdict.metric)),
            Text(f"{ICONS[verdict.verdict]} {verdict.verdict}", STYLES[verdict.verdict]),
        )
    console.print(table)
    for verdict in gate.metrics:
        if verdict.verdict == "FAIL":
            _print_items(console, f"{verdict.metric}, largest drops", _fallen(verdict))
    _print_notes(console, run)
    for warning in gate.warnings:
        console.print(Text(f"! {plain(warning)}", "yellow"), soft_wrap=True)
    if power := _power(gate):
        console.print(Text(plain(power), "dim"), soft_wrap=True)
    if len(gate.reasons) > 1:
        for reason in gate.reasons:
            console.print(Text(f"  - {plain(reason)}"), soft_wrap=True)
    word, _, sentence = plain(gate.sentence).partition(": ")
    line = Text.assemble((f"{ICONS[gate.verdict]} {word}", STYLES[gate.verdict]), ": ", sentence)
    console.print(line, soft_wrap=True)
    if gate.way_out:
        console.print(Text(f"  {plain(gate.way_out)}", "dim"), soft_wrap=True)


def _power(gate: GateResult) -> str:
    """How small a drop this run could see, and what it takes to see one of the limit; empty where nothing scattered."""
    parts = []
    for v in gate.metrics if gate.verdict != "INVALID" else ():
        if not v.detectable or v.items_needed is None or v.limit is None:
            continue
        true = "" if v.detectable_true is None else f", {points(v.detectable_true)} true by this judge"
        parts.append(
            f"{v.metric} {points(v.detectable)}{true} ({points(v.limit)} takes {v.items_needed} items)"
        )
    return f"detectable drop: {'; '.join(parts)}" if parts else ""


def print_baseline_diff(console: Console, diff: BaselineDiff) -> None:
    """What changed from one baseline to another: means, items, fingerprint, test set."""
    from rich.text import Text

    table = _table(f"{diff.suite}: baselines", ("metric", "old", "new", "change", "items changed"))
    for metric in diff.metrics:
        change = None if metric.change is None else -metric.change
        cells = (_number(metric.old_mean), _number(metric.new_mean), _delta(change))
        table.add_row(Text(plain(metric.metric)), *cells, str(len(metric.changed)))
    console.print(table)
    for metric in diff.metrics:
        _print_items(console, f"{metric.metric}, changed items", list(metric.changed))
    for field in diff.fingerprint:
        old, new = (shorten(plain(value or "none"), 60) for value in (field.old, field.new))
        console.print(Text(f"fingerprint: {plain(field.field)}: {old} -> {new}"), soft_wrap=True)
    if diff.testset_changed:
        text = f"the test set changed: {len(diff.added)} items added, {len(diff.removed)} removed"
        console.print(Text(text, "yellow"), soft_wrap=True)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=Text(plain(title)),
        title_justify="left",
        title_style="bold",
    )
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in ("metric", "states", "verdict") else "right"
        # where the terminal is narrow only the states wrap: a number is never cut
        table.add_column(name, justify=justify, no_wrap=name != "states")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _delta(drop: float | None) -> str:
    """A drop as a change: a fall is negative."""
    if drop is None:
        return "–"
    return "0.0 pt" if drop == 0 else f"{'−' if drop > 0 else '+'}{points(drop)}"


def _bad_states(states: dict[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in sorted(states.items()) if state != "ok") or "all ok"


def _fallen(verdict: MetricVerdict) -> list[ItemChange]:
    return [change for change in verdict.changed if change.drop > 0]


def _print_items(console: Console, title: str, changes: list[ItemChange]) -> None:
    from rich.text import Text

    if not changes:
        return
    console.print(Text(plain(title), "bold"), soft_wrap=True)
    for change in changes[:LISTED]:
        style = "red" if change.drop > 0 else "green"
        item = shorten(plain(change.item), 60)
        console.print(
            Text.assemble(f"  {item}  ", (f"{change.base:.2f} -> {change.head:.2f}", style)), soft_wrap=True
        )
    if len(changes) > LISTED:
        console.print(Text(f"  … and {len(changes) - LISTED} more", "dim"), soft_wrap=True)


def _print_notes(console: Console, run: Run) -> None:
    from rich.text import Text

    if run.partial:
        console.print(
            Text("PARTIAL: the run was stopped early; `ragate eval` resumes it", "bold yellow"),
            soft_wrap=True,
        )
    if run.judge_note:
        console.print(Text(f"! {plain(run.judge_note)}", "yellow"), soft_wrap=True)
