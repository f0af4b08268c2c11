"""What a person sees while ragate works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from ragate.evaluate import Event
    from ragate_engine import TuneStep

LINE_EVERY = 15.0
"""Seconds between lines where there is no terminal (CI logs)."""
SETTLED = 1.0
"""Seconds of judging before its rates mean anything."""
BESIDE_RATES = 52
"""Columns that description, bar, counts and time take."""


class Progress:
    """Phases (fetching, loading) and the evaluation itself, on stderr. Use as a context."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, float] = {}
        self._started = time.monotonic()
        self._judging: tuple[float, Event] | None = None
        self._held_out = ""

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[rates]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]left"),
                console=self._console,
                expand=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, what: str, done: int, total: int) -> None:
        """A phase has come so far: bytes, layers."""
        scale = 1_000_000 if total > 10_000_000 else 1
        self._show(f"{what} (MB)" if scale > 1 else what, done // scale, total // scale)

    def on_event(self, event: Event) -> None:
        """The evaluation has come so far."""
        if event.kind == "warning":
            self._console.print(f"warning: {event.message}", markup=False)
        if event.answers_done < event.items_total:
            self._show("answering", event.answers_done, event.items_total)
        elif event.items_total and "answering" in self._tasks:
            self._show("answering", event.items_total, event.items_total)
        self._show("judging (calls)", event.calls_done, event.calls_total, self._rates(event))

    def on_step(self, step: TuneStep) -> None:
        """Training has come so far."""
        rates = f"loss {step.loss:.3f}, {step.tokens_per_second:,.0f} tok/s"
        if step.held_out is not None:
            self._held_out = f", held out {step.held_out:.3f}"
        self._show("training (steps)", step.step, step.steps, rates + self._held_out)

    def _rates(self, event: Event) -> str:
        """How fast it goes since the first call was computed, as much as there is room for: `3.1 items/s, ...`."""
        now = time.monotonic()
        if self._judging is None and event.calls_computed:
            self._judging = now, event
        if self._judging is None or now - self._judging[0] < SETTLED:
            return ""
        began, first = self._judging
        seconds = now - began
        share = (event.scores_done - first.scores_done) / max(event.scores_total, 1)
        parts = [f"{share * event.items_total / seconds:.2g} items/s"]
        tokens = event.tokens_in + event.tokens_out - first.tokens_in - first.tokens_out
        if tokens > 0:
            parts.append(f"{tokens / seconds:,.0f} tok/s")
        if event.tokens_in:
            parts.append(f"cache {event.tokens_cached / event.tokens_in:.0%}")
        known = event.calls_done - event.calls_computed
        if known > 0:
            parts.append(f"{known} known")
        room = self._console.width - BESIDE_RATES if self._bar is not None else 80
        while parts and len(", ".join(parts)) > room:
            parts.pop()
        return ", ".join(parts)

    def summary(self, timings: dict[str, Any]) -> str:
        """One line: calls, tokens, cache hits, seconds."""
        parts = [f"{timings['calls_judged']} calls judged"]
        if timings["calls_resumed"]:
            parts.append(f"{timings['calls_resumed']} from the journal")
        sent, computed = timings.get("prompt_tokens_sent"), timings.get("prompt_tokens_computed")
        if sent:
            parts.append(f"{sent:,} prompt tokens, {1 - computed / sent:.0%} from the prefix cache")
        seconds, out = timings.get("seconds", {}).get("total"), timings.get("engine", {}).get("tokens_out")
        if sent and seconds and out is not None:
            parts.append(f"{(sent + out) / seconds:,.0f} tokens/s")
        parts.append(f"{time.monotonic() - self._started:.0f} s")
        return ", ".join(parts)

    def _show(self, what: str, done: int, total: int, rates: str = "") -> None:
        if self._quiet or total == 0:
            return
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, rates="")
            self._bar.update(self._tasks[what], completed=done, total=total, rates=rates)
            return
        now = time.monotonic()
        if done == total and what in self._lines and self._lines[what] < 0:
            return
        if done == total or now - self._lines.get(what, self._started) > LINE_EVERY:
            self._lines[what] = -1.0 if done == total else now
            left = self._left(now, done, total) if rates else ""
            text = ", ".join(part for part in (f"after {now - self._started:.0f} s", rates, left) if part)
            self._console.print(f"{what}: {done} of {total} {text}", markup=False)

    def _left(self, now: float, done: int, total: int) -> str:
        """How long it will take from here, at the rate so far."""
        if self._judging is None or done >= total:
            return ""
        began, first = self._judging
        rate = (done - first.calls_done) / (now - began)
        return f"about {(total - done) / rate:.0f} s left" if rate > 0 else ""
