"""bench/results/quality-*.json -> docs/quantization.md: what each format costs, ours beside what others published.

usage: python bench/quantization_page.py
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.result import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "quantization.md"


@dataclass(frozen=True)
class Published:
    """What others measured, over the perplexity of the same model in 16 bits."""

    format: str
    """As our names of formats begin, without the group; the int4 figures are of groups of 128."""
    model: str
    perplexity: float
    base: float
    source: str
    note: str = ""
    kl: float | None = None
    same_top: float | None = None

    @property
    def over(self) -> float:
        """Share of the perplexity that is added."""
        return self.perplexity / self.base - 1


AWQ_PAPER = "[Lin et al. 2023](https://arxiv.org/abs/2306.00978), table 4"
LLAMA_CPP = "[llama.cpp](https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md)"
_L3 = 6.231633
"""Llama-3-8B in float16, as each row's difference implies; rounded logits on disk make it 6.2332 in its own row."""
PUBLISHED = (
    Published("rtn4", "Llama-2-7B", 5.73, 5.47, AWQ_PAPER),
    Published("gptq4", "Llama-2-7B", 5.69, 5.47, AWQ_PAPER),
    Published("gptq4", "Llama-2-7B", 5.63, 5.47, AWQ_PAPER, "reordered"),
    Published("awq4", "Llama-2-7B", 5.60, 5.47, AWQ_PAPER),
    Published("Q8_0", "Llama-3-8B", 6.234284, _L3, LLAMA_CPP, "", 0.001355, 0.97674),
    Published("Q6_K", "Llama-3-8B", 6.253382, _L3, LLAMA_CPP, "", 0.005452, 0.96031),
    Published("Q5_K_M", "Llama-3-8B", 6.288607, _L3, LLAMA_CPP, "", 0.010762),
    Published("Q4_K_M", "Llama-3-8B", 6.407115, _L3, LLAMA_CPP, "", 0.031273, 0.91901),
    Published("Q4_0", "Llama-3-8B", 6.700147, _L3, LLAMA_CPP, "", 0.071940),
    Published("Q2_K", "Llama-3-8B", 9.751568, _L3, LLAMA_CPP, "", 0.445132, 0.71138),
)


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page. Raises FileNotFoundError where there is no result at all."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("quality-*.json"))]
    if not found:
        raise FileNotFoundError(f"{results} has no quality-*.json: run bench/quality.py")
    times = [json.loads(path.read_text()) for path in sorted(results.glob("quantize-*.json"))]
    sections = [_head(), *(_model(group) for group in _alike(found)), _times(times), _published()]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(line for section in sections for line in section))
    print(page)


