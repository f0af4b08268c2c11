"""What the gate says of a system whose true drop is known: PASS, FAIL or INCONCLUSIVE, and how often it is wrong.

Baseline scores are drawn from real RAGAS faithfulness scores. A share of the items is drawn anew (`churn`: another
answer that is neither better nor worse), and each item is then set to 0 with the probability that makes the *expected*
drop the wanted one (`damage`). So the drop that is known is the system's, not that of the sample: a run sees more or
less of it by chance, as in life. The verdict is that of `ragate.gate`, with an absolute limit.

usage: python bench/gate_power.py [--data ../shared/data] [--runs 2000]     (a minute on one core)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import plots
from bench.result import RESULTS, header, save
from ragate.gate.stats import FLIPS, johnson_bounds, sign_flip_p, t_quantile
from ragate.gate.verdict import SIGNIFICANT, verdict_of_drop

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
LIMIT = 0.05
"""The limit, and the drop that a PASS must not hide."""
SEED = 5
CHURN = (0.0, 0.1, 0.2, 0.3, 0.5)
DROPS = tuple(points / 100 for points in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12))
SIZES = (50, 100, 200, 400)
RESAMPLES = 1_000


@dataclass(frozen=True)
class Cell:
    """Shares of the runs of one kind of change."""

    items: int
    churn: float
    drop: float
    runs: int
    passed: float
    failed: float
    inconclusive: float
    plain_failed: float
    """By the mean alone: its drop reaches the limit."""
    t_passed: float
    """A PASS from the t bound without the allowance for skew."""
    bootstrap_passed: float | None
    """A PASS from a percentile bootstrap, where it was asked for."""
    exact_zero: float
    """Runs whose drop is 0 exactly."""


def load_pool(data: Path) -> np.ndarray:
    """The scores that baselines are drawn from. Raises FileNotFoundError naming the option."""
    path = data / "faithfulness_pool.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name the folder of the labelled data with --data")
    return np.array(json.loads(path.read_text())["scores"], dtype=np.float64)


def drops_of(
    pool: np.ndarray, items: int, churn: float, drop: float, runs: int, seed: int = SEED
) -> Iterator[np.ndarray]:
    """For each run the drop of each item, baseline minus current."""
    rng = np.random.default_rng([seed, items, round(churn * 1000), round(drop * 1000)])
    damage = drop / float(pool.mean())
    for _ in range(runs):
        base = rng.choice(pool, items)
        head = np.where(rng.random(items) < churn, rng.choice(pool, items), base)
        yield base - np.where(rng.random(items) < damage, 0.0, head)


def simulate(
    pool: np.ndarray,
    items: int,
    churn: float,
    drop: float,
    runs: int,
    *,
    flips: int = FLIPS,
    bootstrap: bool = False,
) -> Cell:
    """What becomes of `runs` evaluations of a system with this true drop."""
    verdicts: list[str] = []
    plain = t_passed = boot_passed = zero = 0
    rng = np.random.default_rng(SEED)
    t = t_quantile(0.95, items - 1)
    for drops in drops_of(pool, items, churn, drop, runs):
        estimate = johnson_bounds(drops.tolist())
        reaches = verdict_of_drop(estimate.mean, estimate.upper, 1.0, LIMIT, "point") == "FAIL"
        # p decides nothing below the limit
        p = sign_flip_p(drops.tolist(), flips=flips) if reaches else 1.0
        verdicts.append(verdict_of_drop(estimate.mean, estimate.upper, p, LIMIT, "significant"))
        plain += reaches
        t_passed += estimate.mean + t * estimate.error < LIMIT
        zero += estimate.mean == 0.0
        if bootstrap:
            means = drops[rng.integers(0, items, (RESAMPLES, items))].mean(axis=1)
            boot_passed += float(np.quantile(means, 0.95)) < LIMIT
    return Cell(
        items=items,
        churn=churn,
        drop=drop,
        runs=runs,
        passed=verdicts.count("PASS") / runs,
        failed=verdicts.count("FAIL") / runs,
        inconclusive=verdicts.count("INCONCLUSIVE") / runs,
        plain_failed=plain / runs,
        t_passed=t_passed / runs,
        bootstrap_passed=boot_passed / runs if bootstrap else None,
        exact_zero=zero / runs,
    )


def cells_wanted() -> list[tuple[int, float, float, bool]]:
    """(items, churn, drop, bootstrap too) of every cell: the starred figures, then the curves."""
    starred = [(100, churn, drop, drop > 0) for churn in CHURN for drop in (LIMIT, 0.0)]
    sizes = [(items, churn, drop, False) for items in SIZES for churn in CHURN for drop in (LIMIT, 0.0)]
    curves = [(items, 0.2, drop, False) for items in SIZES for drop in DROPS]
    wanted: dict[tuple[int, float, float], bool] = {}
    for *cell, bootstrap in [*starred, *sizes, *curves]:
        items, churn, drop = cell
        wanted.setdefault((items, churn, drop), bootstrap)
    return [(*cell, bootstrap) for cell, bootstrap in wanted.items()]


def starred_figures(cells: Sequence[Cell]) -> dict[str, Any]:
    """The figures that GATE.md marks with a star, each beside what it must be."""
    hundred = [cell for cell in cells if cell.items == 100 and cell.churn in CHURN]
    lost = [cell for cell in hundred if cell.drop == LIMIT]
    harmless = [cell for cell in hundred if cell.drop == 0.0]
    (same,) = [cell for cell in harmless if cell.churn == 0.0]
    return {
        "silent PASS of a true 5-point drop, n = 100": {
            "by churn": {f"{cell.churn:g}": cell.passed for cell in lost},
            "largest": max(cell.passed for cell in lost),
            "at most": 0.07,
        },
        "false FAIL under harmless churn, n = 100": {
            "by churn": {f"{cell.churn:g}": cell.failed for cell in harmless},
            "largest": max(cell.failed for cell in harmless),
            "at most": 0.01,
        },
        "A/A": {"D = 0 exactly": same.exact_zero, "PASS": same.passed, "both": 1.0},
        "the same drop by other rules, n = 100": {
            "the mean alone catches": [cell.plain_failed for cell in lost],
            "PASS by a plain t bound": [cell.t_passed for cell in lost],
            "PASS by a percentile bootstrap": [cell.bootstrap_passed for cell in lost],
        },
    }


def holds(figures: dict[str, Any]) -> bool:
    """Whether the starred figures are what they must be."""
    bounded = [figure for figure in figures.values() if "at most" in figure]
    same = figures["A/A"]
    return all(f["largest"] <= f["at most"] for f in bounded) and same["D = 0 exactly"] == same["PASS"] == 1.0


def table(cells: Sequence[Cell]) -> str:
    """The starred cells as the table of docs/gate.md, in percent."""
    rows = [
        "| answers drawn anew | silent PASS | FAIL | INCONCLUSIVE | PASS by a t bound | by a bootstrap "
        "| false FAIL, no drop |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_key = {(cell.churn, cell.drop): cell for cell in cells if cell.items == 100}
    for churn in CHURN:
        lost, harmless = by_key[churn, LIMIT], by_key[churn, 0.0]
        shares = (lost.passed, lost.failed, lost.inconclusive, lost.t_passed, lost.bootstrap_passed or 0.0)
        row = [f"{churn:.0%}", *(f"{share:.1%}" for share in shares), f"{harmless.failed:.2%}"]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows).replace("%", " %")


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """The power curves as SVG files."""
    mark = (100 * LIMIT, "limit")

    def curve(items: int, share: str) -> list[tuple[float, float]]:
        found = {c.drop: c for c in cells if c.items == items and c.churn == 0.2}
        return [(100 * drop, getattr(found[drop], share)) for drop in DROPS]

    verdicts = {
        "INCONCLUSIVE": curve(100, "inconclusive"),
        "FAIL": curve(100, "failed"),
        "PASS": curve(100, "passed"),
    }
    sizes = {f"{items} items": curve(items, "passed") for items in SIZES}
    caught = {f"{items} items": curve(items, "failed") for items in SIZES}
    label = "true drop of the system in points; limit 5 points, a fifth of the answers drawn anew"
    figures = {
        "gate-power.svg": plots.lines("What 100 items say of a true drop", verdicts, label, mark=mark),
        "gate-pass.svg": plots.lines("PASS by the number of items", sizes, label, mark=mark),
        "gate-fail.svg": plots.lines("FAIL by the number of items", caught, label, mark=mark),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (folder / name).write_text(svg)
    return [folder / name for name in figures]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with faithfulness_pool.json")
    parser.add_argument("--runs", type=int, default=2_000, help="runs of each cell")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "gate-power.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "img")
    options = parser.parse_args()
    pool = load_pool(options.data)
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes) as workers:
        cells = list(workers.map(partial(_cell, pool, options.runs), cells_wanted()))
    figures = starred_figures(cells)
    print(json.dumps(figures, indent=1))
    result = {
        **header("cpu"),
        "seconds": round(time.monotonic() - started),
        "pool": {
            "scores": len(pool),
            "mean": round(float(pool.mean()), 4),
            "ones": float((pool == 1).mean()),
        },
        "limit": LIMIT,
        "significant": SIGNIFICANT,
        "starred": figures,
        "cells": [asdict(cell) for cell in cells],
    }
    save(result, options.out)
    print(table(cells))
    for path in draw(cells, options.images):
        print(f"written to {path}")
    if not holds(figures):
        raise SystemExit("a starred figure does not hold")


def _cell(pool: np.ndarray, runs: int, wanted: tuple[int, float, float, bool]) -> Cell:
    items, churn, drop, bootstrap = wanted
    return simulate(pool, items, churn, drop, runs, bootstrap=bootstrap)


if __name__ == "__main__":
    main()
