"""`Baseline`: the scores that a run is held against, as a small JSON file in git with one item per line."""

from __future__ import annotations

import json
import math
import re
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AwareDatetime, Field, ValidationError

from ragate.errors import BaselineError
from ragate.files import write_whole
from ragate.run import Frozen, fingerprint_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ragate.run import Run

BASELINE_VERSION: Literal[3] = 3
"""Version 2 knew no clusters, version 1 neither reserve nor critical items nor reasons; both are still read."""
STALE_DAYS = 90
"""A baseline older than this is called old where its age is shown."""

LONGEST_NAME = 200
"""Bytes of a file's name, of which file systems take 255 with what is added to it."""
SAME = 1e-9
"""Scores this close are the same score: ragas' context_precision reaches 0.9999999999 at best."""

Value = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Cell = Value | Literal["nan", "error", "timeout", "truncated"]
"""A score in [0, 1], or the state that stands in its place."""


class Baseline(Frozen):
    """Scores per item and metric, and what made them."""

    version: Literal[1, 2, 3] = BASELINE_VERSION
    suite: str
    testset_hash: str
    """sha256 over id, question and reference of the items that are not of the reserve."""
    reserve_hash: str | None = None
    """The same of the reserve's items; `None` where they were not scored."""
    date: AwareDatetime
    commit: str | None = None
    """Commit of the system that was scored, where it was in a git repository."""
    reason: str | None = None
    """Why it took the place of the one before, in the words of whoever accepted it."""
    judge: str
    metrics: tuple[str, ...]
    critical: tuple[str, ...] = ()
    """Items that were critical: a change that takes the mark off an item does not free it."""
    reserve: tuple[str, ...] = ()
    """Items of the reserve."""
    clusters: dict[str, str] | None = None
    """Item id -> cluster, of the items that have one: a change that relabels them does not change the verdict.
    `None` where the baseline is older than version 3 and does not know."""
    fingerprint: dict[str, str]
    items: dict[str, dict[str, Cell]]
    """Item id -> metric -> score or state, in the order of the test set."""

    @property
    def fingerprint_id(self) -> str:
        """First 16 hex digits of the sha256 over the fingerprint's fields, as for a run."""
        return fingerprint_id(self.fingerprint)

    def values(self, metric: str) -> dict[str, float]:
        """Item id -> value, for the scores of `metric` that are ok."""
        cells = ((item, scores.get(metric)) for item, scores in self.items.items())
        return {item: cell for item, cell in cells if isinstance(cell, float)}

    def mean(self, metric: str) -> float | None:
        """Mean of the ok scores of `metric`, or `None` where there are none."""
        return mean(self.values(metric).values())

    def state(self, item: str, metric: str) -> str:
        """State of one score; `missing` where there is none."""
        cell = self.items.get(item, {}).get(metric, "missing")
        return cell if isinstance(cell, str) else "ok"


class ItemChange(Frozen):
    """One score of one item before and after; `drop` is positive when it got worse."""

    item: str
    base: float
    head: float
    drop: float


class MetricDiff(Frozen):
    """What happened to one metric between two baselines; means are over each baseline's own ok items."""

    metric: str
    old_mean: float | None
    new_mean: float | None
    change: float | None
    """New mean minus old mean; `None` when a side has no score."""
    changed: tuple[ItemChange, ...]
    """Items that both scored and whose score differs, largest drop first."""


class FieldDiff(Frozen):
    """A field of the fingerprint that differs; `None` where a side has no such field."""

    field: str
    old: str | None
    new: str | None


class BaselineDiff(Frozen):
    """The difference between two baselines, as data for `ragate baseline diff`."""

    suite: str
    metrics: tuple[MetricDiff, ...]
    fingerprint: tuple[FieldDiff, ...]
    testset_changed: bool
    added: tuple[str, ...]
    """Items only the new baseline has."""
    removed: tuple[str, ...]
    """Items only the old baseline has."""
    moved: tuple[str, ...] = ()
    """Items of both that are in another cluster; none where a baseline does not know its clusters."""