def _alike(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results whose rows stand in one table: of one model, on one kind of device, over the same text and items, and
    calibrated alike."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        key = json.dumps([each[field] for field in ("model", "device", "reference", "text", "judge")])
        key += _seen(each) if each["calibration"]["sequences"] else ""
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def _head() -> list[str]:
    return [
        "# What a format costs",
        "",
        *_paragraph(
            "Made by `python bench/quantization_page.py` from [bench/results](../bench/results); of the figures below, "
            "only those marked as published are typed in. The command under a table makes it again; one row alone is "
            "the same command with that format."
        ),
        *_paragraph(
            "**bits a weight** are the whole file's: embeddings that stay in 16 bits count, and finer types that stand "
            "in for blocks of 256 where rows are no multiple of that. **perplexity** is of held-out text; **over the "
            "reference** what the format adds to it. **KL** is the mean Kullback-Leibler divergence from the reference "
            "of what is foretold of the next token, in nats: it sees changes that cancel out in perplexity. **same "
            "token**: how often both find the same token likeliest. **verdicts**: the model as judge is asked, as "
            "`ragate eval` asks, whether an answer follows from its contexts (RAGTruth, greedy, under the schema); on "
            "how many items it says what the reference says, and what people said. **P moved**: the mean change of the "
            "probability of a yes. After ± stands a standard error, from how windows of text differ."
        ),
    ]


def _model(results: list[dict[str, Any]]) -> list[str]:
    first = results[0]
    text, judge, reference = first["text"], first["judge"], first["reference"]
    device = "a card" if first["device"] == "cuda" else "a CPU"
    questions = f" {judge['items']} items of {judge['file']}." if judge["items"] else ""
    named = {row["name"]: row for each in results for row in each["formats"]}  # the reference is in each
    rows = list(named.values())
    out = [
        f"## {Path(first['model']).name}, on {device}",
        "",
        *_paragraph(
            f"{first['hardware']}. {text['windows']} windows of {text['length']} tokens of {text['file']} "
            f"({text['positions']:,} predictions).{questions} {_calibrated(results)}"
        ),
        *_paragraph(f"{_truth(reference['quantization'], rows)} {_bias(rows)}".strip()),
        "| format | MB | bits a weight | perplexity | over the reference | published | KL, nats | published | "
        "same token | verdicts as the reference's | as people's | P moved |",
        "|---|" + "---:|" * 11,
        *(_row(row, reference["quantization"]) for row in rows),
        "",
    ]
    commands = dict.fromkeys(each["command"] for each in results)
    return [*out, "```bash", *commands, "```", ""]


def _times(found: list[dict[str, Any]]) -> list[str]:
    """How long quantizing takes; nothing where it was not measured."""
    if not found:
        return []
    rows = [
        f"| {each['model']} | {each['method']}, {each['bits']} bits, group {each['group']} | {each['hardware']} | "
        f"{each['seconds'] / 60:.1f} | {each['bytes'] / 1e9:.2f} | {each['peak_bytes'] / 1e9:.1f} |"
        for each in found
    ]
    commands = [each["command"] for each in found]
    head = [
        "| model | method | on | minutes | GB made | GB of memory at most |",
        "|---|---|---|---:|---:|---:|",
    ]
    return ["## How long it takes", "", *head, *rows, "", "```bash", *commands, "```", ""]


def _calibrated(results: list[dict[str, Any]]) -> str:
    found = {
        f"Calibrated on {each['calibration']['tokens']:,} tokens of {_seen(each)}."
        for each in results
        if each["calibration"]["sequences"]
    }
    return " ".join(sorted(found))


def _seen(found: dict[str, Any]) -> str:
    """What was calibrated on, in words."""
    testset = found["calibration"]["testset"]
    return (
        "the same pages, none of them scored" if testset == "text" else f"prompts for the test set {testset}"
    )


def _truth(quantization: str, rows: list[dict[str, Any]]) -> str:
    """What the reference's own weights mean for the figures."""
    if quantization.lower() in ("bfloat16", "float16", "float32", "bf16", "f16", "f32"):
        return f"The reference has its weights in {quantization}."
    if " + " in quantization:
        base, adapter = quantization.split(" + ")
        return f"The reference is a {base} file, unpacked, with the adapter {adapter} added to it in float32."
    own = [row["name"] for row in rows if _is_own(row, quantization)]
    copied = f" {', '.join(own)} is that very format: its bytes are mostly copied." if own else ""
    return (
        f"The reference is itself a {quantization} file, unpacked: its weights already lie on a grid, which some "
        f"formats meet better than they would meet weights that were never rounded.{copied}"
    )


def _bias(rows: list[dict[str, Any]]) -> str:
    """What agreement with the reference's verdicts is worth: little, where it always says the same."""
    said = next((row["judge"] for row in rows if row["name"] == "reference"), None)
    if not said:
        return ""
    return (
        f"As judge it finds {said['says_faithful']} of {said['items']} answers faithful, people "
        f"{said['labelled_faithful']}."
    )


def _is_own(row: dict[str, Any], quantization: str) -> bool:
    return bool(row["name"] == row["quantization"] == quantization)


def _row(row: dict[str, Any], quantization: str) -> str:
    cells = [
        f"**{row['name']}** ({quantization})" if row["name"] == "reference" else row["name"],
        f"{row['bytes'] / 1e6:,.0f}",
        f"{row['bits_a_weight']:.2f}",
        f"{row['perplexity']:.3f}",
    ]
    judge = row["judge"]
    told = ["-"] * 3
    if judge:
        moved = "-" if judge["p_moved"] is None else f"{judge['p_moved']:.3f}"
        count = judge["items"]
        told = [f"{judge['as_reference']} of {count}", f"{judge['as_label']} of {count}", moved]
    if row["name"] == "reference":
        told = ["-", told[1], "-"]
        return f"| {' | '.join([*cells, *['-'] * 5, *told])} |"
    known = [each for each in PUBLISHED if each.format == re.sub(r"-g\d+.*", "", row["name"])]
    ratio = math.exp(row["nats_over"])
    cells += [
        f"{ratio - 1:+.2%} ± {ratio * row['nats_over_se']:.2%}",
        "; ".join(f"{each.over:+.2%} {each.note}".strip() for each in known) or "-",
        f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
        "; ".join(f"{each.kl:.5f}" for each in known if each.kl is not None) or "-",
        f"{row['same_top']:.1%}",
    ]
    return f"| {' | '.join([*cells, *told])} |"


def _published() -> list[str]:
    out = [
        "## Published figures",
        "",
        *_paragraph(
            "Of larger models, which lose less to the same format, and on WikiText-2: they show the order of the "
            "formats, not the size of the differences. The int4 figures are of groups of 128. Our GPTQ takes columns "
            "in the order of their activations, but groups are of neighbours, so that the file loads anywhere."
        ),
        "| format | model | perplexity | in 16 bits | over it | KL, nats | same token | source |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for each in PUBLISHED:
        name = f"{each.format}, {each.note}" if each.note else each.format
        kl = "-" if each.kl is None else f"{each.kl:.5f}"
        same = "-" if each.same_top is None else f"{each.same_top:.1%}"
        out.append(
            f"| {name} | {each.model} | {each.perplexity:.2f} | {each.base:.2f} | {each.over:+.2%} | {kl} | {same} | "
            f"{each.source} |"
        )
    return [*out, ""]


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False), ""]


if __name__ == "__main__":
    main()
