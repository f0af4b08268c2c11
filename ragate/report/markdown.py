"""The pull-request comment: verdict, a table, the regressed items; every text that is not ours is escaped.

The step summary is the same text with more room. What is escaped formats nothing, links nothing and mentions nobody.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ragate.gate.verdict import points, shorten
from ragate.report.rows import Cell, ItemRow, rows_of
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ragate.gate.baseline import Baseline
    from ragate.gate.verdict import GateResult, MetricVerdict
    from ragate.run import Run, Score

COMMAND = re.compile(r"(`(?:ragate [\w./ -]+|min)`)")
"""A command or a setting in a sentence of ours."""
COMMIT = re.compile(r"(?i)(?<![0-9a-z])[0-9a-f]{7,40}(?![0-9a-z])")
"""What GitHub takes for a commit, and links where there is one."""
LONGEST_COMMENT = 65_536
"""Characters that GitHub takes in one comment."""
LONGEST_SUMMARY = 2**20 // 4
"""Characters that fit into the 1 MiB that GitHub takes as a step summary, whatever they are."""
LONGEST_LIST = 8_000
"""Characters of a list above the items, so that there is room for those and for the footer."""
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
    name = re.sub(r"[^A-Za-z0-9._]+", "-", suite)[:100]
    if name != suite:  # two names must not become one
        name = f"{name.strip('-')}.{hashlib.sha256(suite.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return f"<!-- ragate:{name} -->"


def render_comment(
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: Mapping[str, object] | None = None,
    *,
    report_url: str | None = None,
    commit: str | None = None,
    notes: Sequence[str] = (),
    longest: int = LONGEST_COMMENT,
) -> str:
    """The comment, at most `longest` characters: items are left out until it fits, and it says so.

    `timings` is what `timings.json` beside the run holds; `commit` is the one that was judged; `notes` are sentences
    of the caller that stand below the verdict.
    """
    rows = rows_of(run, baseline)
    regressed = [row for row in rows if row.change == "regressed"]
    errored = [row for row in rows if row.errored and row.change != "regressed"]
    before = [*_opening(run, gate, baseline, notes), *_table(run, gate, baseline), *_power(gate)]
    after = _footer(run, gate, baseline, timings or {}, commit, report_url)
    room = longest - len("\n".join([*before, *after])) - 2
    more = f"[the full report]({report_url})" if _is_link(report_url) else "the report"
    items = []
    for title, listed in (("regressed", regressed), ("without a score", errored)):
        lines = _items(run, title, listed, room - 2, more)
        items += lines
        room -= len("\n".join(lines)) + 1
    return "\n".join([*before, *items, *after]) + "\n"


def escape(text: str, longest: int = 400) -> str:
    """Text of others for the inside of a line: shown as it is, formatting, linking and mentioning nothing."""
    text = _shown(text, longest)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # what Markdown, its tables and GitHub's formulas read
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    # what GitHub links by itself: mentions, issues, addresses; a zero-width space keeps it from matching
    text = re.sub(r"([@#])", r"\1&#8203;", text).replace("://", ":&#8203;//")
    text = re.sub(r":(?=[\w+-]+:)", ":&#8203;", text)  # :emoji:
    # what would begin a list, a rule or a heading where the line begins with it
    text = re.sub(r"^([-+=]|\d+(?=[.)]))", lambda m: f"\\{m[0]}" if m[0] in "-+=" else f"{m[0]}&#8203;", text)
    text = re.sub(r"(?i)(?<![0-9a-z])(www(?=\.)|GH-(?=\d))", r"\1&#8203;", text)
    # a commit is 7 hex digits or more, so that no piece of 6 is one
    return COMMIT.sub(lambda found: re.sub("(.{6})(?=.)", r"\1&#8203;", found[0]), text)


def _commit(commit: str) -> str:
    """The first ten digits of a commit, which GitHub links; what is none is text of others."""
    short = commit[:10]
    return short if COMMIT.fullmatch(short) else escape(short)


def _shown(text: str, longest: int) -> str:
    """`text` on one line of at most `longest` characters; of a megabyte no more is read than may be shown."""
    return shorten(plain(text[: 64 * longest]), longest)


def _opening(run: Run, gate: GateResult | None, baseline: Baseline | None, notes: Sequence[str]) -> list[str]:
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
        lines += [">", *_bounded([f"> - {_prose(reason)}" for reason in gate.reasons], "> - …")]
    # what the verdict's own sentence says already is not said twice
    said = [w for w in gate.warnings if w not in gate.sentence] if gate else []
    listed = [f"> - ⚠️ {_prose(text)}" for text in (*notes, *said)]
    if gate is not None and gate.drift is not None:
        drift = gate.drift.sentence
        if drift.partition(": ")[2] not in gate.sentence:
            listed.append(f"> - against the release: {_prose(drift, 1200)}")
        told = (w for w in gate.drift_warnings if w not in drift)
        listed += [f"> - ⚠️ against the release: {_prose(text)}" for text in told]
    if listed:
        lines += [">", *_bounded(listed, "> - …")]
    return [*lines, ""]


def _bounded(lines: list[str], last: str) -> list[str]:
    """As many of `lines` as fit into a list above the items; `last` says how many more there are."""
    room = LONGEST_LIST
    kept: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            return [*kept, f"{last} and {len(lines) - len(kept)} more in the report"]
        kept.append(line)
    return kept


def _table(run: Run, gate: GateResult | None, baseline: Baseline | None) -> list[str]:
    """A row a metric: those of the run, then those that only the baseline or a floor has."""
    names = ("metric", "base", "head", "delta (90 % interval)", "limit", "p", "items", "verdict")
    lines = [f"| {' | '.join(names)} |", "|:--|--:|--:|--:|--:|--:|--:|:--|"]
    verdicts = {v.metric: v for v in gate.metrics} if gate else {}
    metrics = list(dict.fromkeys((*run.metrics, *verdicts)))
    rows = []
    for metric in metrics:
        verdict = verdicts.get(metric)
        if verdict is not None and verdict.paired:
            base, head = verdict.base_mean, verdict.head_mean
        else:
            base, head = baseline.mean(metric) if baseline else None, run.mean(metric)
        states = {state: n for state, n in run.states(metric).items() if state != "ok"}
        counted = "".join(f", {n} {state}" for state, n in sorted(states.items()))
        limit = verdict.limit if verdict else None
        cells = [
            escape(metric, 60),
            "–" if base is None else f"{base:.3f}",
            "–" if head is None else f"**{head:.3f}**",
            "–" if base is None or head is None else _signed(base - head) + _interval(verdict),
            "–" if limit is None else f"−{points(limit)}{_floor(verdict)}",
            "–" if verdict is None or verdict.p is None or not verdict.drop else _p(verdict.p),
            f"{run.states(metric).get('ok', 0)}{counted}",
            f"{ICONS[verdict.verdict]} {verdict.verdict}" if verdict else "–",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return [*lines, *_bounded(rows, "| …"), ""]


def _interval(verdict: MetricVerdict | None) -> str:
    """The bounds of the change, lower first; nothing where nothing changed."""
    if verdict is None or verdict.lower is None or verdict.upper is None or verdict.drop is None:
        return ""
    low, high = (-100 * bound or 0.0 for bound in (verdict.upper, verdict.lower))
    return f" ({low:+.1f} to {high:+.1f})".replace("-", "−") if low or high else ""


def _floor(verdict: MetricVerdict | None) -> str:
    return "" if verdict is None or verdict.floor is None else f", floor {verdict.floor:g}"


def _power(gate: GateResult | None) -> list[str]:
    """How small a drop this run could show, and how many items a drop of the limit takes."""
    parts = []
    for v in gate.metrics if gate is not None and gate.verdict != "INVALID" else ():
        if not v.detectable or v.items_needed is None or v.limit is None:
            continue
        true = "" if v.detectable_true is None else f", {points(v.detectable_true)} true by this judge"
        needed = f"{points(v.limit)} takes {v.items_needed} items"
        parts.append(f"{escape(v.metric, 60)} {points(v.detectable)}{true} ({needed})")
    return [f"<sub>Drop that this run shows reliably: {'; '.join(parts[:20])}</sub>", ""] if parts else []


def _items(run: Run, title: str, rows: list[ItemRow], room: int, more: str) -> list[str]:
    """A folded list that fits into `room` characters, or nothing."""
    if not rows:
        return []
    scores = {(s.item, s.metric): s for s in run.scores}
    noun = "item" if len(rows) == 1 else "items"
    head = ["<details>", f"<summary>{len(rows)} {noun} {title}</summary>", ""]
    left_out = f"- … and {len(rows)} more, left out because a comment may be only so long: see {more}"
    tail = ["", "</details>", ""]
    room -= len("\n".join([*head, left_out, *tail]))
    lines: list[str] = []
    for row in rows:
        line = _item(row, scores)
        if len(line) + 1 > room:
            lines.append(left_out.replace(str(len(rows)), str(len(rows) - len(lines)), 1))
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
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: Mapping[str, object],
    commit: str | None,
    report_url: str | None,
) -> list[str]:
    parts = [f"judge {escape(run.judge, 80)}", f"fingerprint {run.fingerprint_id}", f"{len(run.items)} items"]
    seconds = timings.get("seconds")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    if isinstance(total, int | float):
        parts.append(f"{total:,.0f} s")
    sent, computed = timings.get("prompt_tokens_sent"), timings.get("prompt_tokens_computed")
    if isinstance(sent, int) and isinstance(computed, int) and 0 <= computed <= sent and sent > 0:
        parts.append(f"{(sent - computed) / sent * 100:.0f} % of the prompt tokens from the cache")
    if commit is not None:
        parts.append(f"of commit {_commit(commit)}")
    if baseline is not None:
        made_at = f"{_commit(baseline.commit)}, " if baseline.commit else ""
        parts.append(f"baseline {made_at}{baseline.date:%Y-%m-%d %H:%M} UTC")
    lines = [f"<sub>{' · '.join(parts)}</sub>", ""]
    if _is_link(report_url):
        lines += [f"[Full report]({report_url})", ""]
    if gate is not None and gate.way_out:
        lines.append(f"{_capital(_prose(gate.way_out))}.")
    elif baseline is None:
        lines.append("`ragate baseline set` makes this run the baseline; commit the file it writes.")
    return lines


def _is_link(url: str | None) -> bool:
    """Whether `url` is a plain web address: nothing that ends the Markdown link it is put into."""
    return url is not None and re.fullmatch(r"https?://[^\s()<>\"'`\\\[\]]{1,2000}", url) is not None


def _prose(text: str, longest: int = 400) -> str:
    """A sentence of ours, which may name items and fields of others: escaped, but our commands stay code."""
    pieces = COMMAND.split(_shown(text, longest))
    return "".join(piece if i % 2 else _keep_ends(piece) for i, piece in enumerate(pieces))


def _keep_ends(text: str) -> str:
    """`escape` without losing the spaces at the ends, which stand beside a command."""
    return " " * text.startswith(" ") + escape(text, len(text)) + " " * text[1:].endswith(" ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _p(p: float) -> str:
    """p as it is printed, three digits where they matter; for Markdown."""
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _signed(drop: float) -> str:
    """The change of a mean: a fall is negative."""
    return "±0.0 pt" if drop == 0 else f"{'−' if drop > 0 else '+'}{points(drop)}"
