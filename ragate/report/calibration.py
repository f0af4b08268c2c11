"""What a judge's figures say: a headline, the terminal's tables, and the page of a calibration.

All text from the data and the judge is untrusted: the terminal gets it cleaned, the page escaped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ragate import __version__
from ragate.gate.verdict import MIN_CLUSTERS
from ragate.report.charts import heights, path_of
from ragate.report.html import csp_hash, environment, page_part
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from rich.console import Console

    from ragate.judging.quality import Interval, Quality, ScoreFigures
    from ragate.judging.selftest import SelfTest

DECIDES = {"faithfulness": "faithful from unfaithful answers", "relevance": "useful from useless contexts"}


class Headline(NamedTuple):
    """The verdict on a judge."""

    tone: str
    """`pass`, `open` or `fail`, for icon and colour."""
    word: str
    sentence: str


def headline_of(quality: Quality) -> Headline:
    """Is the judge better than a coin, and than counting words?"""
    auroc, gain = quality.scores[0].auroc, quality.scores[0].gain
    assert gain is not None, "the judge's own score comes first"
    best = quality.scores[0].balanced_accuracy
    told = f"tells {DECIDES[quality.subject]} with AUROC {bounded(auroc)}, balanced accuracy {bounded(best)}"
    against = (
        f"{'+' if gain.value > 0 else ''}{number(gain.value)} AUROC against word overlap ({bounds(gain)})"
    )
    sentence = f"judge {quality.judge} {told}; {against}"
    if quality.clusters < MIN_CLUSTERS:  # resamples of so few are alike: their intervals have no width
        return Headline(
            "open",
            "TOO FEW SOURCES TO TELL",
            f"{sentence}; the {quality.items} items are of {quality.clusters} sources, intervals take "
            f"{MIN_CLUSTERS} or more",
        )
    if not auroc.lower > 0.5:  # NaN too: nothing is shown
        return Headline("fail", "NO BETTER THAN CHANCE", sentence)
    if gain.upper < 0:
        return Headline("fail", "WORSE THAN WORD OVERLAP", sentence)
    if not gain.lower > 0:
        return Headline("open", "NOT SHOWN TO BE BETTER THAN WORD OVERLAP", sentence)
    return Headline("pass", "BETTER THAN WORD OVERLAP", sentence)


def number(value: float, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def bounds(interval: Interval) -> str:
    """`0.70 to 0.81`."""
    return f"{number(interval.lower, 2)} to {number(interval.upper, 2)}"


def bounded(interval: Interval) -> str:
    """`0.756 (0.70 to 0.81)`."""
    return f"{number(interval.value)} ({bounds(interval)})"


def figures_of(quality: Quality, other: Quality | None) -> list[ScoreFigures]:
    """The lines of the table; with the other way of making statements after the judge's own."""
    lines = list(quality.scores)
    if other is None:
        return lines
    way = "ragas' pipeline" if other.statements == "judge" else "sentences"
    more = [
        each.model_copy(update={"name": each.name.replace("judge", f"judge by {way}", 1)})
        for each in other.scores
        if each.name.startswith("judge")
    ]
    own = [each for each in lines if each.name.startswith("judge")]
    return [*own, *more, *lines[len(own) :]]


def print_quality(console: Console, quality: Quality) -> None:
    """Headline, the scores beside the floors, and what the verdicts as they are do."""
    from rich.table import Table

    head = headline_of(quality)
    console.print(f"{head.word}: {plain(head.sentence)}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("score", "AUROC", "within groups", "balanced acc.", "over word overlap"):
        table.add_column(column, overflow="fold")
    for each in quality.scores:
        shown = (each.auroc, each.auroc_within, each.balanced_accuracy, each.gain)
        cells = ("–" if i is None else f"{number(i.value)} {bounds(i)}" for i in shown)
        table.add_row(plain(each.name), *cells)
    console.print(table)
    for line in notes_of(quality):
        console.print(plain(line), markup=False)


def print_selftest(console: Console, found: SelfTest) -> None:
    """What moved the verdicts, a line a probe, and what follows."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("against the first round")
    for column in ("verdicts", "moved", "mean |dP|", "largest"):
        table.add_column(column, justify="right")
    for probe in found.probes:
        table.add_row(
            plain(probe.name),
            str(probe.verdicts),
            f"{probe.moved_share:.1%}",
            f"{probe.mean_shift:.4f}",
            f"{probe.largest_shift:.4f}",
        )
    console.print(table)
    failed = f", {found.failed} of them without an answer" if found.failed else ""
    steady = (
        "moved nothing" if found.steady else "MOVED VERDICTS: the same inputs do not give the same scores"
    )
    sentence = f"{found.judge} over {found.items} items{failed}: repetition, order and batch size {steady}"
    console.print(plain(sentence), markup=False)


def notes_of(quality: Quality) -> list[str]:
    """What else is to be known, a sentence each."""
    now, used = quality.as_it_is, quality.scores_map.method
    what = "answers" if quality.subject == "faithfulness" else "contexts"
    lines = [
        f"{quality.items} {what} of {quality.clusters} sources, {quality.positive} labelled 1; intervals are 95 %, "
        "sources drawn whole",
        f"its own verdicts (P = 0.5): sensitivity {number(now.sensitivity)}, specificity {number(now.specificity)}, "
        f"balanced accuracy {number(now.balanced_accuracy)}, kappa {number(now.kappa)}",
        f"expected calibration error {number(quality.error_before)}, after the {used} map "
        f"{number(quality.error_after[used])}",
        shows(quality.shown_hard, "hard scores"),
        shows(quality.shown_soft, "soft scores"),
    ]
    if quality.failed:
        lines.append(f"{len(quality.failed)} got no verdict and are not counted")
    if quality.unlabelled:
        lines.append(f"{quality.unlabelled} rows have no label and were left out")
    return lines


def shows(share: float, what: str) -> str:
    """`hard scores show 0.42 of a true drop`."""
    if not share > 0:
        return f"{what} show nothing of a true drop"
    return f"{what} show {share:.2f} of a true drop: 5 points look like {5 * share:.1f}"


def render_calibration(quality: Quality, other: Quality | None = None) -> str:
    """The page, as text to be written to one file; `other` is the same judge by the other way of making statements."""
    style = page_part("report.css") + page_part("calibration.css")
    return (
        environment()
        .get_template("calibration.html.j2")
        .render(
            q=quality,
            head=headline_of(quality),
            figures=figures_of(quality, other),
            notes=notes_of(quality),
            number=number,
            bounds=bounds,
            path=path_of,
            reliable=[(bin.score, bin.share) for bin in quality.reliability],
            bars=heights(quality.histogram["1"], quality.histogram["0"]),
            what="answers" if quality.subject == "faithfulness" else "contexts",
            version=__version__,
            style=style,
            style_hash=csp_hash(style),
        )
    )
