"""What `ragate init` writes into a repository: ragate.toml, and the GitHub action and workflows that run the gate."""

from __future__ import annotations

import json
from importlib import metadata, resources
from typing import TYPE_CHECKING

from ragate import __version__
from ragate.errors import ConfigError
from ragate.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SETTINGS_FILE = "ragate.toml"
CI_FILES = {
    "action.yml": ".github/actions/ragate/action.yml",
    "rag-gate.yml": ".github/workflows/rag-gate.yml",
    "rag-gate-comment.yml": ".github/workflows/rag-gate-comment.yml",
}
"""Template in ragate/ci -> where it goes."""
PINNED = ("pydantic",)
"""Packages beside ragate whose version stands in the fingerprint: with another one a baseline is INVALID."""
COMMENT_PACKAGES = ("click", "httpx", "numpy", "platformdirs", "pydantic", "rich", "scipy")
"""All that `ragate comment` imports: the job that comments for forks needs no judge and no torch."""
QUESTIONS = {
    "testset": "Test cases (a file, a folder, or datasets:NAME)",
    "target": "What answers the questions (stored, module:callable, a URL, cmd:...)",
    "judge": "The model that judges (`ragate models list`)",
    "threshold": "The drop of a metric that fails, as a share of its baseline",
}
"""Setting -> what `ragate init` asks."""
NEXT = """\
next: put your test cases where ragate.toml says, and commit what was written
      `ragate eval`, then `ragate baseline set` and commit baselines/; or let CI make the baseline: start the workflow
      "RAG gate" by hand with update-baseline and commit the baseline.json of its artifact"""

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
target = TARGET
# target_timeout = 600

# Which of the four to score.
metrics = ["context_precision", "context_recall", "faithfulness", "answer_relevance"]

# The model that judges: "auto" is qwen-0.5b-judge; `ragate models list` shows the others; a .gguf file or a URL.
# Scores of different judges cannot be compared: name one here to have the same on every machine.
judge = JUDGE
# A LoRA adapter that it wears, made by `ragate judge tune`.
# adapter = "judges/mine"
# embeddings = "all-minilm-l6-v2"

# A metric that falls by this much fails the gate: 5 % of the baseline's mean, or points when absolute.
# A drop that chance may have made is INCONCLUSIVE; strategy = "point" looks at the mean drop alone.
threshold = THRESHOLD
threshold_mode = "relative"
# strategy = "significant"
# What INCONCLUSIVE does: "fail", "warn", or "auto": fail where a mean fell by its limit.
# on_inconclusive = "auto"
# When cases marked "reserve": true are judged: "auto" is where the others cannot tell, and for a baseline.
# reserve = "auto"
# The baseline of the last release: every run is held against it too, so that small losses do not add up.
# release = "baselines/RELEASE.json"
# How large a true drop can be seen is said where the judge's accuracy is known, as of those that ship. Of another, its
# balanced accuracy on labelled data:
# judge_accuracy = 0.8
# Or the map that `ragate judge calibrate` wrote for it (with `--statements judge` or `sentences`, as below), which says
# it; soft scores go through it as well. It is written into .ragate/, which is not committed: copy it here.
# calibration = "baselines/faithfulness-judge-map.json"
# What cuts answers up for faithfulness: "judge", as ragas has it, or "sentences", of which the judges that ship are
# surer; a baseline is of one of them.
# statements = "sentences"
# "hard" is a score of verdicts, as ragas makes it; "soft" is one of their probabilities.
# scores = "soft"

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
# These may. On a card: 8-bit floats for K and V, twice the tokens in the same memory; quantized weights kept packed,
# with an adapter beside them.
# kv_dtype = "fp8_e4m3"
# weights = "packed"

# What the target is called with: keyword arguments of a class, headers of a URL, input_key of a Runnable.
# [target_options]
# k = 5

# What one metric is held to: a threshold and threshold_mode of its own, and min, a floor for its mean.
# [gate.faithfulness]
# min = 0.8
"""


def default_answers(folder: Path) -> dict[str, str]:
    """What is written where nobody is asked: a test set that is found in `folder` is named."""
    return {"testset": _find_testset(folder), "target": "stored", "judge": "auto", "threshold": "0.05"}


def plan_init(folder: Path, answers: Mapping[str, str] | None = None) -> list[tuple[Path, str]]:
    """What would be written into `folder`: (path, content), `.ragate/` added to .gitignore last, where it is missing.

    `answers` are those to `QUESTIONS`. Raises ConfigError naming one that makes no sense.
    """
    answers = default_answers(folder) | dict(answers or {})
    try:
        threshold = float(answers["threshold"])
    except ValueError:
        threshold = 0.0
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"threshold must be above 0 and at most 1, got {answers['threshold']!r}; 5 % is 0.05"
        )
    settings = SETTINGS.replace("THRESHOLD", repr(threshold))
    for key in ("target", "judge", "testset"):
        settings = settings.replace(key.upper(), json.dumps(answers[key], ensure_ascii=False), 1)
    plan = [(folder / SETTINGS_FILE, settings)]
    plan += [(folder / place, ci_text(name)) for name, place in CI_FILES.items()]
    ignore = folder / ".gitignore"
    lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.is_file() else []
    if not {".ragate", ".ragate/", "/.ragate", "/.ragate/"} & {line.strip() for line in lines}:
        plan.append((ignore, "\n".join([*lines, ".ragate/"]) + "\n"))
    return plan


def ci_text(name: str) -> str:
    """A file of `CI_FILES` with this ragate's version, and with the versions here that stand in the fingerprint."""
    text = resources.files("ragate.ci").joinpath(name).read_text(encoding="utf-8")
    pins = " ".join(f"{package}=={metadata.version(package)}" for package in PINNED)
    values = {"VERSION": __version__, "PINS": pins, "PACKAGES": " ".join(COMMENT_PACKAGES)}
    for word, value in values.items():
        text = text.replace(word, value)
    return text


def write_init(folder: Path, answers: Mapping[str, str] | None = None, *, force: bool = False) -> list[Path]:
    """Write the plan and return the paths written.

    Raises ConfigError before anything is written when a file is there already and `force` is false, RunError
    when the disk refuses.
    """
    plan = plan_init(folder, answers)
    there = [str(path.relative_to(folder)) for path, _ in plan if path.exists() and path.name != ".gitignore"]
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
