"""What a person sees while ragate works: a bar on a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from ragate import progress
from ragate.evaluate import Event
from ragate.progress import Progress


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def _event(done: int, **changes: Any) -> Event:
    fields: dict[str, Any] = {
        "items_total": 100,
        "answers_done": 100,
        "scores_done": done // 2,
        "scores_total": 400,
        "calls_done": done,
        "calls_total": 800,
        "calls_computed": done,
        "tokens_in": 1000 * done,
        "tokens_cached": 700 * done,
        "tokens_out": 100 * done,
    }
    return Event("call", **(fields | changes))


def _console(*, terminal: bool = False, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_a_line_now_and_then_says_how_far_how_fast_and_how_long(clock: Clock) -> None:
    console = _console()
    with Progress(console) as shown:
        shown.on_event(_event(10))
        clock.now += 20
        shown.on_event(_event(210))
        clock.now += 1
        shown.on_event(_event(220))
    # since the tenth call: 200 calls, 100 scores of 4 an item, 220,000 tokens
    rates = "1.2 items/s, 11,000 tok/s, cache 70%"
    assert _text(console) == f"judging (calls): 210 of 800 after 20 s, {rates}, about 59 s left\n"


def test_calls_that_were_known_already_are_told_and_do_not_count_as_speed(clock: Clock) -> None:
    console = _console()
    with Progress(console) as shown:
        shown.on_event(_event(400, calls_computed=0, tokens_in=0, tokens_out=0))
        clock.now += 5
        shown.on_event(_event(401, calls_computed=1, tokens_in=1000, tokens_out=100))
        clock.now += 20
        shown.on_event(
            _event(441, calls_computed=41, tokens_in=41_000, tokens_cached=28_700, tokens_out=4_100)
        )
    expected = "441 of 800 after 25 s, 0.25 items/s, 2,200 tok/s, cache 70%, 400 known, about 180 s left\n"
    assert _text(console).endswith(expected)


def test_an_endpoint_has_no_tokens_and_no_cache(clock: Clock) -> None:
    console = _console()
    with Progress(console) as shown:
        none = {"tokens_in": 0, "tokens_cached": 0, "tokens_out": 0}
        shown.on_event(_event(10, **none))
        clock.now += 20
        shown.on_event(_event(210, **none))
    assert "after 20 s, 1.2 items/s, about 59 s left" in _text(console)


def test_quiet_says_nothing_but_warnings(clock: Clock) -> None:
    for terminal in (False, True):
        console = _console(terminal=terminal)
        with Progress(console, quiet=True) as shown:
            shown.say("fetching", 1, 2)
            shown.on_event(_event(800))
            shown.on_event(Event("warning", 100, message="[bold]a line was lost"))
        assert _text(console) == "warning: [bold]a line was lost\n"


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_stays_on_one_line_of_the_terminal(width: int) -> None:
    console = _console(terminal=True, width=width)
    with Progress(console) as shown:
        shown.say("loading the judge", 30, 30)
        shown.on_event(_event(10))
        assert shown._judging is not None
        shown._judging = (shown._judging[0] - 20, shown._judging[1])
        shown.on_event(_event(210, calls_total=12_000))
        assert shown._bar is not None
        shown._bar.refresh()
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", _text(console))
    last = [line for line in re.split("[\r\n]", plain) if "judging" in line][-1]
    assert "210/12000" in last
    assert "items/s" in last
    assert ("cache 70%" in last) == (width == 120)
    assert "━" in last
    assert len(last) <= width


def test_a_dumb_terminal_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = _console(terminal=True)
    with Progress(console) as shown:
        shown.say("fetching", 5, 5)
    assert "\x1b" not in _text(console)
    assert "fetching: 5 of 5" in _text(console)


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = _console(terminal=True)
    with Progress(console) as shown:
        shown.say("fetching", 5, 5)
    assert not re.search("\x1b\\[[0-9;]*[34][0-9]", _text(console))


def test_the_summary_has_cache_hits_and_speed() -> None:
    shown = Progress(_console())
    line = shown.summary(
        {
            "calls_judged": 800,
            "calls_resumed": 100,
            "prompt_tokens_sent": 10_000,
            "prompt_tokens_computed": 3_000,
            "seconds": {"total": 10.0},
            "engine": {"tokens_out": 2_000},
        }
    )
    expected = "800 calls judged, 100 from the journal, 10,000 prompt tokens, 70% from the prefix cache, 1,200 tokens/s"
    assert line.startswith(expected)
    assert (
        Progress(_console()).summary({"calls_judged": 1, "calls_resumed": 0}).startswith("1 calls judged, ")
    )
