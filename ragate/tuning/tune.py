"""`ragate judge tune`: lessons become an adapter, with the curve of its learning and a card that says what it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragate.errors import ConfigError
from ragate.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ragate.suite import Say
    from ragate_engine import Checkpoint, Example, TuneRecipe, TuneReport, TuneStep

CURVE, CARD = "learning-curve.svg", "README.md"
HELD_OUT = 400
"""Held-out lessons that the loss is looked at on, at most."""
SMOOTH = 0.02
"""Share of the steps that a point of the curve is the mean of."""


@dataclass(frozen=True)
class Source:
    """Where lessons come from: labelled data in a folder, or files of examples made from it before."""

    data: Path | None
    halueval: Path | None
    size: int
    seed: int
    examples: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()

    def describe(self) -> str:
        """In words, for the card."""
        if self.data is None:
            files = ", ".join(path.name for path in self.examples)
            return f"the first {self.size:,} at most of {files}, made by `python -m ragate.tuning`"
        return f"{self.size:,} lessons, seed {self.seed}, made by `python -m ragate.tuning`"


def tune(
    model: str,
    folder: Path,
    source: Source,
    recipe: TuneRecipe,
    device: str,
    say: Say,
    on_step: Callable[[TuneStep], None],
) -> tuple[TuneReport, str]:
    """Train an adapter of `model`, a catalogue name or a path, into `folder`; called again it resumes.

    Also says of what it is: of a judge that wears an adapter the model beneath, for training begins anew. Raises
    RagateError, the engine's errors. Imports torch, and ragas where lessons are made.
    """
    from filelock import FileLock, Timeout

    from ragate import catalog
    from ragate_engine import open_checkpoint, tune_adapter

    choice = catalog.resolve_judge(model, progress=lambda done, total: say("fetching the model", done, total))
    base = choice.base or str(choice.path)
    checkpoint = open_checkpoint(choice.path)
    examples, held_out = _examples(source, checkpoint, say)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            report = tune_adapter(checkpoint, examples, folder, recipe, device, on_step, held_out=held_out)
            rows = json.loads((folder / "tuning.json").read_text(encoding="utf-8"))["steps"]
            write_whole(folder / CURVE, curve(rows))
            write_whole(folder / CARD, card(Path(base).name, folder, source, recipe, report))
    except Timeout:
        raise ConfigError(
            f"{folder}: another `ragate judge tune` is writing there; name another folder"
        ) from None
    return report, base


def _examples(
    source: Source, checkpoint: Checkpoint, say: Say
) -> tuple[Sequence[Example], Sequence[Example]]:
    """What to learn and what to look at. Raises ConfigError, TestSetError."""
    from ragate.tuning.examples import examples_of, load_examples

    if source.data is None:
        return load_examples(*source.examples)[: source.size], load_examples(*source.held_out)[:HELD_OUT]
    from ragate.tuning.recipe import build

    if checkpoint.tokenizer is None:
        raise ConfigError(f"{checkpoint.path} has no tokenizer: add its tokenizer.json")
    found = []
    for i, held_out in enumerate((False, True)):
        say("making lessons", i, 2)
        size = HELD_OUT if held_out else source.size
        lessons = build(source.seed, size, source.data, halueval=source.halueval, held_out=held_out)
        found.append(examples_of(lessons, checkpoint.tokenizer))
    say("making lessons", 2, 2)
    return found[0], found[1]


def curve(rows: Sequence[dict[str, Any]]) -> str:
    """The losses of a run's steps, smoothed, as an SVG that reads on light and on dark pages."""
    width, height, left, top = 640, 240, 48, 28
    span = max(1, round(SMOOTH * len(rows)))
    losses = [row["loss"] for row in rows]
    means = [sum(losses[max(0, i + 1 - span) : i + 1]) / min(span, i + 1) for i in range(len(losses))]
    looks = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    highest = max([*means, *(loss for _, loss in looks)]) or 1.0

    def place(step: int, loss: float) -> str:
        x = left + (step - 1) / max(1, len(rows) - 1) * (width - left - 12)
        return f"{x:.1f},{top + (1 - loss / highest) * (height - top - 32):.1f}"

    line = " ".join(place(row["step"], mean) for row, mean in zip(rows, means, strict=True))
    marks = [
        f'<circle class="held" r="3.5" cx="{x}" cy="{y}"/>'
        for x, y in (place(*look).split(",") for look in looks)
    ]
    said = f"{means[-1]:.3f} at the end" + (f", held out {looks[-1][1]:.3f}" if looks else "")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="Loss by step: {escape(said)}">',
            "<style>text{font:12px system-ui,sans-serif;fill:#1f2328}.a{stroke:#59636e;fill:none}.page{fill:#fff}"
            ".loss{stroke:#2f6fde;stroke-width:2;fill:none}.held{fill:#d9642b}"
            "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.a{stroke:#9198a1}}</style>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            f'<text x="{left}" y="18">Loss of a trained token: {escape(said)}; dots: held-out lessons</text>',
            f'<path class="a" d="M{left},{top}V{height - 32}H{width - 12}"/>',
            f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{highest:.2f}</text>',
            f'<text x="{left - 6}" y="{height - 32}" text-anchor="end">0</text>',
            f'<text x="{width - 12}" y="{height - 12}" text-anchor="end">step {len(rows)}</text>',
            f'<polyline class="loss" points="{line}"/>',
            *marks,
            "</svg>\n",
        ]
    )


def card(model: str, folder: Path, source: Source, recipe: TuneRecipe, report: TuneReport) -> str:
    """The model card, in Markdown: what it is, of what and how it was made, and what is not known of it."""
    settings = "\n".join(f"| {name} | {_cell(value)} |" for name, value in asdict(recipe).items())
    held_out = "not looked at" if report.held_out is None else f"{report.held_out:.4f}"
    return f"""# {folder.resolve().name}

A LoRA adapter for {model} as a judge of RAG answers under ragas' prompts (ragate). It is worn with
`--judge {model} --adapter {folder.name}`, or merged by anything that reads PEFT's layout.

- Lessons: {source.describe()}. None of their text is in this folder.
- {report.parameters:,} weights; {report.steps:,} steps over {report.tokens:,} tokens
  ({report.computed_tokens:,} computed) in {report.seconds:,.0f} s.
- Loss of the last step {report.loss:.4f}, of held-out lessons {held_out}.
- Bits depend on the card or the number of CPU threads; `tuning.json` has every step, `{CURVE}` draws them.

![Loss by step]({CURVE})

| recipe | |
|---|---|
{settings}

## Limits

English; answers about passages as RAG systems retrieve them. How well it judges is not known from its loss: measure it
on answers that people labelled, of the kind you have:

    ragate judge calibrate DATA.jsonl --judge {model} --adapter {folder.name}
"""


def _cell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
