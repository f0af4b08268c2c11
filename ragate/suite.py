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
from ragate.errors import BaselineError, ConfigError, RunError
from ragate.files import write_whole
from ragate.gate.baseline import (
    Baseline,
    baseline_of,
    baseline_path,
    file_name,
    git_commit,
    load_baseline,
    save_baseline,
)
from ragate.gate.verdict import EVALUATE_RESERVE, MAX_UNSCORED, GateResult, decide
from ragate.run import Run, joined, load_run, run_digest, save_run
from ragate.soft import FIELD

if TYPE_CHECKING:
    from ragate.config import Settings
    from ragate.evaluate import Event, Timings
    from ragate.journal import Journal
    from ragate.judge import Judge, UrlJudge
    from ragate.judging.mapping import Calibration
    from ragate.soft import SoftScores
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


def baseline_run(settings: Settings, suite: str, path: Path) -> Path:
    """Where the run that the baseline at `path` was made of is kept, with its answers: they can be judged again."""
    return out_folder(settings, suite) / "baselines" / path.stem / "run.json"


def out_folder(settings: Settings, suite: str) -> Path:
    """Where a suite's run is kept: `--out`, else `.ragate/<suite>`."""
    return Path(settings.out) if settings.out else Path(settings.root) / ".ragate" / file_name(suite)


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
    settings: Settings,
    say: Say,
    on_event: Callable[[Event], None],
    *,
    update: bool = False,
    force: bool = False,
) -> Outcome:
    """Evaluate as `settings` say; writes run.json, timings.json, report.html and comment.md into the run folder.

    The reserve is judged once where the verdict is INCONCLUSIVE without it and the baseline holds it, and from the
    start where the run is to `update` the baseline. Such a run is refused before the judging where the baseline has
    more metrics, unless there is `force`.

    Raises RagateError or EngineError with one sentence; KeyboardInterrupt after the journal is safe.
    """
    from ragate.journal import DoneEntry, Journal

    testset = load_suite(settings)
    folder = out_folder(settings, testset.name)
    path = baseline_of_suite(settings, testset.name)
    # before the judging: a broken baseline is not to be found out minutes later
    baseline = load_baseline(path) if path.exists() else None

    if update and not force and baseline is not None:
        refuse_fewer_metrics(baseline, settings.metrics, path)
    release = load_release(settings)
    load_known(settings)  # a broken map, too, is to be found out before the judging
    if testset.reserve and (settings.reserve == "always" or (update and settings.reserve == "auto")):
        testset = testset.with_reserve()
    # before the run folder: a mistyped judge leaves nothing behind
    judge = named_judge(settings, say)

    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(folder / "journal.jsonl"))
        judged = _judging(settings, settings.metrics, settings.target, judge, journal, say, on_event, stack)
        run, timings, gate = _judged_until_decided(settings, testset, baseline, release, judged, on_event)
        journal.append(DoneEntry())
        save_run(run, folder / "run.json")
        write_whole(folder / "timings.json", timings.model_dump_json(indent=1) + "\n")
        costs: dict[str, object] = timings.model_dump()
        before = run_behind(settings, baseline, path)
        written = (folder / "run.json", *write_reports(folder, run, gate, baseline, costs, before))
    return Outcome(run, gate, baseline, path, costs, written)


def named_judge(settings: Settings, say: Say) -> UrlJudge | catalog.JudgeChoice:
    """The judge that the settings name: an endpoint that is there, or a model, fetched but not yet loaded."""
    if is_url(settings.judge):
        from ragate.judge import UrlJudge

        if settings.adapter is not None:
            raise ConfigError(
                f"adapter {settings.adapter}: a judge behind a URL wears its own; leave one of the two out"
            )
        return UrlJudge(settings.judge, api_key=os.environ.get(KEY_VARIABLE))
    return local_judge(settings, progress=lambda done, total: say("fetching the judge", done, total))


def local_judge(
    settings: Settings, *, pull: bool = True, progress: catalog.Progress | None = None
) -> catalog.JudgeChoice:
    """The judge that the settings name and what it wears, where it is no endpoint. Raises CatalogError."""
    choice = catalog.resolve_judge(settings.judge, pull=pull, progress=progress)
    return choice if settings.adapter is None else choice.wearing(Path(settings.adapter))


