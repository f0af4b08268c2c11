"""Asking a judge about labelled answers: all calls in flight at once, journaled as those of an evaluation.

Importing this module imports ragas (seconds).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from ragate.errors import RagateError
from ragate.evaluate import Event, sentence_of
from ragate.judge import Judge
from ragate.judging.asks import Ask, Heard, said_of
from ragate.judging.labelled import Labelled
from ragate.judging.prompts import MODELS
from ragate.metrics import RECORD, Record


async def ask_all(
    judge: Judge,
    asks: Sequence[Ask],
    items: Mapping[str, Labelled],
    on_event: Callable[[Event], None],
) -> Heard:
    """Put every ask; `judge.journal` must be open. Raises RunError where the engine or the disk fails."""
    heard = Heard({}, {})
    done = 0

    async def one(ask: Ask) -> None:
        nonlocal done
        record = Record(ask.call, ask.item)
        RECORD.set(record)  # of this task alone
        context = items[ask.item].contexts[ask.part] if ask.call == "precision" else ""
        try:
            await judge.agenerate(ask.prompt, MODELS[ask.call])
            entry = record.calls[-1].entry
            heard.said[ask.call, ask.item, ask.part] = said_of(
                ask.call, entry.output, entry.verdicts, context
            )
        except RagateError:
            raise
        except Exception as e:  # whatever an endpoint sends: it fails one item, as in an evaluation
            heard.failed[ask.item] = sentence_of(e)
        done += 1
        total = len(asks)
        on_event(Event("call", 0, calls_done=done, calls_total=total, calls_computed=len(judge.call_ms)))

    tasks = [asyncio.ensure_future(one(ask)) for ask in asks]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return heard
