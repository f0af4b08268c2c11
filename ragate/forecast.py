"""`ragate eval --dry-run`: the calls, tokens and time that an evaluation would take, from its prompts alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragate.endpoint import is_url, shown
from ragate.errors import CatalogError, RunError
from ragate.metrics import way_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ragate.config import Settings
    from ragate.run import ItemRecord, Run
    from ragate.testset import Item, TestSet
    from ragate_engine.weights import Checkpoint

USUAL_OUTPUT = {"context_precision": 42, "context_recall": 200, "faithfulness": 180, "answer_relevance": 37}
"""Tokens of an answer of the judge, where no run of the suite tells (SmolLM2-135M, testsets/llm-serving)."""
CHARS_A_TOKEN = 4
"""Where the judge's tokenizer is not at hand."""
REACHED = {"cpu": (0.19, 0.35), "cuda": (0.1, 0.2)}
"""The least time that the machine allows, as a share of what whole evaluations took: SmolLM2-135M on 2 cores,
Qwen2.5-1.5B on an H200 (bench/results/eval-*.json)."""


@dataclass(frozen=True)
class Forecast:
    """What an evaluation would take."""

    suite: str
    items: int
    reserve: int
    """Items that are judged on top where the others cannot tell."""
    metrics: tuple[str, ...]
    judge: str
    calls: int
    distinct: int
    """Calls that are computed: equal prompts are asked once."""
    prompt_tokens: int
    computed_tokens: int | None
    """Of those, not in the prefix cache; `None` without the judge's tokenizer."""
    output_tokens: int
    device: str | None
    rates: str | None
    """How the machine's rates are known."""
    seconds: tuple[float, float, float] | None
    """The least that the machine allows, and between what it usually is; `None` where the judge runs elsewhere."""
    notes: tuple[str, ...]
    """What stands in for what is not known yet."""


