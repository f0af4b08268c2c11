"""`Run`: everything one evaluation found, as data; any report or verdict is remade from it without judging again.

A run file holds nothing that depends on time or on the machine's speed: those live in `timings.json` beside it,
so that an interrupted and resumed run writes the byte-identical file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragate.errors import RunError
from ragate.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1

State = Literal["ok", "nan", "error", "timeout", "truncated"]
"""How a score ended: only `ok` has a value. The others are counted, never averaged away."""


class Frozen(BaseModel):
    """Base of the records: immutable, and unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Claim(Frozen):
    """One thing the judge decided.

    faithfulness: a statement of the answer; context_recall: a sentence of the reference; context_precision: one
    retrieved context (`context` is its index, `text` is empty); answer_relevance: a question that the answer
    would answer (`verdict` 1 when committal, `similarity` to the real question).
    """

    text: str
    verdict: int
    probability: float | None = None
    """P(verdict = 1) at the verdict token, rounded to 6 decimals."""
    reason: str = ""
    context: int | None = None
    similarity: float | None = None


class Call(Frozen):
    """One distinct call of the judge. `head` is a key of `Run.prompt_heads`; head text + `input` is the prompt."""

    head: str
    input: str
    output: str
    prompt_tokens: int
    output_tokens: int
    finish: str


class Score(Frozen):
    """One metric of one item."""

    item: str
    metric: str
    state: State
    value: float | None = None
    """In [0, 1]; `None` unless `state` is ok."""
    error: str | None = None
    claims: tuple[Claim, ...] = ()
    calls: tuple[str, ...] = ()
    """Keys of `Run.calls`, in the order made."""


class ItemRecord(Frozen):
    """A test case with the answer and contexts that were judged."""

    id: str
    question: str
    reference: str | None = None
    answer: str | None = None
    contexts: tuple[str, ...] = ()
    kind: str | None = None
    cluster: str | None = None
    critical: bool = False
    reserve: bool = False
    """Of the test set's reserve: scored only where the others could not tell, or for a baseline."""
    error: str | None = None
    """Why the target gave no answer, where it did not."""
    line: int | None = None
    """Line in the test-set file, for annotations."""


class Tokens(Frozen):
    """Deterministic token counts of the distinct calls."""

    calls: int = 0
    """Calls that the metrics made."""
    distinct_calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Run(Frozen):
    """An evaluation: items, scores, calls, and the fingerprint of what made them."""

    version: int = SCHEMA_VERSION
    suite: str
    """Name of the test set: what a baseline is filed under."""
    testset: str
    """Path or name as given."""
    testset_hash: str
    """sha256 over id, question and reference of the items that are not of the reserve."""
    reserve_hash: str | None = None
    """The same of the reserve's items, where the run has them."""
    metrics: tuple[str, ...]
    judge: str
    """Catalogue name, path or URL of the judge."""
    judge_note: str | None = None
    """Set when the judge is unproven: printed beside every verdict."""
    target: str
    """What answered: `stored`, `module:callable`, a URL or a command."""
    fingerprint: dict[str, str]
    """Field by field what made the scores (GATE.md); `fingerprint_id` hashes it."""
    items: tuple[ItemRecord, ...]
    scores: tuple[Score, ...]
    calls: dict[str, Call] = Field(default_factory=dict)
    prompt_heads: dict[str, str] = Field(default_factory=dict)
    tokens: Tokens = Tokens()
    partial: bool = False
    """True when the run was stopped before every score was made."""

    @property
    def fingerprint_id(self) -> str:
        """First 16 hex digits of the sha256 over the fingerprint's fields."""
        return fingerprint_id(self.fingerprint)

    def score(self, item: str, metric: str) -> Score | None:
        """The score of one cell, or `None` where there is none."""
        return next((s for s in self.scores if s.item == item and s.metric == metric), None)

    def values(self, metric: str) -> dict[str, float]:
        """Item id -> value, for the scores of `metric` that are ok."""
        return {
            s.item: s.value
            for s in self.scores
            if s.metric == metric and s.value is not None and math.isfinite(s.value)
        }

    def mean(self, metric: str) -> float | None:
        """Mean of the ok scores of `metric`, or `None` where there are none."""
        values = self.values(metric)
        return sum(values.values()) / len(values) if values else None

    def states(self, metric: str) -> dict[str, int]:
        """State -> number of scores of `metric`."""
        counts: dict[str, int] = {}
        for s in self.scores:
            if s.metric == metric:
                counts[s.state] = counts.get(s.state, 0) + 1
        return counts

    def table(self) -> pd.DataFrame:
        """Scores as a table: one row per item id, one column per metric, NaN where there is no value."""
        import pandas as pd

        cells = {metric: self.values(metric) for metric in self.metrics}
        return pd.DataFrame(cells, index=[item.id for item in self.items], dtype=float)


def joined(core: Run, reserve: Run) -> Run:
    """The run over the items of both, as if all had been judged at once. Both must be of one suite and judge."""
    calls = core.calls | reserve.calls
    return core.model_copy(
        update={
            "reserve_hash": reserve.reserve_hash,
            "items": core.items + reserve.items,
            "scores": core.scores + reserve.scores,
            "calls": calls,
            "prompt_heads": core.prompt_heads | reserve.prompt_heads,
            "tokens": Tokens(
                calls=core.tokens.calls + reserve.tokens.calls,
                distinct_calls=len(calls),
                prompt_tokens=sum(call.prompt_tokens for call in calls.values()),
                output_tokens=sum(call.output_tokens for call in calls.values()),
            ),
        }
    )


def fingerprint_id(fields: dict[str, str]) -> str:
    """First 16 hex digits of the sha256 over the fields in sorted order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def run_digest(run: Run) -> str:
    """sha256 of the file that `save_run` writes of `run`."""
    return hashlib.sha256(_text_of(run).encode()).hexdigest()


def save_run(run: Run, path: Path) -> None:
    """Write `run` whole (temporary file, fsync, rename). Raises RunError when the disk refuses."""
    write_whole(path, _text_of(run))


def _text_of(run: Run) -> str:
    return run.model_dump_json(indent=1) + "\n"


def load_run(path: Path) -> Run:
    """Read a run file, or `run.json` in a folder. Raises RunError naming what is wrong."""
    if path.is_dir():
        path = path / "run.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path}: no such run; make one with `ragate eval --out {path.parent}`") from None
    except OSError as e:
        raise RunError(f"{path}: cannot read the run: {e.strerror}") from None
    try:
        run = Run.model_validate_json(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "the file"
        raise RunError(f"{path}: not a ragate run: {where}: {first['msg']}") from None
    if wrong := _impossible(run):
        raise RunError(f"{path}: not a ragate run: {wrong}")
    return run


def _impossible(run: Run) -> str | None:
    """What no evaluation would have written and a gate must not believe, or `None`."""
    if run.version > SCHEMA_VERSION:
        return f"version {run.version} is newer than this ragate reads ({SCHEMA_VERSION}); update ragate"
    named = {
        "metric": Counter(run.metrics),
        "item": Counter(item.id for item in run.items),
        "score": Counter(f"{score.metric} of {score.item}" for score in run.scores),
    }
    for what, counts in named.items():
        twice = next((name for name, count in counts.items() if count > 1), None)
        if twice is not None:
            return f"{what} {twice[:80]!r} is there twice"
    for score in run.scores:  # NaN is a state that the gate counts
        if score.value is not None and (score.value < 0 or score.value > 1):
            return f"{score.metric} of item {score.item[:80]!r} is {score.value:g}, and scores lie in 0 to 1"
    return None
