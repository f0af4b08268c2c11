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

LINE_EVERY = 15.0
"""Seconds between lines where there is no terminal (CI logs)."""


class Progress:
    """Phases (fetching, loading) and the evaluation itself, on stderr. Use as a context."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, float] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
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
        self._show("judging (calls)", event.calls_done, event.calls_total)

    def summary(self, timings: dict[str, Any]) -> str:
        """One line: calls, tokens, cache hits, seconds."""
        parts = [f"{timings['calls_judged']} calls judged"]
        if timings["calls_resumed"]:
            parts.append(f"{timings['calls_resumed']} from the journal")
        sent, computed = timings.get("prompt_tokens_sent"), timings.get("prompt_tokens_computed")
        if sent:
            parts.append(f"{sent:,} prompt tokens, {computed / sent:.0%} computed")
        parts.append(f"{time.monotonic() - self._started:.0f} s")
        return ", ".join(parts)

    def _show(self, what: str, done: int, total: int) -> None:
        if self._quiet or total == 0:
            return
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        if done == total and what in self._lines and self._lines[what] < 0:
            return
        if done == total or now - self._lines.get(what, self._started) > LINE_EVERY:
            self._lines[what] = -1.0 if done == total else now
            self._console.print(f"{what}: {done} of {total} after {now - self._started:.0f} s", markup=False)
