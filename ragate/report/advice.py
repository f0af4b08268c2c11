"""The advice of `ragate models advise` in a terminal: a table of formats, the advice, what the numbers mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragate.advise import gib
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from rich.console import Console

    from ragate.advise import Advice, Speed


def print_advice(console: Console, advice: Advice) -> None:
    """The machine, a row a format with the advised one marked, the reason, and what the numbers mean."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    on_card = advice.kv_gib is None
    title = f"{advice.model}: {advice.parameters / 1e9:.2f} billion weights, {advice.quantization}; {advice.device}"
    console.print(Text(plain(title), "bold"), soft_wrap=True)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("  format", no_wrap=True)
    middle = ["requests\nat once", "with\nfp8 KV"] if on_card else ["file\nGiB", "requests\nat once"]
    for name in ("weights\nGiB", *middle, "tok/s\nalone", "tok/s\nall at once", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in advice.rows:
        taken = row.name == advice.advised and not row.unpacked
        cells = (
            [f"{row.requests:,}", f"{row.requests_fp8:,}"]
            if on_card
            else [gib(row.file_bytes, ""), f"{row.requests:,}"]
        )
        name = "… as bf16" if row.unpacked else plain(row.name)
        table.add_row(
            f"{'→' if taken else ' '} {name}{' *' if row.is_file else ''}",
            gib(row.weight_bytes, ""),
            *(cells if row.refused is None else ["–"] * len(cells)),
            _rate(row.alone),
            _rate(row.together),
            row.perplexity,
            style="bold green" if taken else "dim" if row.refused else "",
        )
    console.print(table)
    console.print()
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column()
    if advice.advised:
        lines.add_row(Text(f"→ {advice.advised}", "bold green"), Text(plain(advice.why)))
        lines.add_row("", Text(plain(advice.how)))
    else:
        lines.add_row(Text("→ none", "bold red"), Text(plain(advice.why)))
    lines.add_row("", "")
    for name, note in _notes(advice).items():
        lines.add_row(Text(name, "dim"), Text(plain(note), "dim"))
    console.print(lines)


def _rate(speed: Speed | None) -> str:
    """`219/279` where an expected rate is known, else the limit alone."""
    if speed is None:
        return "–"
    limit = _number(speed.limit)
    return f"≤ {limit}" if speed.expected is None else f"{_number(speed.expected)}/{limit}"


def _number(value: float) -> str:
    if value >= 1e4:
        return f"{value / 1e3:,.{1 if value < 1e5 else 0}f}k"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _notes(advice: Advice) -> dict[str, str]:
    """What the columns mean."""
    row = advice.rows[0]
    free = f"{gib(advice.free_bytes)} of {gib(advice.total_bytes)} free"
    kv = f"a request of {advice.context:,} tokens takes {row.kv_bytes / 2**20:,.0f} MiB of KV"
    if row.kv_fp8_bytes is not None:
        memory = f"{free}; {kv} in bf16, {row.kv_fp8_bytes / 2**20:,.0f} in fp8"
        weights = 'quantized ones as codes, by weights = "packed" in ragate.toml; else the engine unpacks them to bf16'
        reached = "; m/n: m is expected, by the share that bf16 reached on an H200 with short contexts"
    else:
        memory = f"{free}; {kv} in float32, with kv_gib = {advice.kv_gib}"
        weights = "float32, but for the table of a quantized embedding: a smaller file saves neither memory nor time"
        reached = ""
    return {
        "*": "the model at hand",
        "memory": memory,
        "weights": weights,
        "tok/s": f"decoding, the context full, at most (≤){reached}",
        "rates": advice.rates,
        "perplexity": "above 16 bits, as published: Llama-3-8B 6.233; int4 by AWQ, by GPTQ of Llama-2-7B 5.47",
    }
