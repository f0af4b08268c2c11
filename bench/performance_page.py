"""bench/results/*.json -> docs/performance.md and its figures. What has no result is left out.

usage: python bench/performance_page.py
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import peer, plots
from bench.result import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "performance.md"
CARD = "h200"
MODELS = {"135m": "SmolLM2-135M", "1.5b": "Qwen2.5-1.5B", "8b": "Llama-3-8B"}
"""Shapes by the names of result files, as the page calls them."""
QUANTIZED = {
    "8b-int4": "Llama-3-8B, int4 in groups of 128",
    "8b-q4_k_m": "Llama-3-8B, Q4_K_M",
    "8b-q6_k": "Llama-3-8B, Q6_K",
    "8b-q8_0": "Llama-3-8B, Q8_0",
}
"""The same with weights that stay packed."""
PHASES = {"python": "python", "imports": "imports", "load": "weights, memory", "first_token": "first token"}


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page and its figures. Raises FileNotFoundError where there is no result at all."""
    found = Results(results)
    if not found.engine:
        raise FileNotFoundError(f"{results} has no engine-{CARD}-*.json: run bench/engine.py on a card")
    images = page.parent / "img"
    images.mkdir(parents=True, exist_ok=True)
    figures = Figures(images)
    sections = [
        _head(found),
        _against_the_peer(found),
        _packed(found),
        _products(found),
        _roofline(found, figures),
        _same_bits(found),
        _cost(found),
        _repeated(found),
        _kv_slots(found, figures),
        _start_up(found, figures),
        _kernels(found, figures),
        _soak(found),
        _ceilings(found),
        _how_to(found),
    ]
    page.write_text("\n".join(line for section in sections for line in section))
    for stale in set(images.glob("perf-*.svg")) - figures.written:
        stale.unlink()
    print(f"{page} with {len(figures.written)} figures")


class Results:
    """The results there are, by what they measured."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, dict[str, Any]] = {}

        def read(name: str) -> dict[str, Any] | None:
            path = folder / f"{name}.json"
            if not path.exists():
                return None
            self.files[path.name] = json.loads(path.read_text())
            return self.files[path.name]

        def of_models(kind: str) -> dict[str, dict[str, Any]]:
            named = {model: read(f"{kind}-{CARD}-{model}") for model in MODELS | QUANTIZED}
            return {model: result for model, result in named.items() if result is not None}

        self.limits = read(f"limits-{CARD}")
        engine = of_models("engine")
        self.engine = {model: result for model, result in engine.items() if model in MODELS}
        self.packed = {model: result for model, result in engine.items() if model in QUANTIZED}
        self.invariance = of_models("invariance")
        self.cost = read(f"invariance-cost-{CARD}")
        self.repeated = read(f"repeat-eval-{CARD}-qwen-1.5b")
        self.soak = read(f"soak-{CARD}")
        self.kernels = read(f"kernels-{CARD}")
        self.products = read(f"quantized-products-{CARD}")


class Figures:
    """Writes SVG files; gives the Markdown that shows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: set[Path] = set()

    def show(self, name: str, svg: str, caption: str) -> list[str]:
        """The lines that put a figure on the page."""
        path = self.folder / f"perf-{name}.svg"
        path.write_text(svg)
        self.written.add(path)
        return [f"![{caption}](img/{path.name})", ""]


def _head(found: Results) -> list[str]:
    first = next(iter(found.engine.values()))
    versions = ", ".join(f"{name} {v}" for name, v in first["versions"].items() if name != "ragate")
    return [
        "# Performance",
        "",
        *_paragraph(
            "Made by `python bench/performance_page.py` from [bench/results](../bench/results); nothing is typed in by "
            f"hand. Hardware: {first['hardware']}; {versions}. Shapes of known models with random weights, greedy "
            "decoding, bfloat16. The engine has one mode: the bits of an answer never depend on who shares the batch."
        ),
    ]


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False), ""]


