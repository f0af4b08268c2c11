"""Maps from P(verdict) to the share that people call right, and the file that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from ragate.errors import ConfigError
from ragate.judging.mapping import (
    Calibration,
    ScoreMap,
    apply,
    crossfitted,
    fit,
    load_calibration,
    log_loss,
    save_calibration,
)
from ragate.judging.stats import calibration_error


def overconfident(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are `temperature` times too large, and labels drawn as they should be."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=count)
    labels = (random.uniform(size=count) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return 1 / (1 + np.exp(-temperature * logits)), labels


def calibration(**changes: object) -> Calibration:
    values = {
        "judge": "j",
        "metric": "faithfulness",
        "data": "d.jsonl",
        "items": 10,
        "fingerprint": {"judge_weights": "abc", "judge_backend": "cpu", "prompt_faithfulness": "p"},
        "scores": ScoreMap(temperature=2.0, knots=((0.1, 0.2), (0.9, 0.7)), method="isotonic"),
        "shown_hard": 0.5,
        "shown_soft": 0.4,
    }
    return Calibration.model_validate(values | changes)


def test_the_temperature_that_made_the_scores_is_found_again() -> None:
    scores, labels = overconfident(20_000, 3.0)
    assert fit(scores, labels, np.arange(20_000)).temperature == pytest.approx(3.0, rel=0.06)


def test_mapping_lowers_the_calibration_error_on_halves_that_it_was_not_fitted_on() -> None:
    scores, labels = overconfident(4_000, 4.0)
    before = calibration_error(scores, labels)
    for method in ("temperature", "isotonic"):
        mapped = crossfitted(scores, labels, np.arange(4_000), method)  # type: ignore[arg-type]
        assert calibration_error(mapped, labels) < before / 2
        assert log_loss(mapped, labels) < log_loss(scores, labels)


def test_log_loss_of_a_known_case() -> None:
    assert log_loss(np.array([0.5, 0.5]), np.array([0, 1])) == pytest.approx(np.log(2))
    assert log_loss(np.array([0.8]), np.array([1])) == pytest.approx(-np.log(0.8))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=2, max_size=50))
def test_the_isotonic_map_is_scipys_fit_at_every_score(pairs: list[tuple[int, int]]) -> None:
    scores = np.array([s / 8 for s, _ in pairs])
    labels = np.array([y for _, y in pairs], dtype=np.int64)
    values, ranks, counts = np.unique(scores, return_inverse=True, return_counts=True)
    level = isotonic_regression(np.bincount(ranks, labels) / counts, weights=counts.astype(float)).x
    fitted = fit(scores, labels, np.arange(len(pairs)))
    assert apply(fitted, values, "isotonic") == pytest.approx(level, abs=1e-8)
    grid = apply(fitted, np.linspace(0, 1, 101), "isotonic")
    assert (np.diff(grid) >= 0).all()


def test_a_map_keeps_the_order_and_a_temperature_keeps_the_side() -> None:
    fitted = ScoreMap(temperature=2.0, knots=((0.0, 0.1), (1.0, 0.6)), method="temperature")
    assert fitted(0.5) == pytest.approx(0.5)
    assert fitted(0.9) == pytest.approx(1 / (1 + np.exp(-np.log(9) / 2)))
    assert fitted.model_copy(update={"method": "isotonic"})(0.5) == pytest.approx(0.35)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    save_calibration(calibration(), path)
    assert load_calibration(path) == calibration()


def test_a_calibration_is_of_one_judge_and_one_prompt_whatever_the_device() -> None:
    mine = calibration().fingerprint
    assert calibration().differences(mine | {"judge_backend": "cuda", "other": "x"}) == []
    assert calibration().differences(mine | {"judge_weights": "other"}) == ["judge_weights"]
    assert calibration().differences({"judge_weights": "abc"}) == ["prompt_faithfulness"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[1]", "calibration.json: scores"),
        (json.dumps({"judge": "j"}), "metric: Field required"),
        (
            calibration().model_dump_json().replace("[0.9,0.7]", "[0.05,0.7]"),
            "scores: Value error, the knots must rise",
        ),
    ],
)
def test_a_broken_calibration_is_one_sentence_with_the_way_out(
    tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_calibration(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "ragate judge calibrate" in str(caught.value)
