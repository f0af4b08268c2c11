"""What `ragate init` writes into a repository: ragate.toml and the GitHub workflow that runs the gate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ragate import __version__
from ragate.errors import ConfigError
from ragate.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS_FILE = "ragate.toml"
WORKFLOW_FILE = ".github/workflows/rag-gate.yml"

SETTINGS = """\
# Settings of ragate; bare `ragate eval` reads them. A flag (--threshold 0.03) or a variable
# (RAGATE_THRESHOLD=0.03) goes before what stands here. Lines beginning with # show the defaults.
# What a run writes goes to .ragate/: add it to .gitignore. Commit baselines/.

# Test cases: json, jsonl, csv, parquet, a folder of them, or "datasets:NAME". One case of a jsonl file:
# {"id": "refund-1", "question": "…", "reference": "the right answer", "answer": "…", "contexts": ["…"]}
# `answer` and `contexts` only where they are stored; else the target gives them. "critical": true marks
# a case that fails the gate by itself when it breaks.
testset = TESTSET

# What answers the questions: "stored" (the test set has the answers), "module:callable", a URL, "cmd:…".
target = "stored"
# target_timeout = 600

# Which of the four to score.
metrics = ["context_precision", "context_recall", "faithfulness", "answer_relevance"]

# The model that judges: "auto" picks by device; `ragate models list` shows the others; a .gguf file or a URL.
# Scores of different judges cannot be compared: name one here to have the same on every machine.
judge = "auto"
# embeddings = "all-minilm-l6-v2"

# A metric that falls by this much fails the gate: 5 % of the baseline's mean, or points when absolute.
# A drop that chance may have made is INCONCLUSIVE; strategy = "point" looks at the mean drop alone.
threshold = 0.05
threshold_mode = "relative"
# strategy = "significant"
# What INCONCLUSIVE does: "fail", "warn", or "auto": fail where a mean fell by its limit.
# on_inconclusive = "auto"
# When cases marked "reserve": true are judged: "auto" is where the others cannot tell, and for a baseline.
# reserve = "auto"
# The baseline of the last release: every run is held against it too, so that small losses do not add up.
# release = "baselines/RELEASE.json"
# The judge's balanced accuracy on labelled data, where you know it: how large a true drop can be seen.
# judge_accuracy = 0.8

# The scores to compare with, made by `ragate baseline set`.
# baseline = "baselines/SUITE.json"

# Where the judge runs (auto, cpu, cuda), how many cases (all), where the run is kept.
# device = "auto"
# limit = 20
# out = ".ragate/SUITE"
# Seconds without progress after which a score is given up; none of these changes a score:
# call_timeout = 600
# max_batch = 64
# kv_gib = 2
# threads = 4
# These may. On a card: 8-bit floats for K and V, twice the tokens in the same memory; quantized weights kept packed.
# kv_dtype = "fp8_e4m3"
# weights = "packed"

# What the target is called with: keyword arguments of a class, headers of a URL, input_key of a Runnable.
# [target_options]
# k = 5

# What one metric is held to: a threshold and threshold_mode of its own, and min, a floor for its mean.
# [gate.faithfulness]
# min = 0.8
"""

WORKFLOW = """\
# Written by `ragate init`: judges every pull request against the baseline that is committed in baselines/.
# The first time: run it by hand, download run.json from the artifact, `ragate baseline set run.json`, commit.
# A baseline made on another machine may differ in its fingerprint; the gate then says INVALID and why.
name: RAG gate

on:
  pull_request:
  workflow_dispatch:

# The job only reads the code: it posts nothing, so it needs no more than this, also for forks.
permissions:
  contents: read

concurrency:
  group: rag-gate-${{ github.ref }}
  cancel-in-progress: true

jobs:
  rag-gate:
    runs-on: ubuntu-latest
    timeout-minutes: 60
    env:
      # one version for everybody: another may ask the judge differently
      RAGATE_VERSION: "VERSION"
    steps:
      - uses: actions/checkout@v5
        with:
          persist-credentials: false

      - uses: actions/setup-python@v6
        with:
          python-version: "3.12"

      - name: Install ragate
        run: |
          python -m pip install torch --index-url https://download.pytorch.org/whl/cpu
          python -m pip install "ragate==${RAGATE_VERSION}"
          # install here what your own system needs, if ragate.toml names a target

      - name: Cache the models
        uses: actions/cache@v4
        with:
          path: ~/.cache/ragate/models
          key: ragate-models-${{ runner.os }}-${{ env.RAGATE_VERSION }}

      # exit code: 0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 INVALID or no baseline, 4 bad input
      - name: Evaluate and gate
        run: ragate eval --quiet

      - name: Show the result
        if: ${{ !cancelled() }}
        run: cat .ragate/*/comment.md >> "$GITHUB_STEP_SUMMARY" || true

      - name: Keep the report
        if: ${{ !cancelled() }}
        uses: actions/upload-artifact@v5
        with:
          name: rag-gate
          path: |
            .ragate/*/report.html
            .ragate/*/comment.md
            .ragate/*/run.json
            .ragate/*/timings.json
          # .ragate begins with a dot
          include-hidden-files: true
          if-no-files-found: ignore
"""


def plan_init(folder: Path) -> list[tuple[Path, str]]:
    """What would be written into `folder`: (path, content). A test set that is found there is named in it."""
    settings = SETTINGS.replace("TESTSET", json.dumps(_find_testset(folder)))
    workflow = WORKFLOW.replace('"VERSION"', f'"{__version__}"')
    return [(folder / SETTINGS_FILE, settings), (folder / WORKFLOW_FILE, workflow)]


def write_init(folder: Path, *, force: bool = False) -> list[Path]:
    """Write the plan and return the paths written.

    Raises ConfigError before anything is written when a file is there already and `force` is false, RunError
    when the disk refuses.
    """
    plan = plan_init(folder)
    there = [str(path.relative_to(folder)) for path, _ in plan if path.exists()]
    if there and not force:
        verb = "is" if len(there) == 1 else "are"
        raise ConfigError(f"{' and '.join(there)} {verb} there already; --force overwrites")
    for path, content in plan:
        write_whole(path, content)
    return [path for path, _ in plan]


def _find_testset(folder: Path) -> str:
    """A file of test cases by its usual places, or the name to put one under."""
    for pattern in ("testset.*", "testsets/*", "evals/testset.*"):
        for path in sorted(folder.glob(pattern)):
            if path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
                return path.relative_to(folder).as_posix()
    return "testset.jsonl"
