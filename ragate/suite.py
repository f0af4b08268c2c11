"""One `ragate eval`, from settings to files: load, judge, save the run, decide, write the reports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ragate import catalog
from ragate.endpoint import KEY_VARIABLE, is_url
from ragate.errors import BaselineError, ConfigError
from ragate.files import write_whole
from ragate.gate.baseline import (
    Baseline,
    baseline_of,
    baseline_path,
    git_commit,
    load_baseline,
    save_baseline,
)
from ragate.gate.verdict import GateResult, decide
from ragate.run import Run, load_run, save_run

if TYPE_CHECKING:
    from ragate.config import Settings
    from ragate.evaluate import Event, Timings
    from ragate.journal import Journal
    from ragate.judge import Judge, UrlJudge
    from ragate.testset import TestSet

Say = Callable[[str, int, int], None]
"""Progress of a phase: (what, done, total)."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation left: the run, its verdict, and where the files are."""

    run: Run
    gate: GateResult | None
    """`None` where there is no baseline."""
    baseline: Baseline | None
    baseline_path: Path
    timings: dict[str, object]
    written: tuple[Path, ...]


def out_folder(settings: Settings, suite: str) -> Path:
    """Where a suite's run is kept: `--out`, else `.ragate/<suite>`."""
    return Path(settings.out) if settings.out else Path(settings.root) / ".ragate" / suite


def baseline_of_suite(settings: Settings, suite: str) -> Path:
    """Where a suite's baseline is kept: the setting, else `baselines/<suite>.json`."""
    return (
        Path(settings.baseline)
        if settings.baseline
        else baseline_path(Path(settings.root) / "baselines", suite)
    )


def suite_of(settings: Settings) -> str:
    """Name of the suite that the settings name, whose test set need not be there. Raises ConfigError: none."""
    from ragate.testset import suite_name

    if not settings.testset:
        raise ConfigError(
            "no test set is named, and so no suite; name a run or a file, or set `testset` in ragate.toml"
        )
    return suite_name(settings.testset)


def load_suite(settings: Settings) -> TestSet:
    """The test set that the settings name, checked for what the metrics need."""
    from ragate.testset import load_testset, require

    testset = load_testset(settings.testset, limit=settings.limit)
    require(testset, settings.metrics, settings.target == "stored")
    return testset


def run_suite(
    settings: Settings, say: Say, on_event: Callable[[Event], None], *, replaces: bool = False
) -> Outcome:
    """Evaluate as `settings` say; writes run.json, timings.json, report.html and comment.md into the run folder.

    A run that `replaces` the baseline is refused before the judging where the baseline has more metrics.

    Raises RagateError or EngineError with one sentence; KeyboardInterrupt after the journal is safe.
    """
    from ragate.journal import Journal

    testset = load_suite(settings)
    folder = out_folder(settings, testset.name)
    path = baseline_of_suite(settings, testset.name)
    # before the judging: a broken baseline is not to be found out minutes later
    baseline = load_baseline(path) if path.exists() else None

    if replaces and baseline is not None:
        refuse_fewer_metrics(baseline, settings.metrics, path)
    # before the run folder: a mistyped judge leaves nothing behind
    judge = _named_judge(settings, say)

    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(folder / "journal.jsonl"))
        run, timings = _evaluate(settings, testset, judge, journal, say, on_event, stack)
        save_run(run, folder / "run.json")
        write_whole(folder / "timings.json", timings.model_dump_json(indent=1) + "\n")
        costs: dict[str, object] = timings.model_dump()
        gate = None if baseline is None else verdict_of(settings, baseline, run)
        written = (folder / "run.json", *write_reports(folder, run, gate, baseline, costs))
    return Outcome(run, gate, baseline, path, costs, written)


def _named_judge(settings: Settings, say: Say) -> UrlJudge | catalog.JudgeChoice:
    """The judge that the settings name: an endpoint that is there, or a model, fetched but not yet loaded."""
    if is_url(settings.judge):
        from ragate.judge import UrlJudge

        return UrlJudge(settings.judge, api_key=os.environ.get(KEY_VARIABLE))
    return catalog.resolve_judge(
        settings.judge,
        settings.device,
        progress=lambda done, total: say("fetching the judge", done, total),
    )