def _judged_until_decided(
    settings: Settings,
    testset: TestSet,
    baseline: Baseline | None,
    release: Baseline | None,
    judged: Callable[[TestSet], tuple[Run, Timings]],
    on_event: Callable[[Event], None],
) -> tuple[Run, Timings, GateResult | None]:
    """The run, with the reserve where it takes that to decide, and its verdict where there is a baseline."""
    from ragate.evaluate import Event, both_timings

    run, timings = judged(testset)
    gate = None if baseline is None else verdict_of(settings, baseline, run, release)
    if baseline is None or gate is None or gate.verdict != "INCONCLUSIVE" or not testset.reserve:
        return run, timings, gate
    if settings.reserve == "never":
        return run, timings, gate
    count = len(testset.reserve)
    if baseline.reserve_hash != testset.reserve_hash:
        held = "another one" if baseline.reserve else "none"
        unused = f"the reserve of {count} items was not judged: the baseline holds {held}; {EVALUATE_RESERVE}"
        return run, timings, gate.model_copy(update={"warnings": (*gate.warnings, unused)})
    on_event(Event("warning", count, message=f"INCONCLUSIVE so far: judging the reserve of {count} items"))
    more, cost = judged(testset.reserve_alone())
    run, timings = joined(run, more), both_timings(timings, cost)
    return run, timings, verdict_of(settings, baseline, run, release)


def start_judge(
    settings: Settings, named: UrlJudge | catalog.JudgeChoice, say: Say, stack: ExitStack
) -> Callable[[], Judge]:
    """Begin to load the judge, closed again by `stack`; what comes back waits for it. Heavy imports happen here."""
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
    if not isinstance(named, catalog.JudgeChoice):
        endpoint = named
        return lambda: endpoint
    # the model loads while ragas and the embeddings are imported: each takes seconds
    loader = stack.enter_context(ThreadPoolExecutor(1, "ragate-load"))
    loading = loader.submit(
        session.open_engine,
        named.path,
        lambda done, total: say("loading the judge", done, total),
        named.adapter,
    )

    def opened() -> Judge:
        from ragate.judge import EngineJudge

        return EngineJudge(loading.result(), named.title)

    return opened


def _judging(
    settings: Settings,
    names: tuple[str, ...],
    spec: str,
    named: UrlJudge | catalog.JudgeChoice,
    journal: Journal,
    say: Say,
    on_event: Callable[[Event], None],
    stack: ExitStack,
) -> Callable[[TestSet], tuple[Run, Timings]]:
    """Open judge, target and embeddings for these metrics; what comes back judges a test set with them.

    Heavy imports happen here. Whoever has judged all appends a `DoneEntry` to the journal.
    """
    soft = load_soft(settings)
    opened = start_judge(settings, named, say, stack)

    from ragate.evaluate import evaluate
    from ragate.metrics import metrics_named
    from ragate.target import open_target

    metrics = metrics_named(names)
    target = None
    if spec != "stored":
        target = open_target(spec, timeout=settings.target_timeout, options=settings.target_options)
        stack.callback(target.close)
    embeddings = None
    if any(metric.embeds for metric in metrics):
        from ragate.embeddings import MiniLM

        catalog.model_path(
            settings.embeddings, progress=lambda done, total: say("fetching embeddings", done, total)
        )
        embeddings = MiniLM()
        stack.callback(embeddings.close)
    judge = opened()
    note = named.note if isinstance(named, catalog.JudgeChoice) else None
    return lambda testset: evaluate(
        testset,
        names,
        judge,
        journal,
        embeddings=embeddings,
        target=target,
        judge_note=note,
        on_event=on_event,
        call_timeout=settings.call_timeout,
        ends=False,
        soft=soft,
        statements=settings.statements,
    )


def rescore(
    settings: Settings,
    stored: Run,
    metrics: tuple[str, ...],
    folder: Path,
    say: Say,
    on_event: Callable[[Event], None],
) -> Run:
    """`stored` judged anew as `settings` say, with the answers and contexts that it has; its system is not asked.

    The journal is in `folder`: a rescoring that was stopped goes on. Raises as `run_suite` does.
    """
    from ragate.journal import DoneEntry, Journal
    from ragate.testset import Item, TestSet

    kept = dict.fromkeys(Item.model_fields, True)
    items = tuple(Item.model_validate(record.model_dump(include=kept)) for record in stored.items)
    testset = TestSet(
        name=stored.suite,
        source=stored.testset,
        items=items,
        hash=stored.testset_hash,
        reserve_hash=stored.reserve_hash,
    )
    judge = named_judge(settings, say)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal.open(folder / "journal.jsonl"))
        judged = _judging(settings, metrics, "stored", judge, journal, say, on_event, stack)
        run, _ = judged(testset)
        journal.append(DoneEntry())
    return run.model_copy(update={"target": stored.target})


SHIPPED_MAPS = ("faithfulness-judge-map.json", "faithfulness-map.json")
"""Beside the adapter of a judge: what `ragate judge calibrate` wrote of it, by either way of making statements."""


