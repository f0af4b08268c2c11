"""Soft scores: what a metric gives for P(verdict = 1) in place of verdicts of 0 and 1."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate.judging.mapping import Calibration
    from ragate.run import Claim

FIELD = "scores"
"""Field of the fingerprint of a run with soft scores; a run with hard ones has none."""


@dataclass(frozen=True)
class SoftScores:
    """How probabilities become scores."""

    calibration: Calibration | None = None
    """Maps the probabilities of the metric that it was made for; others are taken as they are."""

    @property
    def identity(self) -> str:
        """What is to be said of it in the fingerprint."""
        if self.calibration is None:
            return "soft"
        fitted = self.calibration.scores.model_dump_json().encode()
        return f"soft, {self.calibration.metric} mapped by {hashlib.sha256(fitted).hexdigest()[:16]}"

    def value(self, metric: str, claims: Sequence[Claim]) -> float:
        """The soft score of one item; of probabilities that are all 0 and 1, the hard one.

        faithfulness, context_recall: mean of P. context_precision: ragas' average precision with P for the verdict,
        0 where all are 0. answer_relevance: similarity times P(committal). Raises ValueError where the judge gave no
        probability of a verdict.
        """
        if unknown := sum(claim.probability is None for claim in claims):
            raise ValueError(f"the judge gave no probability of {unknown} of its {len(claims)} verdicts")
        chances = [self._mapped(metric, claim.probability or 0.0) for claim in claims]
        if metric == "context_precision":
            return average_precision(chances)
        if metric == "answer_relevance":
            pairs = zip(claims, chances, strict=True)
            return math.fsum((claim.similarity or 0.0) * p for claim, p in pairs) / len(claims)
        return math.fsum(chances) / len(chances)

    def check(self, fingerprint: dict[str, str]) -> None:
        """Raise ConfigError where the calibration is of another judge or prompt than this fingerprint of a run."""
        if self.calibration is None or f"prompt_{self.calibration.metric}" not in fingerprint:
            return
        if other := self.calibration.differences(fingerprint):
            raise ConfigError(
                f"calibration: it is of {self.calibration.judge} with another {', '.join(other)}; "
                f"calibrate this one with {self.calibration.command(fingerprint)}"
            )

    def _mapped(self, metric: str, probability: float) -> float:
        if self.calibration is None or self.calibration.metric != metric:
            return probability
        return self.calibration.scores(probability)


def average_precision(useful: Sequence[float]) -> float:
    """ragas' context precision: of ranked contexts, mean over the useful ones of the share useful so far.

    With probabilities, each rank counts by its own: sum of p_k (p_1 + ... + p_k) / k over sum of p_k.
    """
    total = math.fsum(useful)
    if total == 0:
        return 0.0
    ranks = enumerate(useful, start=1)
    return math.fsum(p * math.fsum(useful[:k]) / k for k, p in ranks) / total
