"""JUnit XML: a test case for each metric and each item; what fails there is what fails the gate, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ragate.errors import EXIT_PASS
from ragate.gate.verdict import shorten
from ragate.report.rows import rows_of
from ragate.report.untrusted import xml_text

if TYPE_CHECKING:
    from ragate.gate.baseline import Baseline
    from ragate.gate.verdict import GateResult, MetricVerdict
    from ragate.report.rows import ItemRow
    from ragate.run import Run

LONGEST = 2_000
"""Characters of one text."""


def render_junit(
    run: Run, gate: GateResult | None, baseline: Baseline | None, file: str | None = None
) -> str:
    """The XML: a suite of the gate's metrics and one of the items, with failures and errors only where it fails.

    A metric that is INCONCLUSIVE is a failure where that exits other than 0, else skipped; INVALID is an error, as
    is a run without a baseline. An item fails where a metric that FAILs fell on it. `file` is the test set's path,
    which each item names beside its line.
    """
    suites = ElementTree.Element("testsuites", name=_text(run.suite))
    _add_gate(suites, run, gate)
    _add_items(suites, run, gate, baseline, file)
    for element in (*suites, suites):  # the sum of all comes last
        for count, tag in (
            ("tests", "testcase"),
            ("failures", "failure"),
            ("errors", "error"),
            ("skipped", "skipped"),
        ):
            element.set(count, str(len(list(element.iter(tag)))))
    ElementTree.indent(suites, " ")
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _add_gate(suites: ElementTree.Element, run: Run, gate: GateResult | None) -> None:
    name = _text(f"{run.suite}.gate")
    suite = ElementTree.SubElement(suites, "testsuite", name=name)
    if gate is None:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="baseline")
        _end(case, "error", "INVALID", "no baseline to compare with; `ragate baseline set` makes one")
        return
    case = ElementTree.SubElement(suite, "testcase", classname=name, name="verdict")
    _end_verdict(case, gate.verdict, gate.sentence, gate.exit_code)
    for verdict in gate.metrics:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=_text(verdict.metric))
        # what one metric leaves open decides nothing where another fails
        fails = EXIT_PASS if verdict.verdict == "INCONCLUSIVE" != gate.verdict else gate.exit_code
        _end_verdict(case, verdict.verdict, verdict.sentence, fails)
        ElementTree.SubElement(case, "system-out").text = _text(_numbers(verdict))
    if gate.drift is not None:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="drift since the release")
        _end_verdict(case, gate.drift.verdict, gate.drift.sentence, gate.drift.exit_code)
    since = (f"against the release: {warning}" for warning in gate.drift_warnings)
    said = "\n".join((gate.sentence, *gate.reasons, *gate.warnings, *since))
    ElementTree.SubElement(suite, "system-out").text = _text(said)


def _end_verdict(case: ElementTree.Element, verdict: str, sentence: str, exit_code: int) -> None:
    """How a test case ends: nothing is added to one that passed."""
    if verdict == "PASS":
        return
    tag = "skipped" if exit_code == EXIT_PASS else "error" if verdict == "INVALID" else "failure"
    _end(case, tag, verdict, sentence)


def _end(case: ElementTree.Element, tag: str, kind: str, message: str) -> None:
    attributes = {"message": _text(message)}
    if tag != "skipped":
        attributes["type"] = kind
    ElementTree.SubElement(case, tag, attributes)


def _numbers(v: MetricVerdict) -> str:
    names = (
        "base_mean",
        "head_mean",
        "drop",
        "limit",
        "lower",
        "upper",
        "p",
        "paired",
        "detectable",
        "items_needed",
    )
    values = ((name, getattr(v, name)) for name in names)
    return ", ".join(f"{name} {value:.6g}" for name, value in values if value is not None)


def _add_items(
    suites: ElementTree.Element,
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    file: str | None,
) -> None:
    name = _text(f"{run.suite}.items")
    suite = ElementTree.SubElement(suites, "testsuite", name=name)
    failed = (
        {v.metric for v in gate.metrics if v.verdict == "FAIL"} if gate and gate.verdict == "FAIL" else set()
    )
    for row in rows_of(run, baseline):
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=_text(row.item.id))
        if file is not None and row.item.line is not None and not row.item.reserve:
            case.set("file", _text(file))
            case.set("line", str(row.item.line))
        fallen = [c for c in row.cells if c.metric in failed and c.drop is not None and c.drop > 0]
        if fallen:
            changes = "; ".join(f"{c.metric} {c.base:.2f} -> {c.value:.2f}" for c in fallen)
            _end(case, "failure", "FAIL", changes)
        elif row.errored:
            states = "; ".join(
                f"{c.metric} {c.state} {c.error or ''}".strip() for c in row.cells if c.state != "ok"
            )
            _end(case, "skipped", "", states)
        ElementTree.SubElement(case, "system-out").text = _text(_scores(row))


def _scores(row: ItemRow) -> str:
    shown = (f"{c.metric} {c.state if c.value is None else f'{c.value:.4f}'}" for c in row.cells)
    return f"{shorten(row.item.question, 400)}\n{', '.join(shown)}"


def _text(text: str) -> str:
    return shorten(xml_text(text), LONGEST)