def _points(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch, point in result.get("decode", {}).items():
        yield f"decode, batch {batch}", point
    if "prefill" in result:
        sizes = result["sizes"]
        yield f"prefill, {sizes['prefill_requests']} x {sizes['prefill_prompt']:,}", result["prefill"]


def _against_the_peer(found: Results) -> list[str]:
    out = [
        "## Beside vLLM, and beside the card",
        "",
        *_paragraph(
            "*Limit* is the roofline: the bytes that must move over the measured copy bandwidth, or the arithmetic "
            "over the measured matrix rate, whichever takes longer (`bench/roofline.py`). Tokens a second are output "
            "tokens, prompt tokens for prefill. The judge workload is 1,000 requests: four metrics, each with a shared "
            "prefix of 1,200 tokens, on 250 cases of 200 to 700 tokens, 128 tokens each to answer."
        ),
    ]
    for model, result in found.engine.items():
        rival = result.get("peer")
        invariant = peer.committed(model, "invariant")
        name = rival["name"] if rival else ""
        extra = f" {invariant.name.removeprefix('vLLM ')} |" if invariant else ""
        out += [f"### {MODELS[model]}", ""]
        out.append(
            f"| | ragate |{f' {name} |' if rival else ''}{extra}{' ratio |' if rival else ''} of the limit |"
        )
        out.append("|---|---|" + "---|" * (bool(invariant) + 2 * bool(rival)) + "---|")
        for label, point in _points(result):
            cells = [label, f"{point['tok_s']:,.0f} tok/s"]
            if rival:
                cells.append(f"{point['peer_tok_s']:,.0f}" if "peer_tok_s" in point else "-")
            if invariant:
                batch = label.removeprefix("decode, batch ")
                theirs = invariant.decode_tok_s.get(batch) if batch != label else invariant.prefill_tok_s
                cells.append(f"{theirs:,.0f}" if theirs else "-")
            out.append(_row(cells, point, rival))
        if "judge" in result:
            point = result["judge"]
            cells = ["judge workload", " / ".join(f"{s:.2f}" for s in point["seconds"]) + " s"]
            if rival:
                cells.append(" / ".join(f"{s:.2f}" for s in rival["judge_s"]) + " s")
            if invariant:
                cells.append(" / ".join(f"{s:.2f}" for s in invariant.judge_s) + " s")
            out.append(_row(cells, point, rival))
        if "startup" in result:
            cold, warm = result["startup"]["cold_kernels"], result["startup"]["warm"]
            cells = ["start to first token, no kernel compiled", f"{cold['total']:.1f} s"]
            theirs = rival["startup_s"] if rival else None
            if rival:
                cells.append(f"{theirs:.1f} s" if theirs else "-")
            if invariant:
                cells.append(f"{invariant.startup_s:.1f} s" if invariant.startup_s else "-")
            ratio = {"ratio": theirs / cold["total"]} if theirs else {}
            out.append(_row(cells, ratio, rival))
            if warm:
                best = min(start["total"] for start in warm)
                blanks = ["-"] * (bool(rival) + bool(invariant))
                out.append(_row(["start to first token, later", f"{best:.1f} s", *blanks], {}, rival))
        out.append("")
        if rival:
            out += [
                f"vLLM's figures: {rival['origin']}. Ours: the second of two passes; graphs are captured in the first.",
                "",
            ]
    return out


def _row(cells: list[str], point: dict[str, Any], rival: object) -> str:
    if rival:
        cells = [*cells, f"**{point['ratio']:.2f}**" if "ratio" in point else "-"]
    limit = f"{point['of_limit']:.0%} ({point['bound']})" if "of_limit" in point else "-"
    return "| " + " | ".join([*cells, limit]) + " |"


def _packed(found: Results) -> list[str]:
    if not found.packed:
        return []
    rival = peer.committed("8b-awq")
    plain = found.engine.get("8b")
    columns: list[tuple[str, dict[str, str]]] = []
    for model, result in found.packed.items():
        cells = {
            label: f"{point['tok_s']:,.0f} ({point['of_limit']:.0%})" for label, point in _points(result)
        }
        if "judge" in result:
            cells["judge workload"] = " / ".join(f"{s:.2f}" for s in result["judge"]["seconds"]) + " s"
        columns.append((QUANTIZED[model].removeprefix("Llama-3-8B, "), cells))
    if plain:
        cells = {label: f"{point['tok_s']:,.0f}" for label, point in _points(plain)}
        if "judge" in plain:
            cells["judge workload"] = " / ".join(f"{s:.2f}" for s in plain["judge"]["seconds"]) + " s"
        columns.append(("bfloat16", cells))
    if rival:
        cells = {f"decode, batch {batch}": f"{rate:,.0f}" for batch, rate in rival.decode_tok_s.items()}
        cells["judge workload"] = " / ".join(f"{s:.2f}" for s in rival.judge_s) + " s"
        cells |= {
            label: f"{rival.prefill_tok_s:,.0f}" for label in columns[0][1] if label.startswith("prefill")
        }
        columns.append((f"{rival.name}, AWQ", cells))
    out = [
        "## Quantized weights that stay packed",
        "",
        *_paragraph(
            'Llama-3-8B shapes with `weights = "packed"`: tokens a second, and the share of the roofline where the '
            "packed bytes are what must move. bfloat16 was measured in another session"
            + (f", and so was {rival.name} ({rival.origin})." if rival else ".")
        ),
        "| | " + " | ".join(name for name, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for label in columns[0][1]:
        out.append(f"| {label} | " + " | ".join(cells.get(label, "-") for _, cells in columns) + " |")
    return [*out, ""]


def _products(found: Results) -> list[str]:
    if found.products is None:
        return []
    made, few, many = found.products["products"], ("1", "16"), "4096"
    out = ["### One product", ""]
    out += _paragraph(
        "The packed bytes a second over the copy bandwidth, of the widest weight (gate and up) and the longest (down), "
        "at few rows, which are bound by memory and by unpacking; and at many the speed over that of the bfloat16 "
        f"product. {found.products['differ']} kinds have other bits than the plain product of their weights "
        "(`bench/quantized_products.py`)."
    )
    out += ["| | gate, up: 1 / 16 rows | down: 1 / 16 rows | gate, up: 4,096 rows | down: 4,096 rows |"]
    out += ["|---|---|---|---|---|"]
    for kind in made["gate, up"]["1"]:
        cells = [
            " / ".join(f"{made[part][rows][kind]['of_copy']:.0%}" for rows in few)
            for part in ("gate, up", "down")
        ]
        cells += [f"{made[part][many][kind]['of_bf16_rate']:.2f}" for part in ("gate, up", "down")]
        out.append(f"| {kind} | {' | '.join(cells)} |")
    return [*out, ""]


def _roofline(found: Results, figures: Figures) -> list[str]:
    points: list[plots.Point] = []
    for model, result in found.engine.items():
        for label, point in _points(result):
            name = label.replace("decode, batch ", "b=").split(",")[0]
            intensity = point["flops"] / point["bytes"]
            rate = point["flops"] / point["seconds"][-1]
            points.append(plots.Point(MODELS[model], name, intensity, rate))
            if "ratio" in point:
                points.append(plots.Point(MODELS[model], name, intensity, rate / point["ratio"], ring=True))
    limits = next(iter(found.engine.values()))["limits"]
    if not points or limits is None:
        return []
    title = "Achieved arithmetic under the measured roof" + " (rings: vLLM)" * any(p.ring for p in points)
    svg = plots.roofline(title, limits["flops"], limits["bytes"], points, "vLLM")
    caption = (
        "Roofline: operations a second over operations a byte, for prefill and for decode at each batch size"
    )
    return ["## Roofline", "", *figures.show("roofline", svg, caption),
            *_paragraph("Operations and bytes are the least that the work needs: the roof's height over a point's is "
                        "its time over the limit's.")]  # fmt: skip


def _same_bits(found: Results) -> list[str]:
    if not found.invariance:
        return []
    models = list(found.invariance)
    count = next(iter(found.invariance.values()))["requests"]
    out = [
        "## The same bits in any company",
        "",
        *_paragraph(
            f"Of {count} requests of mixed lengths, greedy and sampled: how many have other token ids or logprobs than "
            "in a batch of 256 with chunks of 2,048 and a cold cache (`bench/invariance.py`). Qwen2.5-1.5B has its own "
            "weights here, Q4_K_M."
        ),
        "| setting | " + " | ".join((MODELS | QUANTIZED)[model] for model in models) + " |",
        "|---|" + "---|" * len(models),
    ]
    settings = [row["setting"] for row in found.invariance[models[0]]["settings"]][1:]
    for setting in settings:
        cells = []
        for model in models:
            rows = {row["setting"]: row for row in found.invariance[model]["settings"]}
            row = rows.get(setting)
            preempted = f" ({row['preemptions']} preemptions)" if row and row["preemptions"] else ""
            cells.append(f"{row['differ']}{preempted}" if row else "-")
        out.append(f"| {setting} | " + " | ".join(cells) + " |")
    return [*out, ""]


def _cost(found: Results) -> list[str]:
    if found.cost is None:
        return []
    models = {model: steps for model, steps in found.cost["models"].items() if model in MODELS}
    rows = list(next(iter(models.values())))
    out = [
        "## What it costs",
        "",
        *_paragraph(
            "The kernels of a layer as they serve, over the fastest choice of our own kernels for each shape where the "
            "bits may change: any tile, K in two, four or eight segments, attention without fixed chunks or splits "
            "(`bench/invariance_cost.py`). Single tokens at a context of 1,024 up to 256 rows, prompts above."
        ),
        "| rows of a step | " + " | ".join(MODELS[model] for model in models) + " |",
        "|---|" + "---|" * len(models),
    ]
    for row in rows:
        cells = " | ".join(f"{steps[row]['cost']:+.1%}" for steps in models.values())
        out.append(f"| {int(row):,} | {cells} |")
    return [*out, ""]


def _repeated(found: Results) -> list[str]:
    if found.repeated is None:
        return []
    runs = found.repeated["runs"]
    alone = [run["seconds"] for run in runs if run["alone"]]
    company = [run["seconds"] for run in runs if not run["alone"]]
    same = (
        "every run.json is the same file, byte for byte" if found.repeated["identical"] else "the runs differ"
    )
    return [
        "## A whole evaluation, again and again",
        "",
        *_paragraph(
            f"`ragate eval` of 100 items by Qwen2.5-1.5B Q4_K_M, answers by the demo pipeline, {len(runs)} times from "
            f"nothing (`bench/repeat_eval.py`): {same}. Seconds from start to exit: {alone[0]:.1f} alone with no "
            f"kernel compiled, {alone[-1]:.1f} alone later, {min(company):.1f} to {max(company):.1f} four at a time."
        ),
    ]


def _kv_slots(found: Results, figures: Figures) -> list[str]:
    rows = [(model, result["judge"]["kv"]) for model, result in found.engine.items() if "judge" in result]
    if not rows:
        return []
    out = [
        "## KV slots",
        "",
        *_paragraph(
            "Share of the allocated KV slots that hold no token, summed over the steps of the judge workload, beside "
            "what an allocator would waste on the same trace that reserves prompt + max_tokens of every running "
            "request in one piece. Blocks shared by several requests are counted once."
        ),
        "| | unused, paged | unused, contiguous | slots held, paged to contiguous |",
        "|---|---|---|---|",
    ]
    for model, kv in rows:
        shares = [f"{kv[name]:.2%}" for name in ("unused_share", "contiguous_unused_share")]
        out.append(f"| {MODELS[model]} | {' | '.join(shares)} | {kv['held_to_contiguous']:.0%} |")
    out.append("")
    model, kv = rows[-1]
    if kv["over_time"]:
        series = {
            name: [(row["s"], row[key]) for row in kv["over_time"]]
            for name, key in (("paged", "paged"), ("contiguous", "contiguous"))
        }
        title = f"Unused share of held KV slots, judge workload, {MODELS[model]}"
        svg = plots.lines(title, series, "seconds")
        out += figures.show("kv", svg, f"{title}: paged blocks and a contiguous allocator over time")
    return out


def _start_up(found: Results, figures: Figures) -> list[str]:
    rows: list[plots.Bar] = []
    for model, result in found.engine.items():
        if "startup" not in result:
            continue
        cold, warm = result["startup"]["cold_kernels"], result["startup"]["warm"]
        for name, start in [("kernels cold", cold)] + [("later", start) for start in warm[-1:]]:
            parts = tuple((shown, start[phase]) for phase, shown in PHASES.items())
            rows.append(plots.Bar(f"{MODELS[model]}, {name}", parts, f"{start['total']:.1f} s"))
    if not rows:
        return []
    svg = plots.bars("Seconds from process start to the first token", rows, "s")
    return [
        "## Start-up",
        "",
        *_paragraph(
            "A fresh process, safetensors in the page cache; the first bar of a model finds no compiled kernel."
        ),
        *figures.show("startup", svg, "Seconds from process start to the first token, by phase"),
    ]


def _kernels(found: Results, figures: Figures) -> list[str]:
    if found.kernels is None:
        return []
    out = [
        "## Time by kernel",
        "",
        *_paragraph(
            "Shares of the card's time in one step of the judge workload, each kernel alone (`bench/kernel_times.py`). "
            "As served a step takes less than their sum, since a kernel is set up while the one before it ends."
        ),
    ]
    for model, steps in found.kernels["models"].items():
        if model not in MODELS:
            continue
        totals: dict[str, float] = {}
        for step in steps.values():
            for row in step["kernels"]:
                totals[row["name"]] = totals.get(row["name"], 0.0) + row["share"]
        kept = sorted(totals, key=lambda name: -totals[name])[: plots.COLOURS - 1]
        rows = []
        for label, step in steps.items():
            shares = {row["name"]: row["us"] for row in step["kernels"]}
            parts = [(name, shares.get(name, 0.0)) for name in kept]
            rest = sum(us for name, us in shares.items() if name not in kept)
            wall = (
                f"{step['wall_us'] / 1e3:.2f} ms" if step["wall_us"] >= 1e3 else f"{step['wall_us']:.0f} us"
            )
            note = f"{wall} as served"
            rows.append(plots.Bar(label, (*parts, ("the others", rest)), note))
        title = f"Time by kernel, {MODELS[model]}"
        svg = plots.bars(title, rows, "us", shares=True)
        out += figures.show(
            f"kernels-{model}", svg, f"{title}: shares of one decode step and one prefill step"
        )
    return out


def _soak(found: Results) -> list[str]:
    if found.soak is None:
        return []
    s = found.soak
    drift = ", ".join(f"{name.replace('_', ' ')} {value:+.1f} MiB" for name, value in s["memory"].items())
    problems = "; ".join(s["problems"]) or "every future was resolved and equal requests got equal answers"
    return [
        "## Soak",
        "",
        *_paragraph(
            f"{s['requests']:,} short requests from several threads in {s['seconds']:.0f} s (`bench/soak.py`): "
            f"{s['aborted']:,} aborted at random, {s['preemptions']:,} preemptions in a small pool, {s['checks']} "
            f"checks of the block pool's invariants; {problems}. Memory from a fifth of the way to the end: {drift}."
        ),
    ]


def _ceilings(found: Results) -> list[str]:
    if found.limits is None:
        return []
    out = ["## What the card does at best", "", "| | |", "|---|---|"]
    for name, value in found.limits["limits"].items():
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            what, _, unit = name.rpartition("_")
            shown = f"{number:,.2f}" if number < 100 else f"{number:,.0f}"
            unit = {"GBps": "GB/s", "TFLOPs": "TFLOP/s"}.get(unit, unit)
            out.append(f"| {what.replace('_', ' ')}{f', {part}' if part else ''} | {shown} {unit} |")
    return [*out, ""]


def _how_to(found: Results) -> list[str]:
    out = ["## How to measure it again", "", "| result | made by | on | commit |", "|---|---|---|---|"]
    for name, result in found.files.items():
        commit = (result.get("commit") or "")[:10] or "-"
        link = f"[{name}](../bench/results/{name})"
        out.append(f"| {link} | `{result['command']}` | {result['date'][:10]} | {commit} |")
    return [*out, ""]


if __name__ == "__main__":
    main()