def forecast(settings: Settings, *, update: bool = False) -> Forecast:
    """What `ragate eval` would take with these settings; `update` as for a run that becomes the baseline.

    Every prompt is made as for the judging. Imports ragas and torch (seconds). Raises RagateError.
    """
    from ragate.suite import load_suite, out_folder

    testset = load_suite(settings)
    if testset.reserve and (settings.reserve == "always" or (update and settings.reserve == "auto")):
        testset = testset.with_reserve()
    earlier = _earlier(out_folder(settings, testset.name) / "run.json")
    records, notes = _records(testset, earlier, settings)
    checkpoint, name, missing = _judge(settings)
    notes += missing
    prompts = asyncio.run(calls_of(records, settings))
    outputs = _outputs(earlier, settings)
    distinct = list(dict.fromkeys(prompts))
    output = sum(outputs[metric] for metric, _ in distinct)
    ids = None
    if checkpoint is not None and checkpoint.tokenizer is not None:
        encode = checkpoint.tokenizer.encode_chat
        ids = [encode([{"role": "user", "content": prompt}]) for _, prompt in distinct]
        sent, computed = sum(map(len, ids)), _computed(ids)
    else:
        sent, computed = sum(len(prompt) // CHARS_A_TOKEN for _, prompt in distinct), None
        notes.append(f"a token is taken to be {CHARS_A_TOKEN} characters: the judge's tokenizer is not here")
    if earlier is None:
        notes.append("answers of the judge are taken to be of the usual length; a stored run would tell")
    device = rates = seconds = None
    if checkpoint is not None and ids is not None and computed is not None:
        device, rates, seconds = _seconds(checkpoint, settings, ids, computed, output)
    return Forecast(
        suite=testset.name,
        items=len(testset.items),
        reserve=len(testset.reserve),
        metrics=settings.metrics,
        judge=name,
        calls=len(prompts),
        distinct=len(distinct),
        prompt_tokens=sent,
        computed_tokens=computed,
        output_tokens=output,
        device=device,
        rates=rates,
        seconds=seconds,
        notes=tuple(notes),
    )


def _earlier(path: Path) -> Run | None:
    """The suite's last run, where there is one that can be read."""
    from ragate.run import load_run

    try:
        return load_run(path)
    except RunError:
        return None


def _records(testset: TestSet, earlier: Run | None, settings: Settings) -> tuple[list[ItemRecord], list[str]]:
    """The items as they would be judged; for a target's answers those of the last run stand in, or the references."""
    before = {record.id: record for record in earlier.items} if earlier else {}
    stored = settings.target == "stored"
    notes = []
    if not stored:
        known = sum(item.id in before for item in testset.items)
        source = "those of the last run" if known else "the test set's, or else the references"
        notes.append(f"{shown(settings.target)} is not asked: answers and contexts are taken to be {source}")
    records = [record_of(item, None if stored else before.get(item.id)) for item in testset.items]
    return records, notes


def record_of(item: Item, old: ItemRecord | None = None) -> ItemRecord:
    """The item as it would be judged; where a target is to answer, `old`, the item or its reference stands in."""
    from ragate.run import ItemRecord

    reference = (item.reference,) if item.reference else ()
    return ItemRecord(
        id=item.id,
        question=item.question,
        reference=item.reference,
        answer=(old.answer if old else None) or item.answer or item.reference,
        contexts=(old.contexts if old else ()) or item.contexts or reference,
    )


def _judge(settings: Settings) -> tuple[Checkpoint | None, str, list[str]]:
    """The judge's header where it is a file here, its name, and what to say where it is not."""
    from ragate.suite import local_judge
    from ragate_engine import open_checkpoint

    if is_url(settings.judge):
        return None, shown(settings.judge), ["how long an endpoint takes is not known"]
    try:
        choice = local_judge(settings, pull=False)
    except CatalogError as error:
        return None, settings.judge, [f"time is not known: {error}"]
    return open_checkpoint(choice.path), choice.title, []


async def calls_of(records: Sequence[ItemRecord], settings: Settings) -> list[tuple[str, str]]:
    """(metric, prompt) of every call, in the order in which the judge gets them."""
    from ragate.judge import prompts_of
    from ragate.metrics import metrics_named

    return [
        (metric.name, prompt)
        for metric in metrics_named(settings.metrics, settings.statements)
        for record in records
        if metric.missing(record) is None
        for prompt in await prompts_of(metric, record)
    ]


def _outputs(earlier: Run | None, settings: Settings) -> dict[str, int]:
    """Metric -> tokens of an answer of the judge: as in the last run, else the usual."""
    found = {name: USUAL_OUTPUT.get(name, 100) for name in settings.metrics}
    way = way_of(earlier.fingerprint) if earlier else "judge"
    for name in settings.metrics:
        if name == "faithfulness" and way != settings.statements:  # calls of another kind
            continue
        keys = (
            {key for score in earlier.scores if score.metric == name for key in score.calls}
            if earlier
            else set()
        )
        tokens = [earlier.calls[key].output_tokens for key in keys if key in earlier.calls] if earlier else []
        if tokens:
            found[name] = round(sum(tokens) / len(tokens))
    return found


def _computed(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that a prefix cache which forgets nothing does not hold: whole blocks are shared, the last token never."""
    from ragate_engine.config import BLOCK_SIZE

    seen: set[int] = set()
    computed = 0
    for ids in prompts:
        chain, cached, matching = 0, 0, True
        for start in range(0, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
            chain = hash((chain, *ids[start : start + BLOCK_SIZE]))
            matching = matching and chain in seen
            if matching:
                cached = start + BLOCK_SIZE
            seen.add(chain)
        computed += len(ids) - min(cached, len(ids) - 1)
    return computed


def _seconds(
    checkpoint: Checkpoint, settings: Settings, prompts: Sequence[Sequence[int]], computed: int, output: int
) -> tuple[str, str, tuple[float, float, float]]:
    """The device, how its rates are known, and the least and the usual time."""
    from ragate.advise import machine
    from ragate_engine import budget, weight_bytes
    from ragate_engine.roofline import Shape, Work
    from ragate_engine.runner import CPU_BATCH

    here = machine(settings.device)
    kept = "bf16" if here.card else "float32"
    plain = Shape(checkpoint.config)
    weights = weight_bytes(checkpoint.config, checkpoint.forms, kept).read  # type: ignore[arg-type]
    shape = Shape(
        checkpoint.config, weights / (plain.layer_weights + plain.head_weights), 2 if here.card else 4
    )
    batch = settings.max_batch or (budget.CARD_BATCH if here.card else CPU_BATCH)
    context = sum(map(len, prompts)) / max(len(prompts), 1)
    # steps of full batches; the longest answers run on while others have ended
    steps = output / max(min(batch, len(prompts)), 1)
    first = shape.rows(computed, len(prompts), computed * context / 2)
    then = shape.rows(output, output, output * context) + Work(0, shape.kv_bytes * output * context)
    then += Work(0, steps * shape.weights_read().bytes)
    least = here.rates.seconds(first) + here.rates.seconds(then)
    low, high = REACHED["cuda" if here.card else "cpu"]
    return here.name, here.rates.origin, (least, least / high, least / low)


def lines_of(found: Forecast) -> list[tuple[str, str]]:
    """(what, how much) for people."""
    reserve = f", and {found.reserve} in reserve where they cannot tell" if found.reserve else ""
    same = found.calls - found.distinct
    lines = [
        ("suite", f"{found.suite}: {found.items} items{reserve}; {', '.join(found.metrics)}"),
        ("judge", found.judge),
        ("calls", f"{found.calls:,}" + (f", {same:,} of them asked before" if same else "")),
        ("tokens in", f"{found.prompt_tokens:,}"),
        ("tokens out", f"about {found.output_tokens:,}"),
    ]
    if found.computed_tokens is not None:
        share = found.computed_tokens / max(found.prompt_tokens, 1)
        lines[3] = (
            "tokens in",
            f"{found.prompt_tokens:,}; {found.computed_tokens:,} ({share:.0%}) are computed,",
        )
        lines.insert(4, ("", "the rest is beginnings that prompts share"))
    if found.seconds is not None:
        least, low, high = (duration(value) for value in found.seconds)
        low = low.removesuffix(high[-4:]) if low.endswith(high[-4:]) else low  # 2 to 4 min
        lines.append(("time", f"{low} to {high} on {found.device}, and loading; never under {least}"))
        lines.append(("rates", str(found.rates)))
    return lines


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
