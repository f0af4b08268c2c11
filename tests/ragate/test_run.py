"""A run file is believed only where an evaluation could have written it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import plain_run

from ragate.errors import RunError
from ragate.run import Run, Score, load_run, save_run


def changed(**fields: object) -> Run:
    return plain_run({"m": [0.5] * 12}).model_copy(update=fields)


RUN = plain_run({"m": [0.5] * 12})
IMPOSSIBLE = {
    "m of item 'q000' is 1000, and scores lie in 0 to 1": changed(
        scores=(RUN.scores[0].model_copy(update={"value": 1000.0}), *RUN.scores[1:])
    ),
    "m of item 'q000' is -0.5, and scores lie in 0 to 1": changed(
        scores=(RUN.scores[0].model_copy(update={"value": -0.5}), *RUN.scores[1:])
    ),
    "score 'm of q000' is there twice": changed(
        scores=(*RUN.scores, Score(item="q000", metric="m", state="ok", value=0.9))
    ),
    "item 'q011' is there twice": changed(items=(*RUN.items, RUN.items[-1])),
    "metric 'm' is there twice": changed(metrics=("m", "m")),
    "version 99 is newer than this ragate reads (1); update ragate": changed(version=99),
}


@pytest.mark.parametrize("says", IMPOSSIBLE)
def test_what_no_evaluation_writes_is_refused_in_one_sentence(says: str, tmp_path: Path) -> None:
    save_run(IMPOSSIBLE[says], tmp_path / "run.json")
    with pytest.raises(RunError) as caught:
        load_run(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'run.json'}: not a ragate run: {says}"


def test_a_score_that_is_no_number_is_read_and_counts_in_no_mean(tmp_path: Path) -> None:
    nan = RUN.scores[0].model_copy(update={"value": math.nan})
    save_run(changed(scores=(nan, *RUN.scores[1:])), tmp_path / "run.json")
    found = load_run(tmp_path)
    assert found.mean("m") == 0.5 and "q000" not in found.values("m")