def mean(values: Iterable[float]) -> float | None:
    """Mean with one rounding, so that the order of the values is irrelevant; `None` for no values."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def baseline_of(run: Run, *, commit: str | None, date: datetime, reason: str | None = None) -> Baseline:
    """The baseline that `run` makes. `date` must carry its time zone; it is kept in UTC to the second.

    Raises BaselineError for a partial run and for scores outside [0, 1].
    """
    if run.partial:
        raise BaselineError(
            f"the run of {run.suite} is PARTIAL and cannot become a baseline: "
            "finish it with `ragate eval` (it resumes), then `ragate baseline set`"
        )
    items: dict[str, dict[str, Any]] = {item.id: {} for item in run.items}
    for score in run.scores:
        items.setdefault(score.item, {})[score.metric] = score.value if score.state == "ok" else score.state
    try:
        return Baseline(
            suite=run.suite,
            testset_hash=run.testset_hash,
            reserve_hash=run.reserve_hash,
            date=date.astimezone(UTC).replace(microsecond=0),
            commit=commit,
            reason=reason,
            judge=run.judge,
            metrics=run.metrics,
            critical=tuple(item.id for item in run.items if item.critical),
            reserve=tuple(item.id for item in run.items if item.reserve),
            clusters={item.id: item.cluster for item in run.items if item.cluster},
            fingerprint=run.fingerprint,
            items=items,
        )
    except ValidationError as e:
        where, what = _first_error(e)
        raise BaselineError(f"the run of {run.suite} cannot become a baseline: {where}: {what}") from None


def file_name(suite: str) -> str:
    """`suite` as the name of a file or folder that no name leads out of: odd characters become `-`, its end is cut."""
    name = re.sub(r"[^\w.-]+", "-", suite).strip("-.").encode("utf-8", "ignore")
    return name[:LONGEST_NAME].decode("utf-8", "ignore") or "suite"


def baseline_path(folder: Path, suite: str) -> Path:
    """Where the baseline of `suite` is kept: one file each."""
    return folder / f"{file_name(suite)}.json"


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` has checked out, or `None` outside a git repository (or without git)."""
    return _git(folder, "rev-parse", "--verify", "HEAD")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or `None` where it fails, is missing or takes too long."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def age_of(baseline: Baseline, now: datetime, folder: Path) -> str:
    """How old a baseline is, in words: days, and commits of the repository at `folder` where it is in its history."""
    days = max(0, (now - baseline.date).days)
    parts = ["made today" if days == 0 else f"{days} day{'s' * (days > 1)} old"]
    if baseline.commit is not None:
        known = re.fullmatch("[0-9a-f]{7,64}", baseline.commit)  # from a file: not to be taken for an option
        behind = _git(folder, "rev-list", "--count", f"{baseline.commit}..HEAD", "--") if known else None
        since = "" if behind is None else f", {behind} commit{'s' * (behind != '1')} ago"
        parts.append(f"commit {baseline.commit[:10]}{since}")
    if days > STALE_DAYS:
        parts.append("old: make it anew from what is released, or `ragate baseline bless` a recent run")
    return "; ".join(parts)


def save_baseline(baseline: Baseline, path: Path) -> None:
    """Write `baseline` whole, one item per line. Raises RunError when the disk refuses."""
    fields = baseline.model_dump(mode="json") | {"version": BASELINE_VERSION}
    lines = []
    for name, value in fields.items():
        if name in ("clusters", "fingerprint", "items") and value:
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            lines.append(f' "{name}": {{\n{rows}\n }}')
        else:
            lines.append(f' "{name}": {json.dumps(value)}')
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load_baseline(path: Path) -> Baseline:
    """Read a baseline. Raises BaselineError: missing (with the command that makes one) or malformed."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BaselineError(f"{path}: no baseline yet; make one with `ragate baseline set`") from None
    except OSError as e:
        raise BaselineError(f"{path}: cannot read the baseline: {e.strerror}") from None
    way_out = "restore it from git or make a new one with `ragate baseline set`"
    try:
        fields = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:  # ValueError: not JSON, not UTF-8, or a name given twice
        raise BaselineError(f"{path}: not a baseline: {e}; {way_out}") from None
    version = fields.get("version", 1) if isinstance(fields, dict) else None
    if isinstance(version, int) and version > BASELINE_VERSION:
        raise BaselineError(
            f"{path}: baseline version {version} is newer than this ragate reads ({BASELINE_VERSION}); "
            "update ragate"
        )
    if isinstance(version, int) and version < 1:
        raise BaselineError(
            f"{path}: baseline version {version} is older than this ragate reads (1); "
            "make a new one with `ragate baseline set`"
        )
    try:
        return Baseline.model_validate(fields)
    except ValidationError as e:
        where, what = _first_error(e)
        raise BaselineError(f"{path}: not a baseline: {where}: {what}; {way_out}") from None


def diff_baselines(old: Baseline, new: Baseline) -> BaselineDiff:
    """What changed from `old` to `new`: means, items, fingerprint fields, test set."""
    diffs = []
    for metric in dict.fromkeys((*old.metrics, *new.metrics)):
        before, after = old.mean(metric), new.mean(metric)
        change = None if before is None or after is None else after - before
        changed = changed_items(old.values(metric), new.values(metric))
        diffs.append(
            MetricDiff(metric=metric, old_mean=before, new_mean=after, change=change, changed=changed)
        )
    return BaselineDiff(
        suite=new.suite,
        metrics=tuple(diffs),
        fingerprint=diff_fields(old.fingerprint, new.fingerprint),
        testset_changed=old.testset_hash != new.testset_hash,
        added=tuple(item for item in new.items if item not in old.items),
        removed=tuple(item for item in old.items if item not in new.items),
        moved=_moved(old, new),
    )


def _moved(old: Baseline, new: Baseline) -> tuple[str, ...]:
    """Items of both whose cluster differs."""
    before, after = old.clusters, new.clusters
    if before is None or after is None:
        return ()
    return tuple(item for item in new.items if item in old.items and before.get(item) != after.get(item))


def changed_items(base: dict[str, float], head: dict[str, float]) -> tuple[ItemChange, ...]:
    """Items scored on both sides whose score differs by more than `SAME`, largest drop first, then by id."""
    changes = [
        ItemChange(item=item, base=value, head=head[item], drop=value - head[item])
        for item, value in base.items()
        if item in head and abs(value - head[item]) > SAME
    ]
    return tuple(sorted(changes, key=lambda change: (-change.drop, change.item)))


def diff_fields(old: dict[str, str], new: dict[str, str]) -> tuple[FieldDiff, ...]:
    """Fields of two fingerprints that differ, in the order of their names."""
    return tuple(
        FieldDiff(field=name, old=old.get(name), new=new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name given twice (what a bad merge leaves) is an error, not the last one wins."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return fields


def _first_error(e: ValidationError) -> tuple[str, str]:
    """Where and what of the first validation error."""
    first = e.errors()[0]
    return ".".join(str(part) for part in first["loc"]) or "the file", first["msg"]