def load_soft(settings: Settings) -> SoftScores | None:
    """How probabilities become scores, or `None` where verdicts do. Raises ConfigError for a broken calibration."""
    if settings.scores == "hard":
        return None
    from ragate.soft import SoftScores

    return SoftScores(load_known(settings))


def load_known(settings: Settings) -> Calibration | None:
    """What is known of the judge, where the settings name it. Raises ConfigError."""
    if settings.calibration is None:
        return None
    from ragate.judging.mapping import load_calibration

    return load_calibration(Path(settings.calibration))


def known_accuracy(settings: Settings, run: Run) -> dict[str, float]:
    """Metric -> balanced accuracy of the judge on labels, where it is known.

    `judge_accuracy` holds for all metrics; a calibration of this judge for its own, from the settings or else the one
    that ships with it: scores that show the share s of a true drop are those of a judge with the balanced accuracy
    (1 + s) / 2.
    """
    hard = FIELD not in run.fingerprint
    known = {} if settings.judge_accuracy is None else dict.fromkeys(run.metrics, settings.judge_accuracy)
    # what ships tells nothing of soft scores, which went through no map or another
    for calibration in (*(shipped_calibrations(run.judge) if hard else ()), load_known(settings)):
        if calibration is None or calibration.differences(run.fingerprint):
            continue
        known.pop(calibration.metric, None)  # the later one knows better
        accuracy = (1 + (calibration.shown_hard if hard else calibration.shown_soft)) / 2
        if accuracy > 0.5:  # which guesses, and shows no drop
            known[calibration.metric] = accuracy
    return known


def shipped_calibrations(judge: str) -> tuple[Calibration, ...]:
    """What ships with a judge of the catalogue about its faithfulness, by either way of making statements."""
    from ragate.judging.mapping import load_calibration

    if not any(model.base and model.name == judge for model in catalog.models()):
        return ()
    paths = [catalog.ADAPTERS / judge / name for name in SHIPPED_MAPS]
    return tuple(load_calibration(path) for path in paths if path.is_file())


def load_release(settings: Settings) -> Baseline | None:
    """The pinned baseline of the last release, where the settings name one."""
    return load_base(Path(settings.release)) if settings.release else None


def verdict_of(
    settings: Settings,
    baseline: Baseline,
    run: Run,
    release: Baseline | None = None,
    metrics: tuple[str, ...] | None = None,
) -> GateResult:
    """The verdict that the settings give on a run, over `metrics`, or else over all of both sides.

    A metric that the baseline has and the run has not makes it INVALID: a change to `metrics` in the settings must
    not narrow the gate unseen.
    """
    gate = decide(
        baseline,
        run,
        threshold=settings.threshold,
        mode=settings.threshold_mode,
        strategy=settings.strategy,
        on_inconclusive=settings.on_inconclusive,
        metrics=metrics,
        rules=settings.gate,
        release=release,
        release_path=_shown(settings.release),
        judge_accuracy=known_accuracy(settings, run),
    )
    warnings = (*gate.warnings, *strange_calibration(settings, run))
    return gate.model_copy(update={"run_digest": run_digest(run), "warnings": warnings})


def strange_calibration(settings: Settings, run: Run) -> tuple[str, ...]:
    """What to say of a calibration that is of another judge or prompt than the run's, and so tells nothing of it."""
    calibration = load_known(settings)
    if calibration is None or f"prompt_{calibration.metric}" not in run.fingerprint:
        return ()
    other = calibration.differences(run.fingerprint)
    if not other:
        return ()
    return (
        f"the calibration {_shown(settings.calibration)} is of another judge or prompt ({', '.join(other)}) and tells "
        f"nothing of this one: {calibration.command(run.fingerprint)} makes its own",
    )


def _shown(path: str | None) -> str:
    """A path as a person in the current folder would write it."""
    return "RELEASE" if path is None else os.path.relpath(path)


def verdict_by(settings: Settings) -> Callable[[Baseline, Run], GateResult]:
    """`verdict_of` with the settings' release: a verdict from baseline and run alone."""
    release = load_release(settings)
    return lambda baseline, run: verdict_of(settings, baseline, run, release)


def trusted_baseline(settings: Settings) -> Callable[[Run], Baseline | None]:
    """The baseline of this checkout for a run's suite, or `None` where there is none."""

    def find(run: Run) -> Baseline | None:
        path = baseline_of_suite(settings, run.suite)
        return load_baseline(path) if path.is_file() else None

    return find


