"""From P(verdict) to the share of answers that people call right: temperature and isotonic maps, fitted and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from ragate.errors import ConfigError
from ragate.files import write_whole
from ragate.judging.stats import SEED, Floats, Ints, halves
from ragate.metrics import way_of
from ragate.run import Frozen

Method = Literal["temperature", "isotonic"]
METHODS: tuple[Method, ...] = ("temperature", "isotonic")

LEAST = 1e-6
"""Probabilities are kept this far from 0 and 1: they come with 6 decimals."""
LOOSE_FIELDS = ("judge_backend", "judge_dtype", "judge_engine", "ragas", "pydantic")
"""Fields of the fingerprint that move a probability by rounding alone (a map made on a card holds on a CPU), or not at
all while the prompt's hash stays."""

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class ScoreMap(Frozen):
    """A monotone map of probabilities."""

    temperature: float = Field(gt=0, allow_inf_nan=False)
    """P becomes sigmoid(logit(P) / temperature) (Guo et al. 2017): order and the side of 0.5 stay."""
    knots: tuple[tuple[Probability, Probability], ...] = Field(min_length=1)
    """The isotonic map (P, share), linear between knots and level beyond."""
    method: Method
    """Which of the two is used: the one of the lower log loss on halves that it was not fitted on."""

    @model_validator(mode="after")
    def _monotone(self) -> ScoreMap:
        for (x, y), (later, above) in zip(self.knots, self.knots[1:], strict=False):
            if not (x < later and y <= above):
                raise ValueError("the knots must rise")
        return self

    def __call__(self, probability: float) -> float:
        """The mapped probability."""
        return float(apply(self, np.array([probability]), self.method)[0])


def apply(fitted: ScoreMap, scores: Floats, method: Method) -> Floats:
    """`scores` mapped."""
    if method == "temperature":
        return _sigmoid(_logit(scores) / fitted.temperature)
    x, y = np.array(fitted.knots, dtype=np.float64).T
    return np.asarray(np.interp(scores, x, y), dtype=np.float64)


def fit(scores: Floats, labels: Ints, clusters: Ints) -> ScoreMap:
    """Both maps, fitted on all; which one is used is decided on halves of the clusters."""
    losses = {method: log_loss(crossfitted(scores, labels, clusters, method), labels) for method in METHODS}
    fitted = _fitted(scores, labels)
    return fitted.model_copy(update={"method": min(METHODS, key=lambda method: losses[method])})


def crossfits(scores: Floats, labels: Ints, clusters: Ints) -> list[tuple[npt.NDArray[np.bool_], ScoreMap]]:
    """Each half of the clusters, as a mask of the items, and the maps fitted on the other; none of one cluster."""
    first = halves(clusters, SEED)
    if first.all():
        return []
    return [(part, _fitted(scores[~part], labels[~part])) for part in (first, ~first)]


def crossfitted(scores: Floats, labels: Ints, clusters: Ints, method: Method) -> Floats:
    """Each half of the clusters mapped as fitted on the other."""
    mapped = np.array(scores)
    for part, fitted in crossfits(scores, labels, clusters):
        mapped[part] = apply(fitted, scores[part], method)
    return mapped


def log_loss(scores: Floats, labels: Ints) -> float:
    """Mean of minus the natural log of the probability that the label was given."""
    kept = np.clip(scores, LEAST, 1 - LEAST)
    return float(-np.mean(np.where(labels == 1, np.log(kept), np.log1p(-kept))))


def _fitted(scores: Floats, labels: Ints) -> ScoreMap:
    return ScoreMap(
        temperature=_temperature(scores, labels), knots=_knots(scores, labels), method="temperature"
    )


def _temperature(scores: Floats, labels: Ints) -> float:
    from scipy.optimize import minimize_scalar

    logits = _logit(scores)
    found = minimize_scalar(
        lambda log_t: log_loss(_sigmoid(logits / np.exp(log_t)), labels), bounds=(-3, 5), method="bounded"
    )
    return round(float(np.exp(found.x)), 6)


def _knots(scores: Floats, labels: Ints) -> tuple[tuple[float, float], ...]:
    """Where the least-squares rising fit (pool adjacent violators) bends; equal scores are one point."""
    from scipy.optimize import isotonic_regression

    values, ranks, counts = np.unique(scores, return_inverse=True, return_counts=True)
    shares = np.bincount(ranks, labels) / counts
    level = isotonic_regression(shares, weights=counts.astype(np.float64)).x
    # of a level stretch its ends are enough
    kept = [
        i
        for i in range(len(level))
        if not 0 < i < len(level) - 1 or not level[i - 1] == level[i] == level[i + 1]
    ]
    return tuple((float(values[i]), round(float(level[i]), 9)) for i in kept)


def _logit(scores: Floats) -> Floats:
    kept = np.clip(scores, LEAST, 1 - LEAST)
    return np.asarray(np.log(kept) - np.log1p(-kept))


def _sigmoid(logits: Floats) -> Floats:
    from scipy.special import expit

    return np.asarray(expit(logits), dtype=np.float64)


class Calibration(Frozen):
    """What is known of one judge, for whoever uses it: `ragate judge calibrate` writes it as SUBJECT-map.json."""

    version: Literal[1] = 1
    judge: str
    metric: Literal["faithfulness", "context_precision"]
    """Whose prompt was asked."""
    data: str
    items: int
    fingerprint: dict[str, str]
    """The fields of a run's fingerprint that the judge and this metric's prompt have."""
    scores: ScoreMap
    shown_hard: Share
    """Share of a true drop that hard scores show: their mean over label 1 less their mean over label 0.

    Of 0/1 verdicts that is sensitivity + specificity - 1 (Youden 1950)."""
    shown_soft: Share
    """The same of mapped scores, each half of the clusters mapped as fitted on the other."""

    def differences(self, fingerprint: dict[str, str]) -> list[str]:
        """The fields in which another fingerprint is another judge or another prompt."""
        ours, theirs = (_adapter_once(each) for each in (self.fingerprint, fingerprint))
        return [
            name
            for name in dict.fromkeys((*ours, "judge_adapter"))
            if name not in LOOSE_FIELDS and theirs.get(name) != ours.get(name)
        ]

    def command(self, fingerprint: dict[str, str]) -> str:
        """What makes such a calibration for a run with this fingerprint."""
        faithfulness = self.metric == "faithfulness"
        option = f"--statements {way_of(fingerprint)}" if faithfulness else "--calls relevance"
        return f"`ragate judge calibrate {option}`"


def _adapter_once(fingerprint: dict[str, str]) -> dict[str, str]:
    """The fingerprint with one field for an adapter, be it merged into the weights or beside them."""
    fields = dict(fingerprint)
    if merged := fields.pop("judge_merged_adapter", None):
        fields["judge_adapter"] = merged
    return fields


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration. Raises RunError where that fails."""
    write_whole(path, calibration.model_dump_json(indent=1) + "\n")


def load_calibration(path: Path) -> Calibration:
    """Read a calibration. Raises ConfigError naming file and field."""
    way_out = "make one with `ragate judge calibrate`"
    try:
        return Calibration.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}; {way_out}") from None
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"])) or "scores"
        raise ConfigError(f"{path}: {field}: {first['msg']}; {way_out}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not JSON; {way_out}") from None
