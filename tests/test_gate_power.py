"""The gate's simulation: the starred figures of its specification with fixed seeds, and what they are made of."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from bench import gate_power
from ragate.gate.baseline import baseline_of
from ragate.gate.stats import johnson_bounds, sign_flip_p
from ragate.gate.verdict import decide, verdict_of_drop
from ragate.run import ItemRecord, Run, Score

POOL = gate_power.DATA / "faithfulness_pool.json"
needs_pool = pytest.mark.skipif(not POOL.exists(), reason="the labelled data is not beside the repository")


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    return gate_power.load_pool(gate_power.DATA)


@needs_pool
@pytest.mark.parametrize("churn", [0.0, 0.2, 0.5])
def test_at_most_seven_in_a_hundred_true_drops_of_the_limit_pass(pool: np.ndarray, churn: float) -> None:
    cell = gate_power.simulate(pool, 100, churn, 0.05, 1500, flips=400)
    assert cell.passed <= 0.07
    assert 0.45 <= cell.plain_failed <= 0.56  # the mean alone catches half of them, whatever the sample
    assert cell.t_passed > cell.passed  # what the allowance for skew is for


@needs_pool
@pytest.mark.parametrize("churn", [0.2, 0.5])
def test_at_most_one_in_a_hundred_harmless_changes_fails(pool: np.ndarray, churn: float) -> None:
    assert gate_power.simulate(pool, 100, churn, 0.0, 1500, flips=400).failed <= 0.01


@needs_pool
def test_an_unchanged_system_has_a_drop_of_exactly_zero_and_passes(pool: np.ndarray) -> None:
    cell = gate_power.simulate(pool, 100, 0.0, 0.0, 200)
    assert (cell.exact_zero, cell.passed, cell.failed, cell.inconclusive) == (1.0, 1.0, 0.0, 0.0)


@needs_pool
def test_the_simulated_drop_is_the_true_one_on_average(pool: np.ndarray) -> None:
    means = [drops.mean() for drops in gate_power.drops_of(pool, 100, 0.3, 0.05, 4000)]
    assert np.mean(means) == pytest.approx(0.05, abs=4 * np.std(means) / np.sqrt(4000))


def test_the_simulated_verdict_is_that_of_the_gate() -> None:
    scores = np.array([1.0] * 8 + [0.5, 0.75])
    seen = set()
    for drops in gate_power.drops_of(scores, 60, 0.2, 0.06, 40):
        estimate = johnson_bounds(drops.tolist())
        short = verdict_of_drop(
            estimate.mean, estimate.upper, sign_flip_p(drops.tolist()), gate_power.LIMIT, "significant"
        )
        base = np.clip(0.5 + drops / 2, 0, 1)  # halved, so that any drop fits; the limit with it
        gate = decide(
            baseline_of(_run(base), commit=None, date=datetime(2025, 1, 1, tzinfo=UTC)),
            _run(base - drops / 2),
            threshold=gate_power.LIMIT / 2,
            mode="absolute",
        )
        assert gate.verdict == short
        seen.add(short)
    assert seen == {"PASS", "INCONCLUSIVE", "FAIL"}


def _run(values: np.ndarray) -> Run:
    return Run(
        suite="s",
        testset="s",
        testset_hash="0",
        metrics=("m",),
        judge="j",
        target="stored",
        fingerprint={},
        items=tuple(ItemRecord(id=str(i), question="?") for i in range(len(values))),
        scores=tuple(
            Score(item=str(i), metric="m", state="ok", value=float(v)) for i, v in enumerate(values)
        ),
    )


def test_the_committed_result_holds_and_the_pages_figures_are_drawn_from_it(tmp_path: Path) -> None:
    result = json.loads((gate_power.RESULTS / "gate-power.json").read_text())
    cells = [gate_power.Cell(**cell) for cell in result["cells"]]
    assert gate_power.starred_figures(cells) == result["starred"]
    assert gate_power.holds(result["starred"])
    for path in gate_power.draw(cells, tmp_path):
        ET.parse(path)
        assert path.read_text() == (gate_power.ROOT / "docs/img" / path.name).read_text()
    assert gate_power.table(cells) in (gate_power.ROOT / "docs/gate.md").read_text()


def test_a_figure_that_does_not_hold_is_noticed() -> None:
    result = json.loads((gate_power.RESULTS / "gate-power.json").read_text())
    for name in [name for name, figure in result["starred"].items() if "at most" in figure]:
        worse = result["starred"] | {name: result["starred"][name] | {"largest": 0.08}}
        assert not gate_power.holds(worse)
    assert not gate_power.holds(result["starred"] | {"A/A": {"D = 0 exactly": 1.0, "PASS": 0.99}})


def test_a_missing_pool_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data"):
        gate_power.load_pool(tmp_path)
