"""Results in a terminal: a table as wide as there is room, the verdict sentence, what changed between baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ragate.gate.verdict import chance, points, shorten
from ragate.report.charts import intervals
from ragate.report.untrusted import plain
from ragate.report.why import said

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ragate.gate.baseline import BaselineDiff, ItemChange
    from ragate.gate.verdict import GateResult, MetricVerdict
    from ragate.report.charts import Interval
    from ragate.run import Run

STYLES = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow", "INVALID": "bold magenta"}
ICONS = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "INVALID": "∅"}
LISTED = 10
"""Changed items that are listed for each metric."""
NARROWEST_DRAWING, WIDEST_DRAWING = 12, 32
"""Characters."""


def print_run(console: Console, run: Run) -> None:
    """The scores of a run by themselves: metric, mean, number scored, and the states that are not ok."""
    from rich.text import Text

    table = table_of(_title(run), ("metric", "score", "scored", "without a score"))
    for metric in run.metrics:
        states = run.states(metric)
        table.add_row(
            Text(plain(metric)),
            number(run.mean(metric)),
            str(states.get("ok", 0)),
            _bad_states(states) or "none",
        )
    console.print(table)
    console.print()
    _print_notes(console, run)


def print_gate(console: Console, run: Run, gate: GateResult) -> None:
    """The run beside its baseline, metric by metric, and the verdict sentence last.

    Narrow terminals (80) get means, change, limit, interval and verdict; wider ones also counts, p and a drawing.
    """
    from rich.text import Text

    console.print(_gate_table(console, run, gate))
    for verdict in gate.metrics:
        if verdict.verdict == "FAIL":
            print_items(console, f"{verdict.metric}, largest drops", _fallen(verdict), run)
    console.print()
    for metric in run.metrics:
        if bad := _bad_states(run.states(metric)):
            _say(console, Text(f"! {plain(metric)}: {bad} without a score", "yellow"))
    _print_notes(console, run)
    for warning in gate.warnings:
        _say(console, Text(f"! {plain(warning)}", "yellow"))
    if power := _power(gate):
        _say(console, Text(plain(power), "dim"))
    if gate.drift is not None:
        _say(console, Text.assemble("against the release: ", _sentence(gate.drift)))
        for warning in gate.drift_warnings:
            if warning not in gate.drift.sentence:
                _say(console, Text(f"! against the release: {plain(warning)}", "yellow"))
    if len(gate.reasons) > 1:
        for reason in gate.reasons:
            _say(console, Text(f"- {plain(reason)}"), 2)
    _say(console, _sentence(gate))
    if gate.way_out:
        _say(console, Text(plain(gate.way_out), "dim"), 2)


def _say(console: Console, text: Text, indent: int = 0) -> None:
    """A sentence: wrapped between words for a person, on one line for a program."""
    from rich.padding import Padding
    from rich.text import Text

    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)), soft_wrap=False)
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)


def _title(run: Run) -> str:
    return f"{shorten(plain(run.suite), 40)}: {len(run.items)} items, judge {shorten(plain(run.judge), 40)}"


def _sentence(gate: GateResult) -> Text:
    from rich.text import Text

    word, _, sentence = plain(gate.sentence).partition(": ")
    return Text.assemble((f"{ICONS[gate.verdict]} {word}", STYLES[gate.verdict]), ": ", sentence)


def _gate_table(console: Console, run: Run, gate: GateResult) -> Table:
    """As many columns as there is room for: what decides first, what explains next, a drawing last."""
    from rich.text import Text

    room = console.width - 64
    columns = ["metric", "base", "now", "change\npt", "limit\npt"]
    extra = [("interval\nof the drop", 14), ("items", 7), ("p", 9), ("broke/\nmended", 9)]
    for name, width in extra:
        if room < width:
            break
        columns.append(name)
        room -= width
    drawing = min(room - 2, WIDEST_DRAWING) if len(columns) == 5 + len(extra) else 0
    if drawing >= NARROWEST_DRAWING:
        columns.append("drop beside limit")
    table = table_of(_title(run), (*columns, "verdict"))
    drawn = intervals(gate.metrics)
    for v in gate.metrics:
        cells: dict[str, str | Text] = {
            "metric": plain(v.metric),
            "base": number(v.base_mean),
            "now": number(v.head_mean),
            "change\npt": in_points(None if v.drop is None else -v.drop, sign=True),
            "limit\npt": in_points(None if v.limit is None else -v.limit),
            "interval\nof the drop": _bounds(v),
            "items": f"{v.paired:,}",
            "p": "–" if v.p is None else chance(v.p),
            "broke/\nmended": f"{v.items_broken}/{v.items_mended}",
            "drop beside limit": _drawing(drawn.get(v.metric), drawing, STYLES[v.verdict]),
            "verdict": Text(f"{ICONS[v.verdict]} {v.verdict}", STYLES[v.verdict]),
        }
        table.add_row(*(cells[name] for name in (*columns, "verdict")))
    return table


def _bounds(v: MetricVerdict) -> str:
    if v.lower is None or v.upper is None:
        return "–"
    return f"{in_points(v.lower)} to {in_points(v.upper)}"


def _drawing(interval: Interval | None, width: int, style: str) -> Text:
    """The drop (●) with its bounds (━), zero (│) and the limit (┊) on one axis for all metrics."""
    from rich.text import Text

    if interval is None or width <= 0:
        return Text("")
    place = [round(share * (width - 1)) for share in interval]
    zero, limit, drop, lower, upper = place
    text = Text()
    for at in range(width):
        if at == drop:
            text.append("●", style)
        elif at == limit:
            text.append("┊", "red")
        elif lower <= at <= upper:
            text.append("━", style)
        elif at == zero:
            text.append("│", "dim")
        else:
            text.append("─", "dim red" if at > limit else "dim")
    return text


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

    title = f"{shorten(plain(diff.suite), 40)}: baselines"
    table = table_of(title, ("metric", "old", "new", "change\npt", "items changed"))
    for metric in diff.metrics:
        cells = (number(metric.old_mean), number(metric.new_mean), in_points(metric.change, sign=True))
        table.add_row(Text(plain(metric.metric)), *cells, str(len(metric.changed)))
    console.print(table)
    for metric in diff.metrics:
        print_items(console, f"{metric.metric}, changed items", list(metric.changed))
    console.print()
    for field in diff.fingerprint:
        old, new = (shorten(plain(value or "none"), 60) for value in (field.old, field.new))
        console.print(Text(f"fingerprint: {plain(field.field)}: {old} -> {new}"), soft_wrap=True)
    if diff.moved:
        noun = "item" if len(diff.moved) == 1 else "items"
        named = ", ".join(shorten(plain(item), 40) for item in diff.moved[:3])
        more = f" and {len(diff.moved) - 3} more" if len(diff.moved) > 3 else ""
        text = f"{len(diff.moved)} {noun} changed cluster: {named}{more}"
        console.print(Text(text, "yellow"), soft_wrap=True)
    if diff.testset_changed:
        text = f"the test set changed: {len(diff.added)} items added, {len(diff.removed)} removed"
        console.print(Text(text, "yellow"), soft_wrap=True)


def table_of(title: str, columns: tuple[str, ...]) -> Table:
    """An empty table in our style; no cell of it is ever cut or wrapped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title=Text(plain(title)),
        title_justify="left",
        title_style="bold",
    )
    for name in columns:
        left = name in ("metric", "item", "without a score", "drop beside limit", "verdict")
        justify: Literal["left", "right"] = "left" if left else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def number(value: float | None) -> str:
    """A score or a mean; `–` where there is none."""
    return "–" if value is None else f"{value:.3f}"


