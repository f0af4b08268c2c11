"""The badge: the verdict as a small SVG, for a README or a page."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from ragate.gate.verdict import shorten
from ragate.report.untrusted import xml_text

if TYPE_CHECKING:
    from ragate.gate.verdict import GateResult

COLOURS = {
    "PASS": "#1a7f37",
    "FAIL": "#cf222e",
    "INCONCLUSIVE": "#9a6700",
    "INVALID": "#8250df",
    "NO BASELINE": "#59636e",
}
"""White text on each has a contrast of 4.5 or more."""
LETTER = 6.6
"""Pixels that a letter takes at 11 pixels; the text is fitted to it, whatever the font."""


def render_badge(gate: GateResult | None, label: str = "RAG gate") -> str:
    """An SVG of 20 pixels height: `label` on the left, the verdict on the right."""
    label = shorten(xml_text(label), 40) or "RAG gate"
    word = gate.verdict if gate else "NO BASELINE"
    left, right = (round(len(text) * LETTER) + 12 for text in (label, word))
    said = f"{label}: {word}"
    texts = "".join(
        f'<text x="{x + 6}" y="14" textLength="{width - 12}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
        for x, width, text in ((0, left, label), (left, right, word))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f"aria-label={quoteattr(said)}><title>{escape(said)}</title>"
        f'<rect width="{left + right}" height="20" rx="3" fill="{COLOURS[word]}"/>'
        f'<path d="M3 0H{left}V20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#30363d"/>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,Geneva,sans-serif" font-size="11">{texts}</g></svg>\n'
    )
