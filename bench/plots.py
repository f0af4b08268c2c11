"""Three kinds of figure as SVG text: a roofline, lines over time, stacked bars. Readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
_STYLE = """<style>
text { font: 12px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 13px } .note { fill: #59636e } .small { font-size: 11px }
.page { fill: #ffffff } .grid { stroke: #d1d9e0 } .axis, .roof { stroke: #59636e; fill: none } .roof { stroke-width: 2 }
.in { fill: #ffffff; font-size: 11px }
.c0 { --c: #2f6fde } .c1 { --c: #d9642b } .c2 { --c: #1f8a5b } .c3 { --c: #8256d0 }
.c4 { --c: #b3366b } .c5 { --c: #0e7c8c } .c6 { --c: #8a6d1c } .c7 { --c: #6e7781 }
.fill { fill: var(--c) } .line { stroke: var(--c); fill: none; stroke-width: 2 }
.hollow { stroke: var(--c); fill: var(--page, #ffffff); stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .page { fill: #0d1117 } .grid { stroke: #3d444d }
  .axis, .roof { stroke: #9198a1 } .hollow { --page: #0d1117 } .in { fill: #ffffff }
  .c0 { --c: #4184f3 } .c1 { --c: #d9642b } .c2 { --c: #2a9d6a } .c3 { --c: #936be0 }
  .c4 { --c: #cf4f86 } .c5 { --c: #1693a5 } .c6 { --c: #a3832b } .c7 { --c: #7d8590 }
}
</style>"""


@dataclass(frozen=True)
class Point:
    """A measurement on the roofline: operations a byte, operations a second."""

    series: str
    label: str
    intensity: float
    flops: float
    ring: bool = False
    """Another engine's."""


@dataclass(frozen=True)
class Bar:
    """A bar of parts, (name, value) from the left, and what stands behind it."""

    label: str
    parts: tuple[tuple[str, float], ...]
    note: str = ""


def roofline(title: str, flops: float, bytes_: float, points: Sequence[Point], ring_name: str = "") -> str:
    """Achieved operations a second over operations a byte, both axes logarithmic, under the measured roof.

    Points that are another engine's are rings; `ring_name` says whose.
    """
    left, top, width, height = 62, 40, 660, 330
    ridge = flops / bytes_
    x_low = 10 ** math.floor(math.log10(min([p.intensity for p in points] + [ridge / 10])))
    x_high = 10 ** math.ceil(math.log10(max([p.intensity for p in points] + [ridge * 4])))
    y_high = 10 ** math.ceil(math.log10(flops))
    y_low = 10 ** math.floor(math.log10(min([p.flops for p in points] + [bytes_ * x_low * 10])))

    def x(value: float) -> float:
        return left + width * math.log(value / x_low) / math.log(x_high / x_low)

    def y(value: float) -> float:
        return top + height * (1 - math.log(value / y_low) / math.log(y_high / y_low))

    names = list(dict.fromkeys(p.series for p in points))
    body = [_text(12, 22, title, "title")]
    for power in range(round(math.log10(x_low)), round(math.log10(x_high)) + 1):
        at = x(10.0**power)
        body.append(_line(at, top, at, top + height, "grid"))
        body.append(_text(at, top + height + 16, _power(power), "note", "middle"))
    for power in range(round(math.log10(y_low)), round(math.log10(y_high)) + 1):
        at = y(10.0**power)
        body.append(_line(left, at, left + width, at, "grid"))
        body.append(_text(left - 6, at + 4, _power(power - 12), "note", "end"))
    start = max(x_low, y_low / bytes_)
    roof = [(x(start), y(bytes_ * start)), (x(ridge), y(flops)), (x(x_high), y(flops))]
    body.append(_path(roof, "roof"))
    body.append(_text(x(x_high) - 4, y(flops) - 7, f"{flops / 1e12:.0f} TFLOP/s", "note", "end"))
    slope = math.degrees(math.atan2(roof[1][1] - roof[0][1], roof[1][0] - roof[0][0]))
    middle = math.sqrt(start * ridge)
    at_x, at_y = x(middle), y(bytes_ * middle) - 8
    note = _text(at_x, at_y, f"{bytes_ / 1e9:,.0f} GB/s", "note", "middle")
    body.append(f'<g transform="rotate({slope:.1f} {at_x:.1f} {at_y:.1f})">{note}</g>')
    for p in sorted(points, key=lambda p: not p.ring):  # dots on top of rings
        kind = "hollow" if p.ring else "fill"
        colour = f"c{names.index(p.series) % COLOURS}"
        whose = f"{ring_name}, {p.series}" if p.ring else p.series
        tip = f"{whose}, {p.label}: {p.flops / 1e12:.3g} TFLOP/s at {p.intensity:.3g} FLOP a byte"
        body.append(
            f'<circle class="{kind} {colour}" cx="{x(p.intensity):.1f}" cy="{y(p.flops):.1f}" r="{5 if p.ring else 4}">'
            f"<title>{escape(tip)}</title></circle>"
        )
        if not p.ring:
            body.append(_text(x(p.intensity) + 9, y(p.flops) + 12, p.label, "small"))
    body.append(
        _text(left + width / 2, top + height + 36, "operations a byte of device memory", "note", "middle")
    )
    body.append(_text(left + 6, top + 14, "TFLOP/s", "note"))
    body += _legend(names, left, top + height + 58, width)
    return _svg(left + width + 36, top + height + 74, title, body)


def lines(
    title: str,
    series: dict[str, list[tuple[float, float]]],
    x_label: str,
    mark: tuple[float, str] | None = None,
) -> str:
    """Shares (0 to 1) over time; the series' points are (x, share). `mark` is an x to be marked, and its name."""
    left, top, width, height = 52, 40, 670, 190
    x_high = max((point[0] for rows in series.values() for point in rows), default=1.0)
    y_high = _nice(max((point[1] for rows in series.values() for point in rows), default=1.0))
    body = [_text(12, 22, title, "title")]
    for i in range(5):
        at = top + height * (1 - i / 4)
        body.append(_line(left, at, left + width, at, "grid"))
        body.append(_text(left - 6, at + 4, f"{y_high * i / 4:.0%}", "note", "end"))
        across = left + width * i / 4
        body.append(_text(across, top + height + 16, f"{x_high * i / 4:.1f}", "note", "middle"))
    if mark is not None:
        at = left + width * mark[0] / x_high
        body.append(_line(at, top, at, top + height, "axis"))
        body.append(_text(at + 5, top + 12, mark[1], "note"))
    for i, rows in enumerate(series.values()):
        points = [(left + width * a / x_high, top + height * (1 - min(b, y_high) / y_high)) for a, b in rows]
        body.append(_path(points, f"line c{i % COLOURS}"))
    body.append(_text(left + width / 2, top + height + 34, x_label, "note", "middle"))
    body += _legend(list(series), left, top + height + 56, width)
    return _svg(left + width + 24, top + height + 72, title, body)


def bars(title: str, rows: Sequence[Bar], unit: str, *, shares: bool = False) -> str:
    """Horizontal stacked bars over one scale; with `shares` each bar fills the width and parts show percentages."""
    left, top, width, step = 190, 40, 460, 34
    names: list[str] = []
    for row in rows:
        names += [name for name, _ in row.parts if name not in names]
    longest = max(sum(value for _, value in row.parts) for row in rows)
    body = [_text(12, 22, title, "title")]
    for i, row in enumerate(rows):
        at, total = float(left), sum(value for _, value in row.parts)
        y = top + i * step
        body.append(_text(left - 8, y + 17, row.label, "", "end"))
        for name, value in row.parts:
            part = width * value / (total if shares else longest)
            shown = f"{value / total:.0%}" if shares else f"{value:.3g}"
            tip = f"{name}: {value:.4g} {unit} ({value / total:.1%})"
            colour = f"c{min(names.index(name), COLOURS - 1)}"
            body.append(
                f'<rect class="fill {colour}" x="{at:.1f}" y="{y}" width="{max(part - 1, 0.5):.1f}" height="24">'
                f"<title>{escape(tip)}</title></rect>"
            )
            if part > 30:
                body.append(_text(at + part / 2, y + 16, shown, "in", "middle"))
            at += part
        body.append(_text(at + 8, y + 17, row.note or f"{total:.3g} {unit}", "note"))
    foot = top + len(rows) * step
    legend = _legend(names[:COLOURS], 12, foot + 18, left + width + 120)
    return _svg(
        left + width + 150,
        foot + 18 + 18 * _legend_rows(names[:COLOURS], left + width + 120),
        title,
        body + legend,
    )


def _legend(names: Sequence[str], left: float, top: float, width: float) -> list[str]:
    found, x, y = [], left, top
    for i, name in enumerate(names):
        if x > left and x + _legend_width(name) > left + width:
            x, y = left, y + 18
        found.append(f'<circle class="fill c{i % COLOURS}" cx="{x + 5:.1f}" cy="{y - 4:.1f}" r="4.5"/>')
        found.append(_text(x + 15, y, name, "small"))
        x += _legend_width(name)
    return found


def _legend_rows(names: Sequence[str], width: float) -> int:
    rows, x = 1, 0.0
    for name in names:
        if x and x + _legend_width(name) > width:
            rows, x = rows + 1, 0.0
        x += _legend_width(name)
    return rows


def _legend_width(name: str) -> float:
    return 32 + 6.2 * len(name)


def _nice(value: float) -> float:
    """The next of 1, 2, 4 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 8, 10) if power * step >= value)


def _power(power: int) -> str:
    return f"{10.0**power:,.0f}" if power >= 0 else f"{10.0**power:.{-power}f}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}">'
    )
    return (
        "\n".join([head, _STYLE, '<rect class="page" width="100%" height="100%" rx="6"/>', *body, "</svg>"])
        + "\n"
    )
