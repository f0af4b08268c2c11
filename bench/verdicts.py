"""What a model says as a judge: is an answer faithful to its context? Asked as `ragate eval` asks.

An item is one call: ragas' prompt for faithfulness with the whole answer as the one statement, under ragate's schema,
greedy. Splitting the answer into statements, which the judge does first in an evaluation, is left out: it would put
other questions to other formats.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.logits import let_go
from ragate.judge import EngineJudge, Judge, JudgeError
from ragate.metrics import RECORD, Record
from ragate_engine import Engine, EngineConfig
from ragate_engine.weights import Checkpoint

# after ragate.judge, which keeps ragas quiet
from ragas.metrics.collections.faithfulness.util import (  # isort: skip
    NLIStatementInput,
    NLIStatementOutput,
    NLIStatementPrompt,
)

KV_BYTES = 2 << 30
"""For the cache of a judge: others may be at work on the same device."""
LABELLED = "ragtruth_qa_dev.jsonl"
"""RAGTruth's questions, answers of six generators, and what people said of them."""


@dataclass(frozen=True)
class Item:
    """An answer and what it should follow from."""

    context: str
    answer: str
    faithful: bool
    """As people labelled it."""


@dataclass(frozen=True)
class Verdict:
    """What the judge said."""

    faithful: bool
    probability: float | None
    """P(faithful) at the token of the verdict."""


def load_items(folder: Path, count: int) -> list[Item]:
    """`count` items, evenly spaced. Raises SystemExit where the file is not there or has fewer."""
    path = folder / LABELLED
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there: name the folder of labelled data with --data, or ask for --items 0"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if count > len(rows):
        raise SystemExit(f"{path} has {len(rows)} items: ask for no more with --items")
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    return [Item("\n".join(row["contexts"]), row["answer"], bool(row["faithful"])) for row in chosen]


def verdicts_of(
    checkpoint: Checkpoint, items: Sequence[Item], config: EngineConfig | None = None
) -> list[Verdict | None]:
    """The model's verdict on each item; `None` where it gave none (a prompt too long, an answer cut short)."""
    if not items:
        return []
    config = replace(config or EngineConfig(), kv_bytes=KV_BYTES)
    with Engine(checkpoint, config) as engine:
        found = asyncio.run(_ask_all(EngineJudge(engine, str(checkpoint.path)), items))
    del engine
    let_go()
    return found


async def _ask_all(judge: Judge, items: Sequence[Item]) -> list[Verdict | None]:
    return await asyncio.gather(*(_ask(judge, item) for item in items))


async def _ask(judge: Judge, item: Item) -> Verdict | None:
    prompt = NLIStatementPrompt().to_string(NLIStatementInput(context=item.context, statements=[item.answer]))
    record = Record("faithfulness", "")
    RECORD.set(record)  # of this item's task alone
    try:
        said = await judge.agenerate(prompt, NLIStatementOutput)
    except JudgeError:
        return None
    probabilities = record.calls[-1].entry.verdicts if record.calls else ()
    return Verdict(bool(said.statements[0].verdict), probabilities[0] if probabilities else None)


def agreement(
    said: Sequence[Verdict | None], reference: Sequence[Verdict | None], items: Sequence[Item]
) -> dict[str, Any]:
    """Counts over the items that the reference gave a verdict on; no verdict agrees with nothing.

    `p_moved` is the mean absolute change of P(faithful), over the items where both have one.
    """
    counted = [each for each in zip(said, reference, items, strict=True) if each[1] is not None]
    moved = [
        abs(one.probability - other.probability)
        for one, other, _ in counted
        if one and other and one.probability is not None and other.probability is not None
    ]
    return {
        "items": len(counted),
        "no_verdict": sum(one is None for one, _, _ in counted),
        "as_reference": sum(
            one is not None and other is not None and one.faithful == other.faithful
            for one, other, _ in counted
        ),
        "as_label": sum(one is not None and one.faithful == item.faithful for one, _, item in counted),
        "says_faithful": sum(one is not None and one.faithful for one, _, _ in counted),
        "labelled_faithful": sum(item.faithful for _, _, item in counted),
        "p_moved": sum(moved) / len(moved) if moved else None,
    }
