"""The pull-request comment: verdict, a table, the regressed items; every text that is not ours is escaped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ragate.gate.verdict import points, shorten
from ragate.report.rows import Cell, ItemRow, rows_of
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from ragate.gate.baseline import Baseline
    from ragate.gate.verdict import GateResult
    from ragate.run import Run, Score

COMMAND = re.compile(r"(`ragate [a-z ]+`)")
"""A command in a sentence of ours."""
LONGEST_COMMENT = 65_536
"""Characters that GitHub takes in one comment."""
ALERTS = {
    "PASS": ("TIP", "✅"),
    "FAIL": ("CAUTION", "❌"),
    "INCONCLUSIVE": ("WARNING", "❔"),
    "INVALID": ("IMPORTANT", "⛔"),
    "NO BASELINE": ("NOTE", "➖"),
    "NO VERDICT": ("NOTE", "➖"),
}
ICONS = {verdict: icon for verdict, (_, icon) in ALERTS.items()}


def comment_marker(suite: str) -> str:
    """The hidden line by which the comment of a suite is found again and replaced."""
    return f"<!-- ragate:{re.sub(r'[^A-Za-z0-9._]+', '-', suite)[:100]} -->"


def render_comment(
    run: Run, gate: GateResult | None, baseline: Baseline | None, *, report_url: str | None = None
) -> str:
    """The comment, at most `LONGEST_COMMENT` characters: items are left out until it fits, and it says so."""
    rows = rows_of(run, baseline)
    regressed = [row for row in rows if row.change == "regressed"]
    errored = [row for row in rows if row.errored and row.change != "regressed"]
    before = [*_opening(run, gate, baseline), *_table(run, gate, baseline)]
    after = _footer(run, gate, baseline, report_url)
    room = LONGEST_COMMENT - len("\n".join([*before, *after])) - 2
    items = []
    for title, listed in (("regressed", regressed), ("without a score", errored)):
        lines = _items(run, title, listed, room - 2)
        items += lines
        room -= len("\n".join(lines)) + 1
    return "\n".join([*before, *items, *after]) + "\n"


def escape(text: str, longest: int = 400) -> str:
    """Text of others for the inside of a line: shown as it is, formatting, linking and mentioning nothing."""
    text = shorten(plain(text), longest)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # what Markdown, its tables and GitHub's formulas read
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    # what GitHub links by itself: mentions, issues and addresses; a zero-width space keeps it from matching
    text = re.sub(r"([@#])", r"\1&#8203;", text).replace("://", ":&#8203;//")
    return re.sub(r"(?i)\b(www(?=\.)|GH-(?=\d))", r"\1&#8203;", text)


def _opening(run: Run, gate: GateResult | None, baseline: Baseline | None) -> list[str]:
    word = gate.verdict if gate else "NO VERDICT" if baseline else "NO BASELINE"
    alert, icon = ALERTS[word]
    if gate is not None:
        sentence = gate.sentence.removeprefix(f"{gate.verdict}: ")
    elif baseline is not None:
        sentence = "scores beside the baseline; no verdict was asked for"
    else:
        sentence = "no baseline yet, so there is nothing to compare with and no verdict"
    partial = "PARTIAL " if run.partial else ""
    lines = [
        comment_marker(run.suite),
        f"> [!{alert}]",
        f"> **{icon} {partial}{word}** {escape(run.suite, 80)}: {_prose(sentence, 1200)}",
    ]
    if run.judge_note:
        lines += [">", f"> ⚠️ {escape(run.judge_note)}"]
    if gate is not None and len(gate.reasons) > 1:
        lines += [">", *(f"> - {_prose(reason)}" for reason in gate.reasons[:20])]
    return [*lines, ""]


def _table(run: Run, gate: GateResult | None, baseline: Baseline | None) -> list[str]:
    lines = ["| metric | base | head | delta | limit | items | verdict |", "|:--|--:|--:|--:|--:|--:|:--|"]
    verdicts = {v.metric: v for v in gate.metrics} if gate else {}
    for metric in run.metrics:
        verdict = verdicts.get(metric)
        if verdict is not None and verdict.paired:
            base, head, limit = verdict.base_mean, verdict.head_mean, verdict.limit
        else:
            base, head, limit = baseline.mean(metric) if baseline else None, run.mean(metric), None
        states = {state: n for state, n in run.states(metric).items() if state != "ok"}
        counted = "".join(f", {n} {state}" for state, n in sorted(states.items()))
        cells = [
            escape(metric, 60),
            "–" if base is None else f"{base:.3f}",
            "–" if head is None else f"**{head:.3f}**",
            "–" if base is None or head is None else _signed(base - head),
            "–" if limit is None else f"−{points(limit)}",
            f"{run.states(metric).get('ok', 0)}{counted}",
            f"{ICONS[verdict.verdict]} {verdict.verdict}" if verdict else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _items(run: Run, title: str, rows: list[ItemRow], room: int) -> list[str]:
    """A folded list that fits into `room` characters, or nothing."""
    if not rows:
        return []
    scores = {(s.item, s.metric): s for s in run.scores}
    noun = "item" if len(rows) == 1 else "items"
    head = ["<details>", f"<summary>{len(rows)} {noun} {title}</summary>", ""]
    left_out = f"- … and {len(rows)} more in the report"
    tail = ["", "</details>", ""]
    room -= len("\n".join([*head, left_out, *tail]))
    lines: list[str] = []
    for row in rows:
        line = _item(row, scores)
        if len(line) + 1 > room:
            lines.append(f"- … and {len(rows) - len(lines)} more in the report")
            break
        lines.append(line)
        room -= len(line) + 1
    return [*head, *lines, *tail] if room >= 0 else []


def _item(row: ItemRow, scores: dict[tuple[str, str], Score]) -> str:
    """One item in one line: id, question, what changed, and the judge's reason for the worst of it."""
    told = [c for c in row.cells if c.state != "ok" or (c.drop is not None and c.drop > 0)]
    told.sort(key=lambda c: -(c.drop if c.drop is not None else 2.0))
    changes = "; ".join(_change(c) for c in told)
    critical = " ⭐ critical" if row.item.critical else ""
    line = f"- **{escape(row.item.id, 80)}**{critical} {escape(row.item.question, 160)}<br>{changes}"
    reason = _reason(told[0], scores.get((row.item.id, told[0].metric))) if told else ""
    return f"{line}<br>{escape(reason, 240)}" if reason else line


