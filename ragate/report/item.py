"""`ragate show`: one item of a run with its contexts, and what the judge made of it, claim by claim."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from ragate.errors import RunError
from ragate.gate.verdict import shorten
from ragate.report.diff import context_changes, word_diff
from ragate.report.rows import rows_of
from ragate.report.terminal import number
from ragate.report.untrusted import plain, plain_lines
from ragate.report.words import words_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from ragate.gate.baseline import Baseline
    from ragate.report.rows import Cell
    from ragate.run import Claim, ItemRecord, Run, Score

LONGEST = 1_500
"""Characters of a text that are shown, unless all is asked for."""


def item_named(run: Run, name: str) -> ItemRecord:
    """The item of this id, or the only one whose id begins so. Raises RunError: none or several, with what is near."""
    ids = [item.id for item in run.items]
    found = [item for item in run.items if item.id == name] or [
        item for item in run.items if item.id.startswith(name)
    ]
    if len(found) == 1:
        return found[0]
    shown = shorten(plain(name), 60)
    if found:
        several = ", ".join(shorten(plain(item.id), 40) for item in found[:5])
        raise RunError(
            f"item {shown}: {len(found)} items begin so: {several}{', …' if len(found) > 5 else ''}"
        )
    near = get_close_matches(name, ids, n=3) or ids[:3]
    names = ", ".join(shorten(plain(each), 40) for each in near)
    raise RunError(f"item {shown}: the run of {shorten(plain(run.suite), 40)} has none; there are {names}")


def print_item(
    console: Console,
    run: Run,
    item: ItemRecord,
    baseline: Baseline | None,
    before: Run | None,
    *,
    calls: bool = False,
    full: bool = False,
) -> None:
    """The item with its scores beside the baseline's.

    With the run `before`, of which the baseline was made, its answer and contexts are compared; with `calls` each
    call of the judge is printed; texts are cut unless `full`.
    """
    from rich.text import Text

    longest = None if full else LONGEST
    row = next(row for row in rows_of(run, baseline) if row.item.id == item.id)
    old = next((each for each in before.items if each.id == item.id), None) if before else None
    marks = ["critical"] * item.critical + ["reserve"] * item.reserve + ["broke"] * row.broke
    about = [item.kind, f"source {item.cluster}" if item.cluster else None]
    about += [f"line {item.line} of the test set" if item.line else None, *marks]
    said = ", ".join(shorten(plain(part), 60) for part in about if part)
    console.print(Text.assemble((shorten(plain(item.id), 80), "bold"), (f"  {said}", "dim")))
    console.print()
    if item.error:
        _print(console, "error", Text(_cut(item.error, longest), "red"))
    _print(console, "question", Text(_cut(item.question, longest)))
    _print(console, "reference", Text(_cut(item.reference or "none", longest)))
    _print(console, "answer", _answer(item, old, longest))
    _print_contexts(console, run, item, old, longest)
    for cell in row.cells:
        _print_metric(console, run, cell, run.score(item.id, cell.metric), calls, longest)


def _print(console: Console, label: str, text: RenderableType, width: int = 11) -> None:
    """A text beside its label, wrapped inside its own column."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(overflow="fold", ratio=1)
    grid.add_row(Text(label, "dim"), text)
    console.print(grid)


def _answer(item: ItemRecord, old: ItemRecord | None, longest: int | None) -> Text:
    """The answer, or how it differs from the baseline's: lost words struck out, new ones underlined."""
    from rich.text import Text

    new = _cut(item.answer or "", longest)
    if old is None or (old.answer or "") == (item.answer or ""):
        return Text(new or "none")
    text = Text()
    for piece in word_diff(_cut(old.answer or "", longest), new):
        if piece.kind == "same":
            text.append(piece.text)
        else:
            # marks too, so that it can be read without colours
            lost = piece.kind == "lost"
            text.append(
                f"[-{piece.text}-]" if lost else f"{{+{piece.text}+}}", "red strike" if lost else "green"
            )
    return text


def _print_contexts(
    console: Console, run: Run, item: ItemRecord, old: ItemRecord | None, longest: int | None
) -> None:
    from rich.text import Text

    score = run.score(item.id, "context_precision")
    useful = {claim.context: claim.verdict for claim in score.claims} if score else {}
    changes = context_changes(old.contexts if old else (), item.contexts)
    if not changes:
        _print(console, "contexts", Text("none"))
    for change in changes:
        text = Text()
        if old is not None and change.old != change.new:
            moved = "new" if change.old is None else "lost" if change.new is None else f"was {change.old}"
            text.append(
                f"{moved}  ", "red" if change.new is None else "green" if change.old is None else "yellow"
            )
        if change.new is not None and change.new - 1 in useful:
            text.append_text(_mark(useful[change.new - 1], "context_precision"))
        text.append(_cut(change.text, longest), "dim" if change.new is None else "")
        _print(console, f"context {change.new or '–'}", text)


def _print_metric(
    console: Console, run: Run, cell: Cell, score: Score | None, calls: bool, longest: int | None
) -> None:
    from rich.text import Text

    title = Text.assemble("\n", (words_of(cell.metric).title, "bold"), "  ")
    style = "" if not cell.drop else "bold red" if cell.drop > 0 else "bold green"
    title.append(number(cell.value) if cell.value is not None else cell.state, style or "bold")
    if cell.base_state is not None:
        title.append(f"  baseline {number(cell.base) if cell.base is not None else cell.base_state}", "dim")
    console.print(title)
    if cell.error:
        _print(console, "error", Text(_cut(cell.error, longest), "red"))
    for claim in score.claims if score else ():
        _print(console, _probability(claim), _claim(cell.metric, claim, longest), width=6)
    for key in dict.fromkeys(score.calls if score and calls else ()):
        if (call := run.calls.get(key)) is None:
            continue
        tokens = (
            f"{call.prompt_tokens:,} tokens in, {call.output_tokens:,} out, {shorten(plain(call.finish), 40)}"
        )
        console.print(Text(f"call {shorten(plain(call.head), 60)}: {tokens}", "dim"))
        _print(console, "input", Text(_cut(call.input, longest), "dim"), width=8)
        _print(console, "output", Text(_cut(call.output, longest)), width=8)


def _probability(claim: Claim) -> str:
    """P of the verdict that was given."""
    if claim.probability is None:
        return ""
    return f"{claim.probability if claim.verdict == 1 else 1 - claim.probability:.2f}"


def _claim(metric: str, claim: Claim, longest: int | None) -> Text:
    text = _mark(claim.verdict, metric)
    if claim.context is not None:
        text.append(f"context {claim.context + 1} ")
    text.append(_cut(claim.text, longest))
    if claim.similarity is not None:
        text.append(f"  similarity {claim.similarity:.3f}", "dim")
    if claim.reason:
        text.append(f"\n{_cut(claim.reason, longest)}", "dim")
    return text


def _mark(verdict: int, metric: str) -> Text:
    from rich.text import Text

    words = words_of(metric)
    mark = (f"✓ {words.yes}  ", "green") if verdict == 1 else (f"✗ {words.no}  ", "red")
    return Text.assemble(mark)


def _cut(text: str, longest: int | None) -> str:
    """`text` fit for a terminal; what is cut is said."""
    if longest is None or len(text) <= longest:
        return plain_lines(text)
    return f"{plain_lines(text[:longest])}… ({len(text) - longest:,} more characters: --full)"
