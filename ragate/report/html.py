"""The HTML report: one self-contained page made from a run, its verdict and its baseline.

Everything that came from a test set, a system under test or a judge is untrusted: it reaches the page only
through jinja2's autoescape, and the page's content security policy lets no script run but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from functools import lru_cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ragate import __version__
from ragate.gate.baseline import SAME, diff_fields, mean
from ragate.gate.verdict import SEVERITY, chance, points, shorten
from ragate.report.charts import Interval, distribution, intervals
from ragate.report.diff import context_changes, word_diff
from ragate.report.rows import ItemRow, rows_of
from ragate.report.untrusted import visible
from ragate.report.why import CLASSES, Passages, classes_of, why
from ragate.report.words import WORDS, words_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Environment
    from markupsafe import Markup

    from ragate.gate.baseline import Baseline
    from ragate.gate.verdict import GateResult, MetricVerdict
    from ragate.report.why import Scores
    from ragate.run import Claim, ItemRecord, Run, Score

BYTES_PER_ITEM = 20_000
"""The page stays below this (2 MB for 100 items); to that end long texts are cut to the first that fits of"""
LONGEST_TEXTS = (8_000, 4_000, 2_000, 1_000, 500)
"""characters, and say how many more run.json has."""
DOLLARS_IN, DOLLARS_OUT = 0.15, 0.60
"""For a million tokens: the list price of GPT-4o mini, a usual judge behind an API, at its release in 2024."""
QUOTED = 40
"""Characters from which a text of the item is shown once and referred to where a judge call repeats it."""

TONES = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "open", "INVALID": "invalid"}


def render_html(
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: dict[str, Any] | None,
    before: Run | None = None,
) -> str:
    """The page, as text to be written to one file.

    `timings` is what `timings.json` beside the run holds (`evaluate.Timings`); any part of it may be missing.
    `before` is the run that the baseline was made of, where it is at hand: with it, answers and contexts are compared.
    """
    timings = timings or {}
    cards = _cards(run, gate, baseline)
    rows = rows_of(run, baseline, metrics=[card["metric"] for card in cards])
    scores, old_scores = _scores(run), _scores(before) if before else {}
    old_items = {item.id: item for item in before.items} if before else {}
    classes = {row.item.id: classes_of(row, scores) for row in rows}
    usage = _usage(run, timings)
    call_ms = _part_of(timings, "call_ms")
    style, script = page_part("report.css"), page_part("report.js")
    context = {
        "run": run,
        "gate": gate,
        "baseline": baseline,
        "before": before,
        "head": _headline(run, gate, baseline),
        "warnings": _warnings(gate),
        "drift": _drift(gate),
        "power": [v for v in gate.metrics if v.detectable is not None] if gate and not gate.reasons else [],
        "judge": _judge(run),
        "cards": cards,
        "rows": [
            (row, _item(run, row, scores, call_ms, old_items.get(row.item.id), old_scores)) for row in rows
        ],
        "counts": _counts(rows),
        "classes": _class_counts(rows, classes),
        "positions": {item.id: position for position, item in enumerate(run.items)},
        "heads": {name: position for position, name in enumerate(run.prompt_heads)},
        "fingerprint": _fingerprint(run, baseline),
        "usage": usage,
        "words": words_of,
        "version": __version__,
        "style": style,
        "script": script,
        "style_hash": csp_hash(style),
        "script_hash": csp_hash(script),
    }
    template = environment().get_template("report.html.j2")
    for longest in LONGEST_TEXTS:
        page = template.render(
            context,
            cut=partial(_cut, longest=longest),
            diff=lambda old, new, longest=longest: word_diff(_cut(old, longest), _cut(new, longest)),
            payload=_payload(run, gate, baseline, usage, rows, classes, longest),
        )
        if len(page.encode()) <= BYTES_PER_ITEM * max(len(rows), 100):
            break
    return page


def _scores(run: Run) -> dict[tuple[str, str], Score]:
    return {(score.item, score.metric): score for score in run.scores}


@lru_cache
def environment() -> Environment:
    """The templates of the pages: all that they print is cleaned and escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def flat(name: str) -> str:
        """The template without its indentation, which would be a tenth of the page."""
        return re.sub(r"(?m)^[ ]+", "", files("ragate.report").joinpath("templates", name).read_text("utf-8"))

    made = Environment(
        loader=FunctionLoader(flat),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # every text that a template prints is cleaned of control characters, then escaped
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters["points"] = points
    made.filters["bounds"] = _bounds
    made.filters["signed"] = _signed
    made.filters["chance"] = chance
    made.filters["in_pre"] = _in_pre
    made.filters["commands"] = _commands
    made.filters["shorten"] = shorten
    return made


@lru_cache
def page_part(name: str) -> Markup:
    """A style or script of ours, marked as safe to print into the page."""
    from markupsafe import Markup

    return Markup(files("ragate.report").joinpath("templates", name).read_text(encoding="utf-8"))


def csp_hash(text: str) -> str:
    """The `sha256-…` source that allows exactly this inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _bounds(v: MetricVerdict) -> str:
    """`7.1 to 17.4 pt`: what the drop lies between."""
    low, high = (f"{(value or 0.0) * 100:.1f}".replace("-", "−") for value in (v.lower, v.upper))
    return f"{'0.0' if low == '−0.0' else low} to {'0.0' if high == '−0.0' else high} pt"


def _signed(v: MetricVerdict) -> str:
    """The change of the mean: a fall is negative."""
    if not v.drop:
        return "0.0 pt"
    return f"{'−' if v.drop > 0 else '+'}{points(v.drop)}"


def _in_pre(text: str) -> Markup:
    """Escaped for the inside of an element, where quotes may stand; JSON is full of them."""
    from markupsafe import Markup, escape

    return Markup(str(escape(visible(text))).replace("&#34;", '"'))


def _commands(text: str) -> Markup:
    """Escaped, with our commands and settings marked as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`(ragate [^`]+|min)`", r"<code>\1</code>", str(escape(visible(text)))))


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} more characters in run.json)"


def _headline(run: Run, gate: GateResult | None, baseline: Baseline | None) -> dict[str, Any]:
    word: str
    if gate is not None:
        word, sentence = gate.verdict, _sentence_of(gate)
        tone = TONES[gate.verdict]
    elif baseline is None:
        word, tone = "NO BASELINE", "none"
        sentence = "no baseline yet, so there is nothing to compare with and no verdict"
    else:
        word, tone, sentence = "NO VERDICT", "none", "scores beside the baseline; no verdict was asked for"
    if gate is not None and len(gate.reasons) > 1:
        sentence = f"the run cannot be compared with the baseline, for {len(gate.reasons)} reasons"
    lead, *rest = _clauses(sentence)
    done = sum(1 for s in run.scores if s.metric in run.metrics)
    way_out = (gate.way_out or "") if gate else ""
    if gate is None and baseline is None:
        way_out = "`ragate baseline set` makes this run the baseline"
    return {
        "word": word,
        "tone": tone,
        "lead": lead,
        "rest": rest,
        "partial": f"{done} of {len(run.items) * len(run.metrics)} scores were made" if run.partial else None,
        "next": way_out[:1].upper() + way_out[1:],
    }


def _clauses(sentence: str) -> list[tuple[str, str]]:
    """A sentence in parts that each get a line: (what happened, its numbers, in brackets or empty)."""
    lead, _, rest = sentence.partition("; ")
    parts = (part.partition(" (") for part in (lead, *(rest.split("; also ") if rest else ())))
    return [(short, f"{bracket.strip()}{numbers}") for short, bracket, numbers in parts]


def _spoken(text: str) -> str:
    """A sentence of the gate with the metrics as people call them."""
    for metric, words in WORDS.items():
        text = text.replace(metric, words.title.lower())
    return text


def _warnings(gate: GateResult | None) -> list[str]:
    return [_warning(warning) for warning in gate.warnings] if gate else []


def _warning(warning: str) -> str:
    return _spoken(warning.removeprefix("WARN: "))


def _sentence_of(gate: GateResult) -> str:
    """The sentence without its word, and without the warnings, which stand by themselves."""
    sentence = gate.sentence.removeprefix(f"{gate.verdict}: ")
    for warning in gate.warnings:
        sentence = sentence.replace(f"; {warning}", "")
    return _spoken(sentence)


def _drift(gate: GateResult | None) -> dict[str, Any] | None:
    """The run against the pinned release."""
    if gate is None or gate.drift is None:
        return None
    return {
        "word": gate.drift.verdict,
        "tone": TONES[gate.drift.verdict],
        "clauses": _clauses(_sentence_of(gate.drift)),
        "warnings": [_warning(warning) for warning in gate.drift_warnings],
        "metrics": [
            (v, TONES[v.verdict], interval)
            for v in gate.drift.metrics
            if (interval := intervals(gate.drift.metrics).get(v.metric))
        ],
    }


def _judge(run: Run) -> dict[str, str | None]:
    """What is known of the judge: of its weights by the fingerprint, of its accuracy by the catalogue."""
    from ragate import catalog

    known = next((model for model in catalog.models() if model.name == run.judge), None)
    fields = run.fingerprint
    return {
        "quantization": fields.get("judge_quantization") or fields.get("judge_format"),
        "backend": fields.get("judge_backend") or fields.get("engine"),
        "accuracy": known.accuracy if known else None,
    }


def _cards(run: Run, gate: GateResult | None, baseline: Baseline | None) -> list[dict[str, Any]]:
    """One card a metric: the worst verdict first, then what used up most of its limit."""
    verdicts = {v.metric: v for v in gate.metrics} if gate else {}
    drawn = intervals(list(verdicts.values()))
    cards = [_card(run, metric, verdicts.get(metric), baseline, drawn.get(metric)) for metric in run.metrics]

    def worst_first(card: dict[str, Any]) -> tuple[int, float]:
        if gate is None or not card["verdict"] or not card["limit"]:
            return 0, 0.0
        return -SEVERITY.index(card["verdict"]), -card["drop"] / card["limit"]

    return sorted(cards, key=worst_first)


def _card(
    run: Run,
    metric: str,
    verdict: MetricVerdict | None,
    baseline: Baseline | None,
    interval: Interval | None,
) -> dict[str, Any]:
    head, base = run.values(metric), baseline.values(metric) if baseline else {}
    score, base_mean = mean(head.values()), mean(base.values()) if baseline else None
    if verdict is not None and verdict.paired:
        score, base_mean = verdict.head_mean, verdict.base_mean
    limit = verdict.limit if verdict else None
    states = run.states(metric)
    states["missing"] = len(run.items) - sum(states.values())
    return {
        "metric": metric,
        "words": words_of(metric),
        "verdict": verdict.verdict if verdict else None,
        "tone": TONES[verdict.verdict] if verdict else "none",
        "score": score,
        "base": base_mean,
        "drop": None if score is None or base_mean is None else base_mean - score,
        "same": score is not None and base_mean is not None and abs(base_mean - score) <= SAME,
        "limit": limit,
        "of": verdict,
        "interval": interval,
        "scored": len(head),
        "bad_states": {state: n for state, n in states.items() if state != "ok" and n > 0},
        "chart": distribution(base.values(), head.values(), base_mean, score, limit),
    }


def _counts(rows: Sequence[ItemRow]) -> list[tuple[str, str, int]]:
    """The chips over the item table: key, label, number of items."""
    kinds = [
        ("regressed", "Regressed"),
        ("fixed", "Fixed"),
        ("unchanged", "Unchanged"),
        ("new", "Not compared"),
    ]
    chips = [("all", "All", len(rows))]
    chips += [(key, label, sum(row.change == key for row in rows)) for key, label in kinds]
    chips[1:1] = [
        ("broke", "Broke", sum(row.broke for row in rows)),
        ("mended", "Mended", sum(row.mended for row in rows)),
    ]
    chips += [("errored", "Errored", sum(row.errored for row in rows))]
    # without a baseline no item was compared, and one chip saying so for all is no help
    if all(row.change == "new" for row in rows):
        chips = [chip for chip in chips if chip[0] in ("all", "errored")]
    return [chip for chip in chips if chip[0] != "new" or chip[2]]


def _class_counts(
    rows: Sequence[ItemRow], classes: Mapping[str, tuple[str, ...]]
) -> list[tuple[Any, int, int]]:
    """(class, items of it, those of them that got worse), most items first; none that nothing belongs to."""
    found = []
    for each in CLASSES:
        mine = [row for row in rows if each.key in classes[row.item.id]]
        worse = sum(row.change == "regressed" for row in mine)
        if mine:
            found.append((each, len(mine), worse))
    return sorted(found, key=lambda one: (-one[2], -one[1]))


def _item(
    run: Run,
    row: ItemRow,
    scores: Scores,
    call_ms: dict[str, Any],
    old: ItemRecord | None,
    old_scores: Scores,
) -> dict[str, Any]:
    """What the row shows beside its cells; `old` and `old_scores` are the baseline's, where they are at hand."""
    item = row.item
    quotable = _quotable(item)
    passages = Passages(item.contexts)
    useful: dict[int, Claim] = {}
    parts: list[dict[str, Any]] = []
    for cell in row.cells:
        score = scores.get((item.id, cell.metric))
        claims = score.claims if score else ()
        if cell.metric == "context_precision":
            useful = {claim.context: claim for claim in claims if claim.context is not None}
        calls = [
            (run.calls[key], _without_quotes(run.calls[key].input, quotable), _number(call_ms.get(key)))
            # a greedy judge answers equal prompts once, and the score lists the call each time
            for key in dict.fromkeys(score.calls if score else ())
            if key in run.calls
        ]
        before = old_scores.get((item.id, cell.metric))
        rests = cell.metric in ("faithfulness", "context_recall")
        parts.append(
            {
                "cell": cell,
                "claims": [(claim, passages.closest(claim.text) if rests else None) for claim in claims],
                "calls": calls,
                # what the judge said before is of interest where it says something else now
                "before": before.claims if before and cell.drop else (),
            }
        )
    # what fell is what the reader came for
    parts.sort(key=lambda part: -max(part["cell"].drop or 0.0, 0.0))
    contexts = context_changes(old.contexts if old else (), item.contexts)
    return {
        "parts": parts,
        "useful": useful,
        "why": why(row, scores, old_scores),
        "old": old,
        "contexts": [(change, change.old == change.new) for change in contexts],
    }


def _quotable(item: ItemRecord) -> list[tuple[str, tuple[str, str]]]:
    """The item's own texts in each form that a prompt may hold them in (plain, or inside JSON), longest first.

    With each goes where the page shows it: the end of its anchor, and what to call it.
    """
    places = {context: (f"c{i}", f"context {i}") for i, context in enumerate(item.contexts, 1)}
    for name, text in (("question", item.question), ("reference", item.reference), ("answer", item.answer)):
        places[text or ""] = (name[0], name)
    forms = {
        form: place
        for text, place in places.items()
        if len(text) >= QUOTED
        for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    }
    return sorted(forms.items(), key=lambda form: -len(form[0]))


def _without_quotes(text: str, quotable: list[tuple[str, tuple[str, str]]]) -> list[tuple[str, str]]:
    """A call's input in pieces: (`text`, the piece), or (anchor, label) where a text of the item stood.

    The page shows each of them once; repeating them in every call would make it several times as large.
    """
    pieces = [("text", text)]
    for form, place in quotable:
        split: list[tuple[str, str]] = []
        for kind, piece in pieces:
            parts = piece.split(form) if kind == "text" else [piece]
            for i, part in enumerate(parts):
                split += [place] * (i > 0) + [(kind, part)] * bool(part)
        pieces = split
    return pieces


def _fingerprint(run: Run, baseline: Baseline | None) -> list[dict[str, Any]]:
    """The fields of the fingerprint with the baseline's value where it differs."""
    differs = (
        {diff.field: diff for diff in diff_fields(baseline.fingerprint, run.fingerprint)} if baseline else {}
    )
    names = sorted(run.fingerprint.keys() | differs.keys())
    return [
        {
            "field": name,
            "value": run.fingerprint.get(name),
            "differs": name in differs,
            "base": differs[name].old if name in differs else None,
        }
        for name in names
    ]


def _usage(run: Run, timings: dict[str, Any]) -> dict[str, Any]:
    """Token counts and seconds; what `timings` does not have, or has in another shape, is left out."""
    engine = _part_of(timings, "engine")
    # what all took together leads its parts
    phases: dict[str, float | None] = {"total": None}
    phases |= {str(name): _number(value) for name, value in _part_of(timings, "seconds").items()}
    for name, value in engine.items():
        if name.startswith("seconds_"):
            phases[f"engine: {name.removeprefix('seconds_')}"] = _number(value)
    seconds = {name: value for name, value in phases.items() if value is not None and value >= 0}
    longest = max(seconds.values(), default=0.0)
    return {
        "calls": run.tokens.calls,
        "distinct_calls": run.tokens.distinct_calls,
        "judged": _number(timings.get("calls_judged")),
        "resumed": _number(timings.get("calls_resumed")),
        "prompt_tokens": run.tokens.prompt_tokens,
        "output_tokens": run.tokens.output_tokens,
        "sent": _number(timings.get("prompt_tokens_sent")),
        "computed": _number(timings.get("prompt_tokens_computed")),
        "forced": _number(engine.get("tokens_forced")),
        "rates": _rates(run, timings),
        # phases overlap, so each bar is a share of the longest and not of their sum
        "seconds": [(name, value, value / longest if longest else 0.0) for name, value in seconds.items()],
    }


def _rates(run: Run, timings: dict[str, Any]) -> dict[str, float]:
    """Items and tokens a second, and what the same calls would have cost elsewhere; only what is known."""
    engine = _part_of(timings, "engine")
    total = _number(_part_of(timings, "seconds").get("total"))
    sent, out = _number(timings.get("prompt_tokens_sent")), _number(engine.get("tokens_out"))
    rates = {}
    if total and sent is not None and out is not None:
        rates = {"items": len(run.items) / total, "tokens": (sent + out) / total}
    prompt, answer = run.tokens.prompt_tokens, run.tokens.output_tokens
    if prompt:
        rates["dollars"] = (prompt * DOLLARS_IN + answer * DOLLARS_OUT) / 1e6
    return rates


def _part_of(timings: dict[str, Any], name: str) -> dict[str, Any]:
    part = timings.get(name)
    return part if isinstance(part, dict) else {}


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return value


def _payload(
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    usage: dict[str, Any],
    rows: Sequence[ItemRow],
    classes: Mapping[str, tuple[str, ...]],
    longest: int,
) -> Markup:
    """The page's data as JSON that no text in it can end: for the page's own script and for other programs.

    Contexts and judge calls are on the page once and in run.json; a second copy here would double its size.
    """
    from markupsafe import Markup

    positions = {item.id: position for position, item in enumerate(run.items)}
    data = {
        "ragate": __version__,
        "run": run.model_dump(mode="json", exclude={"items", "scores", "calls", "prompt_heads"}),
        "fingerprint_id": run.fingerprint_id,
        # each item has its own scores below
        "gate": gate.model_dump(mode="json", exclude=_CHANGED) if gate else None,
        "baseline": baseline.model_dump(mode="json", exclude={"items"}) if baseline else None,
        "usage": usage,
        "items": [
            {
                "position": positions[row.item.id],
                **row.item.model_dump(mode="json", exclude={"contexts"}),
                "change": row.change,
                "broke": row.broke,
                "mended": row.mended,
                "errored": row.errored,
                "classes": classes[row.item.id],
                "drop": row.drop,
                "lowest": row.lowest,
                "scores": {c.metric: c.model_dump(mode="json", exclude={"metric"}) for c in row.cells},
            }
            for row in rows
        ],
    }
    text = json.dumps(_cut_all(data, longest), separators=(",", ":"), allow_nan=False, default=str)
    # ensure_ascii has made U+2028 and U+2029 \u2028 and \u2029
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


_CHANGED: Any = {"metrics": {"__all__": {"changed"}}, "drift": {"metrics": {"__all__": {"changed"}}}}


def _cut_all(value: Any, longest: int) -> Any:
    """`value` with each text in it cut."""
    if isinstance(value, str):
        return _cut(value, longest)
    if isinstance(value, dict):
        return {name: _cut_all(part, longest) for name, part in value.items()}
    return [_cut_all(part, longest) for part in value] if isinstance(value, (list, tuple)) else value