def write_reports(
    folder: Path,
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    timings: dict[str, object] | None,
    before: Run | None = None,
) -> tuple[Path, ...]:
    """Write report.html, comment.md, junit.xml and badge.svg, all made from stored data alone.

    `before` is the run that the baseline was made of, where it is at hand: its answers are compared with these.
    verdict.json and baseline.json are left beside them, so that `ragate comment` and whoever has the artefact need
    nothing else; where there is no baseline there is neither.
    """
    from ragate.report.annotations import file_of
    from ragate.report.badge import render_badge
    from ragate.report.html import render_html
    from ragate.report.junit import render_junit
    from ragate.report.markdown import render_comment

    texts = {
        "report.html": render_html(run, gate, baseline, timings, before),
        "comment.md": render_comment(run, gate, baseline, timings),
        "junit.xml": render_junit(run, gate, baseline, file_of(run)),
        "badge.svg": render_badge(gate),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    if gate is None or baseline is None:
        for name in ("verdict.json", "baseline.json"):
            (folder / name).unlink(missing_ok=True)
    else:
        write_whole(folder / "verdict.json", gate.model_dump_json(indent=1) + "\n")
        save_baseline(baseline, folder / "baseline.json")
    return tuple(folder / name for name in texts)


def run_behind(settings: Settings, baseline: Baseline | None, path: Path) -> Run | None:
    """The run that the baseline at `path` was made of, or `None` where it is not kept here or is another one by now."""
    if baseline is None:
        return None
    is_run = path.is_dir() or path.name == "run.json"
    try:
        run = load_stored(path if is_run else baseline_run(settings, baseline.suite, path))
        made = baseline_of(run, commit=None, date=baseline.date)
    except (RunError, BaselineError):
        return None
    return run if made.items == baseline.items else None


def load_timings(folder: Path) -> dict[str, object] | None:
    """The timings beside a stored run, or `None` where there are none."""
    try:
        data = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def make_baseline(run: Run, reason: str | None = None) -> Baseline:
    """The baseline that `run` makes now, at this commit."""
    return baseline_of(run, commit=git_commit(Path.cwd()), date=datetime.now(UTC), reason=reason)


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


def keep_baseline(
    settings: Settings, run: Run, path: Path, *, force: bool = False, reason: str | None = None
) -> Baseline:
    """Make `run` the baseline at `path`, and keep the run with its answers in the run folder.

    Raises BaselineError for a partial run, ConfigError where metrics or the reserve would be lost, or too many items
    have no score, and there is no `force`.
    """
    baseline = make_baseline(run, reason)
    if not force:
        _refuse_unscored(run)
        if path.exists():
            with suppress(BaselineError):  # a broken one is there to be replaced
                old = load_baseline(path)
                refuse_fewer_metrics(old, run.metrics, path)
                if old.reserve_hash is not None and run.reserve_hash is None:
                    raise ConfigError(
                        f"{path}: the baseline also holds the reserve, which this run did not judge, and its critical "
                        "items would no longer be watched; judge it with `ragate eval --reserve always`, or replace "
                        "the baseline all the same with --force"
                    )
    save_baseline(baseline, path)
    save_run(run, baseline_run(settings, run.suite, path))
    return baseline


def _refuse_unscored(run: Run) -> None:
    """Raise ConfigError where a gate would call every run INVALID beside a baseline of `run`."""
    for metric in run.metrics:
        bad = {state: count for state, count in run.states(metric).items() if state != "ok"}
        if sum(bad.values()) > MAX_UNSCORED * len(run.items):
            counts = ", ".join(f"{count} {state}" for state, count in sorted(bad.items()))
            raise ConfigError(
                f"{metric} has no score for {sum(bad.values())} of {len(run.items)} items ({counts}), too many for a "
                "baseline: see the errors in the report and run `ragate eval` again, or keep it with --force"
            )


def keep_rescored(settings: Settings, run: Run, old: Baseline, path: Path) -> Baseline:
    """Make `run`, the answers of `old` judged anew, the baseline at `path`: of the same commit, dated today."""
    reason = f"rescored by {run.judge}"
    baseline = baseline_of(run, commit=old.commit, date=datetime.now(UTC), reason=reason)
    save_baseline(baseline, path)
    save_run(run, baseline_run(settings, run.suite, path))
    return baseline


def refuse_other_answers(baseline: Baseline, run: Run, place: Path) -> None:
    """Raise ConfigError where `run` at `place` is not the one that `baseline` was made of."""
    made = baseline_of(run, commit=None, date=baseline.date)
    if (made.items, made.fingerprint, made.testset_hash) != (
        baseline.items,
        baseline.fingerprint,
        baseline.testset_hash,
    ):
        raise ConfigError(
            f"{place}: not the run that the baseline was made of, so its answers are another system's; name that run "
            "(CI keeps run.json as an artifact), or make a new baseline with `ragate baseline set`"
        )