def _change(cell: Cell) -> str:
    before = "–" if cell.base is None else f"{cell.base:.2f}"
    after = f"{cell.value:.2f}" if cell.value is not None else cell.state
    return f"{escape(cell.metric, 60)} {before} → {after}"


def _reason(cell: Cell, score: Score | None) -> str:
    """Why the judge scored low: its first reason against; or the error where there is no score."""
    if cell.error:
        return cell.error
    against = [claim for claim in score.claims if claim.verdict != 1 and claim.reason] if score else []
    if not against:
        return ""
    claim = against[0].text or (f"context {against[0].context + 1}" if against[0].context is not None else "")
    return f"“{shorten(claim, 100)}” {against[0].reason}" if claim else against[0].reason


def _footer(
    run: Run, gate: GateResult | None, baseline: Baseline | None, report_url: str | None
) -> list[str]:
    parts = [f"judge {escape(run.judge, 80)}", f"fingerprint {run.fingerprint_id}", f"{len(run.items)} items"]
    if baseline is not None:
        commit = f"{escape(baseline.commit[:10])}, " if baseline.commit else ""
        parts.append(f"baseline {commit}{baseline.date:%Y-%m-%d %H:%M} UTC")
    lines = [f"<sub>{' · '.join(parts)}</sub>", ""]
    if report_url is not None and re.fullmatch(r"https?://[^\s()<>\"'`\\]+", report_url):
        lines += [f"[Full report]({report_url})", ""]
    if gate is not None and gate.way_out:
        lines.append(f"{_capital(_prose(gate.way_out))}.")
    elif baseline is None:
        lines.append("`ragate baseline set` makes this run the baseline; commit the file it writes.")
    return lines


def _prose(text: str, longest: int = 400) -> str:
    """A sentence of ours, which may name items and fields of others: escaped, but our commands stay code."""
    pieces = COMMAND.split(shorten(plain(text), longest))
    return "".join(piece if i % 2 else _keep_ends(piece) for i, piece in enumerate(pieces))


def _keep_ends(text: str) -> str:
    """`escape` without losing the spaces at the ends, which stand beside a command."""
    return " " * text.startswith(" ") + escape(text, len(text)) + " " * text[1:].endswith(" ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _signed(drop: float) -> str:
    """The change of a mean: a fall is negative."""
    return "±0.0 pt" if drop == 0 else f"{'−' if drop > 0 else '+'}{points(drop)}"
