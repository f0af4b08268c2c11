"""One row per item: its scores in the run beside those of the baseline, and whether it regressed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from ragate.gate.baseline import SAME
from ragate.gate.verdict import BROKEN, INTACT
from ragate.run import Frozen, ItemRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate.gate.baseline import Baseline
    from ragate.run import Run, Score

Change = Literal["regressed", "fixed", "unchanged", "new"]


class Cell(Frozen):
    """One metric of one item, now and in the baseline."""

    metric: str
    state: str
    """State of the score in the run; `missing` where the run has none."""
    value: float | None
    base_state: str | None
    """State in the baseline; `None` where the baseline does not have the item or there is no baseline."""
    base: float | None
    error: str | None

    @property
    def drop(self) -> float | None:
        """Baseline minus run, 0 within rounding; `None` unless both scored."""
        if self.value is None or self.base is None:
            return None
        drop = self.base - self.value
        return drop if abs(drop) > SAME else 0.0

    @property
    def broke(self) -> bool:
        """Whether it went from 0.8 or more to 0.2 or less."""
        return _fell_through(self.base, self.value)

    @property
    def mended(self) -> bool:
        """Whether it went from 0.2 or less to 0.8 or more."""
        return _fell_through(self.value, self.base)


class ItemRow(Frozen):
    """An item with its cells, in the order of the run's metrics."""

    item: ItemRecord
    cells: tuple[Cell, ...]

    @property
    def drop(self) -> float | None:
        """The largest drop of its metrics; `None` where nothing could be compared."""
        return max((c.drop for c in self.cells if c.drop is not None), default=None)

    @property
    def change(self) -> Change:
        """`regressed` when any metric fell, else `fixed` when any rose; `new` where nothing compares."""
        drops = [c.drop for c in self.cells if c.drop is not None]
        if not drops:
            return "new"
        return "regressed" if max(drops) > 0 else "fixed" if min(drops) < 0 else "unchanged"

    @property
    def broke(self) -> bool:
        """Whether any score broke."""
        return any(c.broke for c in self.cells)

    @property
    def mended(self) -> bool:
        """Whether any score was mended."""
        return any(c.mended for c in self.cells)

    @property
    def errored(self) -> bool:
        """Whether any score ended otherwise than ok."""
        return any(c.state != "ok" for c in self.cells)

    @property
    def lowest(self) -> float:
        """The lowest score; 1 where there is none."""
        return min((c.value for c in self.cells if c.value is not None), default=1.0)


def rows_of(run: Run, baseline: Baseline | None, metrics: Sequence[str] | None = None) -> tuple[ItemRow, ...]:
    """The items of `run`: largest drop first, then those with errors, then the rest, lowest score first.

    `metrics` gives the order of the cells; by default it is the run's.
    """
    scores = {(s.item, s.metric): s for s in run.scores}
    rows = []
    for item in run.items:
        cells = [
            _cell(scores.get((item.id, metric)), item.id, metric, baseline)
            for metric in metrics or run.metrics
        ]
        rows.append(ItemRow(item=item, cells=tuple(cells)))
    return tuple(sorted(rows, key=lambda row: (-max(row.drop or 0.0, 0.0), not row.errored, row.lowest)))


def _cell(score: Score | None, item: str, metric: str, baseline: Baseline | None) -> Cell:
    state = "missing" if score is None else score.state
    value = None if score is None or state != "ok" else score.value
    if state == "ok" and (value is None or not math.isfinite(value)):
        state, value = "nan", None
    base: object = None
    base_state = None
    if baseline is not None and item in baseline.items:
        base, base_state = baseline.items[item].get(metric), baseline.state(item, metric)
    return Cell(
        metric=metric,
        state=state,
        value=value,
        base_state=base_state,
        base=base if isinstance(base, float) else None,
        error=None if score is None else score.error,
    )


def _fell_through(before: float | None, after: float | None) -> bool:
    return None not in (before, after) and before >= INTACT - SAME and after <= BROKEN + SAME  # type: ignore[operator]