def _evaluate(
    settings: Settings,
    testset: TestSet,
    named: UrlJudge | catalog.JudgeChoice,
    journal: Journal,
    say: Say,
    on_event: Callable[[Event], None],
    stack: ExitStack,
) -> tuple[Run, Timings]:
    """Open judge, target and embeddings, and judge; heavy imports happen here."""
    from concurrent.futures import ThreadPoolExecutor

    from ragate import session
    from ragate_engine import EngineConfig

    kv = None if settings.kv_gib is None else int(settings.kv_gib * 2**30)
    session.configure(
        EngineConfig(
            device=settings.device,
            max_batch=settings.max_batch,
            kv_bytes=kv,
            kv_dtype=settings.kv_dtype,
            weights=settings.weights,
            threads=settings.threads,
        )
    )
    stack.callback(session.close_engines)
    loading = None
    if isinstance(named, catalog.JudgeChoice):
        # the model loads while ragas and the embeddings are imported: each takes seconds
        loader = stack.enter_context(ThreadPoolExecutor(1, "ragate-load"))
        loading = loader.submit(
            session.open_engine, named.path, lambda done, total: say("loading the judge", done, total)
        )

    from ragate.evaluate import evaluate
    from ragate.metrics import metrics_named
    from ragate.target import open_target

    metrics = metrics_named(settings.metrics)
    target = None
    if settings.target != "stored":
        target = open_target(
            settings.target, timeout=settings.target_timeout, options=settings.target_options
        )
        stack.callback(target.close)
    embeddings = None
    if any(metric.embeds for metric in metrics):
        from ragate.embeddings import MiniLM

        catalog.model_path(
            settings.embeddings, progress=lambda done, total: say("fetching embeddings", done, total)
        )
        embeddings = MiniLM()
        stack.callback(embeddings.close)
    note = None
    if isinstance(named, catalog.JudgeChoice):
        from ragate.judge import EngineJudge

        assert loading is not None
        judge: Judge = EngineJudge(loading.result(), named.name or str(named.path))
        note = named.note
    else:
        judge = named
    return evaluate(
        testset,
        settings.metrics,
        judge,
        journal,
        embeddings=embeddings,
        target=target,
        judge_note=note,
        on_event=on_event,
        call_timeout=settings.call_timeout,
    )


def verdict_of(settings: Settings, baseline: Baseline, run: Run) -> GateResult:
    """The verdict on a run of this suite, over the metrics that the run was asked to score.

    A run has fewer than its baseline only where --metrics or the settings file says so; one that the baseline
    lacks makes the verdict INVALID.
    """
    return decide(
        baseline, run, threshold=settings.threshold, mode=settings.threshold_mode, metrics=run.metrics
    )


def write_reports(
    folder: Path,
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: dict[str, object] | None,
) -> tuple[Path, ...]:
    """Write report.html and comment.md, both made from stored data alone."""
    from ragate.report.html import render_html
    from ragate.report.markdown import render_comment

    write_whole(folder / "report.html", render_html(run, gate, baseline, timings))
    write_whole(folder / "comment.md", render_comment(run, gate, baseline))
    return folder / "report.html", folder / "comment.md"


def load_timings(folder: Path) -> dict[str, object] | None:
    """The timings beside a stored run, or `None` where there are none."""
    try:
        data = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def make_baseline(run: Run) -> Baseline:
    """The baseline that `run` makes now, at this commit."""
    return baseline_of(run, commit=git_commit(Path.cwd()), date=datetime.now(UTC))


def load_stored(path: Path) -> Run:
    """A stored run: `path` is its folder or its file. Raises RunError."""
    return load_run(path if path.suffix == ".json" else path / "run.json")


def load_base(path: Path) -> Baseline:
    """A baseline file, or a stored run taken as one. Raises BaselineError or RunError."""
    if path.is_dir() or path.name == "run.json":
        run = load_stored(path)
        file = path / "run.json" if path.is_dir() else path
        return baseline_of(run, commit=None, date=datetime.fromtimestamp(file.stat().st_mtime, UTC))
    return load_baseline(path)


def refuse_fewer_metrics(baseline: Baseline, metrics: tuple[str, ...], path: Path) -> None:
    """Raise ConfigError where the baseline at `path` has metrics that a new one over `metrics` would lose."""
    if lost := [metric for metric in baseline.metrics if metric not in metrics]:
        raise ConfigError(
            f"{path}: the baseline also has {', '.join(lost)}, which this run did not score and the gate would "
            "no longer watch; score all its metrics, or replace it all the same with --force"
        )


def keep_baseline(run: Run, path: Path, *, force: bool = False) -> Baseline:
    """Make `run` the baseline at `path`.

    Raises BaselineError for a partial run, ConfigError where metrics would be lost and there is no `force`.
    """
    baseline = make_baseline(run)
    if not force and path.exists():
        with suppress(BaselineError):  # a broken one is there to be replaced
            refuse_fewer_metrics(load_baseline(path), run.metrics, path)
    save_baseline(baseline, path)
    return baseline