def in_points(value: float | None, *, sign: bool = False) -> str:
    """A difference of scores in points with one digit: −11.3; `sign` marks a rise with +."""
    if value is None:
        return "–"
    text = f"{value * 100:+.1f}" if sign else f"{value * 100:.1f}"
    # a change too small to be seen is not shown as none
    if value and not text.strip("+-0."):
        return "−0.0" if value < 0 else "+0.0" if sign else "0.0"
    return "0.0" if not value else text.replace("-", "−")


def _bad_states(states: dict[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in sorted(states.items()) if state != "ok")


def _fallen(verdict: MetricVerdict) -> list[ItemChange]:
    return [change for change in verdict.changed if change.drop > 0]


def print_items(console: Console, title: str, changes: list[ItemChange], run: Run | None = None) -> None:
    """The first changed items, one a line, with the judge's reason where the run is given."""
    from rich.text import Text

    if not changes:
        return
    metric = title.partition(",")[0]
    console.print(Text(f"\n{plain(title)}", "bold"), soft_wrap=True)
    for change in changes[:LISTED]:
        style = "red" if change.drop > 0 else "green"
        item = shorten(plain(change.item), 60)
        line = Text.assemble(f"  {item}  ", (f"{change.base:.2f} -> {change.head:.2f}", style))
        score = run.score(change.item, metric) if run else None
        reason = said(metric, score.claims, better=change.drop < 0) if score else None
        if reason:
            claim = f"“{shorten(plain(reason.claim), 80)}” " if reason.claim else ""
            line.append(f"  {claim}{shorten(plain(reason.reason), 200)}", "dim")
        # a line each: the reason is cut where a person's terminal ends
        line.truncate(max(console.width, 60) if console.is_terminal else 240, overflow="ellipsis")
        console.print(line, soft_wrap=True)
    if len(changes) > LISTED:
        console.print(Text(f"  … and {len(changes) - LISTED} more", "dim"), soft_wrap=True)


def _print_notes(console: Console, run: Run) -> None:
    from rich.text import Text

    if run.partial:
        _say(console, Text("PARTIAL: the run was stopped early; `ragate eval` resumes it", "bold yellow"))
    if run.judge_note:
        _say(console, Text(f"! {plain(run.judge_note)}", "yellow"))
