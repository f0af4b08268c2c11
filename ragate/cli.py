"""The command line: each command parses, calls one function, prints, exits. Nothing heavy is imported up here."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ragate import __version__
from ragate.cli_judge import judge
from ragate.errors import EXIT_INTERRUPTED, EXIT_INVALID, EXIT_USAGE, CatalogError, RagateError
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from rich.console import Console

    from ragate.config import Settings
    from ragate.gate.baseline import Baseline
    from ragate.gate.verdict import GateResult
    from ragate.run import Run

EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended."""
FORMATS = click.Choice(["text", "json", "markdown", "junit", "github"])
METRICS = "context_precision,context_recall,faithfulness,answer_relevance"


def console(*, stderr: bool = False) -> Console:
    """A rich console: colours only where there is a terminal, `NO_COLOR` honoured."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ragate")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Evaluate a RAG system and gate its changes, judged by a model that runs on your own machine."""


def gate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `eval`, `doctor` and `check` share: how a verdict is found."""
    options = [
        click.option("--threshold", type=float, help="The drop that fails [0.05]."),
        click.option(
            "--threshold-mode", type=click.Choice(["relative", "absolute"]), help="Of what [relative]."
        ),
        click.option(
            "--strategy",
            type=click.Choice(["significant", "point"]),
            help="Whether chance is allowed for, or the mean alone decides [significant].",
        ),
        click.option(
            "--on-inconclusive",
            type=click.Choice(["auto", "fail", "warn"]),
            help="What INCONCLUSIVE does; auto fails where a mean fell by its limit [auto].",
        ),
        click.option("--release", help="Baseline of the last release, to be held against too."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `eval` and `doctor` share; everything is also a key of ragate.toml."""
    options = [
        click.option("--testset", help="File, folder or datasets:NAME with the test cases."),
        click.option("--metrics", help=f"Comma-separated, out of {METRICS}."),
        click.option(
            "--judge", help="auto, a catalogue name (`ragate models list`), a .gguf path or an http URL."
        ),
        click.option("--adapter", help="Folder of a LoRA adapter that the judge wears."),
        click.option("--target", help="What answers: stored, module:callable, http://… or cmd:…"),
        click.option("--baseline", help="Baseline file [baselines/SUITE.json]."),
        click.option(
            "--scores",
            type=click.Choice(["hard", "soft"]),
            help="Of verdicts or of their probabilities [hard].",
        ),
        click.option(
            "--statements",
            type=click.Choice(["judge", "sentences"]),
            help="What cuts answers up for faithfulness [judge].",
        ),
        click.option(
            "--reserve",
            type=click.Choice(["auto", "always", "never"]),
            help="When the reserve is judged; auto: once if INCONCLUSIVE, and for a baseline [auto].",
        ),
        click.option(
            "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the judge runs [auto]."
        ),
        click.option("--limit", type=int, help="Only the first so many items."),
        click.option("--out", help="Run folder [.ragate/SUITE]."),
        click.option(
            "--max-batch", type=int, help="Requests that the engine runs at once [64; 1024 on a card]."
        ),
        click.option("--kv-gib", type=float, help="GiB for the KV cache."),
        click.option("--threads", type=int, help="CPU threads of the engine."),
    ]
    for option in reversed(options):
        command = option(command)
    return gate_options(command)


def settings_of(flags: dict[str, Any]) -> Settings:
    """Settings by precedence: flag, environment, file, default."""
    from ragate.config import load_settings

    return load_settings({k: v for k, v in flags.items() if v is not None}, Path.cwd())


@cli.command("eval")
@settings_options
@click.option("--update-baseline", is_flag=True, help="Make this run the baseline, whatever the verdict.")
@click.option("--force", is_flag=True, help="With --update-baseline: even if it loses metrics.")
@click.option("--format", "format_", type=FORMATS, default="text", help="What goes to stdout.")
@click.option("--dry-run", is_flag=True, help="Only say how many calls, tokens and seconds it would take.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def eval_(update_baseline: bool, force: bool, format_: str, dry_run: bool, quiet: bool, **flags: Any) -> int:
    """Score a test set, compare with the baseline, write the reports. Resumes by itself.

    Exit code: 0 PASS, 1 FAIL, 2 INCONCLUSIVE (0 where it only warns), 3 INVALID (or no baseline), 4 bad input,
    130 interrupted.
    """
    from ragate.progress import Progress
    from ragate.suite import (
        keep_baseline,
        load_release,
        out_folder,
        run_suite,
        suite_of,
        verdict_of,
        write_reports,
    )

    settings = settings_of(flags)
    if dry_run:
        return show_forecast(settings, update_baseline, format_)
    progress = Progress(console(stderr=True), quiet=quiet)
    try:
        with prints_to_stderr(), progress:
            outcome = run_suite(
                settings, progress.say, progress.on_event, update=update_baseline, force=force
            )
    except KeyboardInterrupt:
        folder = out_folder(settings, suite_of(settings))
        again = shlex.join(["ragate", *click.get_current_context().obj])
        click.echo(
            f"interrupted: what was judged is safe in {folder}; run `{again}` again to go on", err=True
        )
        return EXIT_INTERRUPTED
    gate, baseline = outcome.gate, outcome.baseline
    if update_baseline:
        baseline = keep_baseline(settings, outcome.run, outcome.baseline_path, force=force)
        gate = verdict_of(settings, baseline, outcome.run, load_release(settings))
        write_reports(outcome.written[0].parent, outcome.run, gate, baseline, outcome.timings, outcome.run)
    if format_ == "text":
        show_run(outcome.run, gate, baseline)
        out = console()
        out.print(progress.summary(outcome.timings), style="dim", markup=False)
        for path in outcome.written:
            out.print(f"wrote {path}", style="dim", markup=False)
        if update_baseline:
            out.print(f"wrote {outcome.baseline_path}: this run is the baseline now", markup=False)
    else:
        show_machine(outcome.run, gate, baseline, format_, outcome.written[0].parent, outcome.timings)
    if gate is None:
        click.echo(
            f"INVALID: no baseline at {outcome.baseline_path} to compare with; "
            "make this run the baseline with `ragate baseline set`",
            err=True,
        )
        return EXIT_INVALID
    return gate.exit_code


@contextmanager
def prints_to_stderr() -> Iterator[None]:
    """What the judged system and its children print goes to stderr: stdout holds the asked-for format and no more."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def show_forecast(settings: Settings, update: bool, format_: str) -> int:
    """What an evaluation would take; exit code 0, since nothing was gated."""
    from dataclasses import asdict

    from ragate.forecast import forecast, lines_of

    found = forecast(settings, update=update)
    if format_ == "json":
        click.echo(json.dumps(asdict(found), indent=1))
        return 0
    for name, text in lines_of(found):
        click.echo(f"{name:11} {plain(text)}")
    for note in found.notes:
        click.echo(f"            {plain(note)}")
    click.echo("nothing was judged; what the journal holds already would cost nothing")
    return 0


def show_run(run: Run, gate: GateResult | None, baseline: Baseline | None) -> None:
    """The result table, and where there is one the verdict and how old its baseline is."""
    from datetime import UTC, datetime

    from ragate.gate.baseline import age_of
    from ragate.report.terminal import print_gate, print_run

    if gate is None:
        print_run(console(), run)
    else:
        print_gate(console(), run, gate)
    if baseline is not None:
        age = age_of(baseline, datetime.now(UTC), Path.cwd())
        console().print(f"baseline {plain(age)}", style="dim", markup=False)


def show_machine(
    run: Run,
    gate: GateResult | None,
    baseline: Baseline | None,
    format_: str,
    folder: Path,
    timings: dict[str, object] | None,
) -> None:
    """The verdict for a program: JSON, JUnit, the Markdown of the PR comment, or what a step of GitHub Actions gives:
    annotations on stdout, its summary and its outputs."""
    if format_ == "markdown":
        from ragate.report.markdown import render_comment

        click.echo(render_comment(run, gate, baseline, timings))
        return
    if format_ == "junit":
        from ragate.report.annotations import file_of
        from ragate.report.junit import render_junit

        click.echo(render_junit(run, gate, baseline, file_of(run)), nl=False)
        return
    if format_ == "github":
        from ragate.github import write_step_files
        from ragate.report.annotations import render_annotations

        write_step_files(os.environ, run, gate, baseline, timings, folder)
        workspace = os.environ.get("GITHUB_WORKSPACE")
        click.echo(render_annotations(run, gate, baseline, Path(workspace) if workspace else None), nl=False)
        return
    means = {metric: run.mean(metric) for metric in run.metrics}
    result: dict[str, Any] = {
        "suite": run.suite,
        "judge": run.judge,
        "judge_note": run.judge_note,
        "means": means,
    }
    result["gate"] = json.loads(gate.model_dump_json()) if gate else None
    click.echo(json.dumps(result, indent=1))


@cli.command()
@click.argument("paths", metavar="BASELINE RUN", nargs=-1, type=click.Path(path_type=Path))
@click.option("--baseline", "base", type=click.Path(path_type=Path), help="BASELINE: its file, or a run.")
@click.option("--current", type=click.Path(path_type=Path), help="RUN: its folder or run.json.")
@click.option("--metrics", help="Compare only these [all of both; one that a side lacks is INVALID].")
@gate_options
@click.option("--format", "format_", type=FORMATS, default="text", help="What goes to stdout.")
def check(
    paths: tuple[Path, ...],
    base: Path | None,
    current: Path | None,
    metrics: str | None,
    format_: str,
    **flags: Any,
) -> int:
    """Gate a stored run; needs no model. How it is gated may stand in ragate.toml.

    Exit code: 0 PASS, 1 FAIL, 2 INCONCLUSIVE (0 where it only warns), 3 INVALID.
    """
    from ragate.suite import load_base, load_release, load_stored, load_timings, verdict_of

    named = [path for path in (base, current) if path is not None]
    if len(named) + len(paths) != 2 or (named and paths):
        raise click.UsageError("give a baseline and a run: `ragate check BASELINE RUN`")
    first, second = named or paths
    settings = settings_of(flags | {"metrics": metrics})
    baseline, run = load_base(first), load_stored(second)
    gate = verdict_of(
        settings, baseline, run, load_release(settings), None if metrics is None else settings.metrics
    )
    if format_ == "text":
        show_run(run, gate, baseline)
    else:
        folder = second if second.is_dir() else second.parent
        show_machine(run, gate, baseline, format_, folder, load_timings(folder))
    return gate.exit_code


@cli.group()
def baseline() -> None:
    """The scores that later runs are compared with: a JSON file in git."""


RUN_ARGUMENT = click.argument("run", required=False, type=click.Path(path_type=Path))


def stored_run(run: Path | None) -> tuple[Run, Path, Settings]:
    """The run named, or the one in the suite's own folder; its folder; the settings."""
    from ragate.suite import load_stored, out_folder, suite_of

    settings = settings_of({})
    folder = run if run is not None else out_folder(settings, suite_of(settings))
    return load_stored(folder), folder if folder.is_dir() else folder.parent, settings


@baseline.command("set")
@RUN_ARGUMENT
@click.option("--baseline", "path", type=click.Path(path_type=Path), help="Where to [baselines/SUITE.json].")
@click.option("--force", is_flag=True, help="Even if the baseline loses metrics.")
def baseline_set(run: Path | None, path: Path | None, force: bool) -> int:
    """Make a stored run (default: the suite's last) the baseline."""
    from ragate.suite import baseline_of_suite, keep_baseline

    found, _, settings = stored_run(run)
    path = path or baseline_of_suite(settings, found.suite)
    kept = keep_baseline(settings, found, path, force=force)
    say_kept(found, kept, path)
    return 0


def say_kept(run: Run, kept: Baseline, path: Path) -> None:
    """What has become the baseline."""
    means = ", ".join(f"{m} {run.mean(m) or 0:.3f}" for m in run.metrics)
    reserve = f", {len(kept.reserve)} of them in reserve" if kept.reserve else ""
    click.echo(f"wrote {path}: {len(kept.items)} items{reserve}, {means}")
    click.echo("commit it, so that pull requests are compared with it")


@baseline.command("bless")
@RUN_ARGUMENT
@click.option(
    "--baseline", "path", type=click.Path(path_type=Path), help="Baseline file [baselines/SUITE.json]."
)
@click.option("--reason", help="Why it is accepted: kept in the file, for whoever reviews it.")
@click.option("--force", is_flag=True, help="Even if the baseline loses metrics.")
def baseline_bless(run: Path | None, path: Path | None, reason: str | None, force: bool) -> int:
    """Accept a stored run in place of the baseline there is, and show what that changes."""
    from ragate.gate.baseline import diff_baselines, load_baseline
    from ragate.report.terminal import print_baseline_diff
    from ragate.suite import baseline_of_suite, keep_baseline

    found, _, settings = stored_run(run)
    path = path or baseline_of_suite(settings, found.suite)
    old = load_baseline(path)
    kept = keep_baseline(settings, found, path, force=force, reason=reason)
    print_baseline_diff(console(), diff_baselines(old, kept))
    say_kept(found, kept, path)
    return 0


@baseline.command("rescore")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--judge", help="Who judges [as `eval`].")
@click.option("--adapter", help="Folder of a LoRA adapter that the judge wears [as `eval`].")
@click.option("--scores", type=click.Choice(["hard", "soft"]), help="As `eval` [hard].")
@click.option("--statements", type=click.Choice(["judge", "sentences"]), help="As `eval` [judge].")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the judge runs [auto].")
@click.option("--testset", help="The suite's test set [that of ragate.toml].")
@click.option("--baseline", help="Baseline file [baselines/SUITE.json].")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def baseline_rescore(run: Path | None, quiet: bool, **flags: Any) -> int:
    """Judge the baseline's stored answers anew: after a change of judge, prompts or versions, not of the system.

    RUN is the run that the baseline was made of; by default the copy that `baseline set` left in .ragate.
    """
    from ragate.gate.baseline import diff_baselines, load_baseline
    from ragate.progress import Progress
    from ragate.report.terminal import print_baseline_diff
    from ragate.suite import (
        baseline_of_suite,
        baseline_run,
        keep_rescored,
        load_stored,
        refuse_other_answers,
        rescore,
        suite_of,
    )

    settings = settings_of(flags)
    if run is None:
        suite = suite_of(settings)
        place = baseline_run(settings, suite, baseline_of_suite(settings, suite))
    else:
        place = run
    stored = load_stored(place)
    path = baseline_of_suite(settings, stored.suite)
    old = load_baseline(path)
    refuse_other_answers(old, stored, place)
    with Progress(console(stderr=True), quiet=quiet) as progress:
        folder = baseline_run(settings, stored.suite, path).parent
        judged = rescore(settings, stored, old.metrics, folder, progress.say, progress.on_event)
    new = keep_rescored(settings, judged, old, path)
    print_baseline_diff(console(), diff_baselines(old, new))
    say_kept(judged, new, path)
    return 0


@baseline.command("show")
@click.argument("path", required=False, type=click.Path(path_type=Path))
def baseline_show(path: Path | None) -> int:
    """Print what a baseline holds, and how old it is."""
    from datetime import UTC, datetime

    from ragate.gate.baseline import age_of, load_baseline, mean
    from ragate.suite import baseline_of_suite, suite_of

    if path is None:
        settings = settings_of({})
        path = baseline_of_suite(settings, suite_of(settings))
    found = load_baseline(path)
    reserve = f" ({len(found.reserve)} in reserve)" if found.reserve else ""
    click.echo(f"{path}: suite {found.suite}, {len(found.items)} items{reserve}, judge {found.judge}")
    click.echo(f"made {found.date.isoformat()} at commit {(found.commit or 'unknown')[:12]}")
    click.echo(plain(age_of(found, datetime.now(UTC), Path.cwd())))
    if found.reason:
        click.echo(f"accepted because: {plain(found.reason)}")
    for metric in found.metrics:
        values = [row[metric] for row in found.items.values() if isinstance(row.get(metric), float | int)]
        average = mean(float(v) for v in values)
        click.echo(f"  {metric:20} {'—' if average is None else f'{average:.4f}'}  ({len(values)} scored)")
    return 0


@baseline.command("diff")
@RUN_ARGUMENT
@click.option(
    "--baseline", "path", type=click.Path(path_type=Path), help="Baseline file [baselines/SUITE.json]."
)
def baseline_diff(run: Path | None, path: Path | None) -> int:
    """What `baseline set` would change."""
    from ragate.gate.baseline import diff_baselines, load_baseline
    from ragate.report.terminal import print_baseline_diff
    from ragate.suite import baseline_of_suite, make_baseline

    found, _, settings = stored_run(run)
    old = load_baseline(path or baseline_of_suite(settings, found.suite))
    print_baseline_diff(console(), diff_baselines(old, make_baseline(found)))
    return 0


@cli.command()
@RUN_ARGUMENT
@click.option(
    "--baseline", "path", type=click.Path(path_type=Path), help="Baseline file [baselines/SUITE.json]."
)
def report(run: Path | None, path: Path | None) -> int:
    """Make report.html, comment.md, junit.xml and badge.svg again from a stored run; needs no model."""
    from ragate.suite import (
        baseline_of_suite,
        load_base,
        load_release,
        load_timings,
        run_behind,
        verdict_of,
        write_reports,
    )

    found, folder, settings = stored_run(run)
    usual = baseline_of_suite(settings, found.suite)
    base = load_base(path or usual) if path or usual.exists() else None
    gate = verdict_of(settings, base, found, load_release(settings)) if base else None
    before = run_behind(settings, base, path or usual)
    for written in write_reports(folder, found, gate, base, load_timings(folder), before):
        click.echo(f"wrote {written}")
    return 0


@cli.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option("--items", "listed", type=int, default=20, help="Changed items that are listed; 0 is all [20].")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", help="[text].")
def compare(first: Path, second: Path, listed: int, format_: str) -> int:
    """Two stored runs side by side: means, and the items that changed. No verdict: that is `ragate check`."""
    from ragate.report.compare import as_data, print_compare
    from ragate.report.compare import compare as compared
    from ragate.suite import load_stored

    found = compared(load_stored(first), load_stored(second))
    if format_ == "json":
        click.echo(json.dumps(as_data(found), indent=1))
    else:
        print_compare(console(), found, (str(first), str(second)), max(listed, 0))
    return 0


@cli.command()
@click.argument("item")
@RUN_ARGUMENT
@click.option(
    "--baseline", "path", type=click.Path(path_type=Path), help="Baseline file [baselines/SUITE.json]."
)
@click.option("--calls", is_flag=True, help="Also each call of the judge: input, output, tokens.")
@click.option("--full", is_flag=True, help="Long texts to their end.")
def show(item: str, run: Path | None, path: Path | None, calls: bool, full: bool) -> int:
    """One ITEM of a stored run: contexts, claims, verdicts, reasons, beside the baseline where there is one."""
    from ragate.report.item import item_named, print_item
    from ragate.suite import baseline_of_suite, load_base, run_behind

    found, _, settings = stored_run(run)
    usual = baseline_of_suite(settings, found.suite)
    base = load_base(path or usual) if path or usual.exists() else None
    before = run_behind(settings, base, path or usual)
    print_item(console(), found, item_named(found, item), base, before, calls=calls, full=full)
    return 0


@cli.command()
@RUN_ARGUMENT
@click.option("--report-url", help="Address of the full report [the page of the workflow run].")
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    help="Comment for a fork, from what its run left in this folder.",
)
def comment(run: Path | None, report_url: str | None, artifact: Path | None) -> int:
    """Write a run's verdict as the one comment on its pull request (GitHub Actions; token in GITHUB_TOKEN).

    A token that may not comment, as in a fork's run, is no error: it says so and exits 0. With --artifact, in a
    job of `workflow_run`, nothing of the artefact is trusted: verdict and comment are made anew from its scores.
    """
    from ragate.github import load_verdict, post_artifact, post_run
    from ragate.suite import load_timings, trusted_baseline, verdict_by

    if artifact is not None:
        if run is not None or report_url is not None:
            raise click.UsageError("--artifact stands alone: the run is in it")
        settings = settings_of({})
        done = post_artifact(os.environ, artifact, verdict_by(settings), trusted_baseline(settings))
    else:
        found, folder, _ = stored_run(run)
        gate, base = load_verdict(folder, found)
        done = post_run(os.environ, found, gate, base, load_timings(folder), report_url)
    click.echo(plain(done))
    return 0


@cli.group()
def models() -> None:
    """The judges and embedding models that ragate knows."""


@models.command("list")
def models_list() -> int:
    """Every model: size, licence, whether it is here, what is known of its accuracy."""
    from rich.padding import Padding
    from rich.text import Text

    from ragate import catalog

    screen = console()
    for model in catalog.models():
        here = "here" if catalog.is_cached(model.name) else "not here"
        facts = f"  {model.kind}, {model.size / 1e6:.0f} MB, {model.licence}, {here}"
        screen.print(Text(model.name, "bold").append(facts, "not bold"))
        screen.print(Padding(Text(model.known, "dim"), (0, 0, 0, 4)), soft_wrap=False)
    click.echo(f"cache: {catalog.cache_folder()}")
    return 0


@models.command("pull")
@click.argument("name")
def models_pull(name: str) -> int:
    """Fetch a model into the cache and check its sha256."""
    from ragate import catalog
    from ragate.progress import Progress

    with Progress(console(stderr=True)) as progress:
        path = catalog.model_path(
            name, progress=lambda done, total: progress.say(f"fetching {name}", done, total)
        )
    click.echo(path)
    say_adapter(name)
    return 0


@models.command("path")
@click.argument("name")
def models_path(name: str) -> int:
    """Print where a cached model is."""
    from ragate import catalog

    click.echo(catalog.model_path(name, pull=False))
    say_adapter(name)
    return 0


def say_adapter(name: str) -> None:
    """Say on stderr what a judge wears over the file whose path went to stdout."""
    from ragate import catalog

    if adapter := catalog.find(name).adapter:
        click.echo(f"with the adapter {adapter}", err=True)


@models.command("verify")
@click.argument("name", required=False)
def models_verify(name: str | None) -> int:
    """Check the sha256 of one cached model, or of all."""
    from ragate import catalog

    # a judge with an adapter has its base's files
    names = [name] if name else [m.name for m in catalog.models() if not m.base and catalog.is_cached(m.name)]
    bad = []
    for each in names:
        for file in catalog.verify(each):
            state = "ok" if file.ok else "missing" if file.sha256 is None else "wrong sha256, deleted"
            click.echo(f"{each}: {file.path.name}: {state}")
            if not file.ok:
                bad.append((each, f"{each}: {file.path.name}: {state}"))
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CatalogError(f"{bad[0][1]}{more}; fetch it again with `ragate models pull {bad[0][0]}`")
    return 0


def refuse_unused(method: str) -> None:
    """Raise UsageError where the command line has an option that `method` does not look at."""
    context = click.get_current_context()
    gguf, calibrated = {"mix"}, {"testset", "text"}
    unused = {
        "gguf": {"bits", "group", "symmetric", "desc_act"} | calibrated,
        "rtn": gguf | calibrated | {"desc_act"},
        "awq": gguf | {"symmetric", "desc_act"},
        "gptq": gguf,
    }[method]
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        if given and option.name in unused:
            raise click.UsageError(f"--method {method} does not look at {option.opts[0]}: leave it out")


@models.command("quantize")
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--method", type=click.Choice(["gptq", "awq", "rtn", "gguf"]), default="gptq", help="How [gptq]."
)
@click.option(
    "--type", "mix", default="Q4_K_M", help="gguf: Q2_K, Q4_0, Q4_K_M, Q5_K_M, Q6_K or Q8_0 [Q4_K_M]."
)
@click.option("--bits", type=int, default=4, help="Bits of a weight [4].")
@click.option("--group", type=int, default=128, help="Weights that share a scale; -1 is a whole row [128].")
@click.option("--symmetric", is_flag=True, help="No zero points (rtn, gptq): vLLM reads no others of these.")
@click.option("--desc-act", is_flag=True, help="gptq: groups of columns in the order of their activations.")
@click.option("--adapter", help="Folder of a LoRA adapter to add first; a judge's own is added unasked.")
@click.option("--testset", help="Calibrate on the prompts for this test set [that of ragate.toml].")
@click.option("--text", type=click.Path(path_type=Path), help="Calibrate on a text file instead.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to quantize [auto].")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def models_quantize(source: str, folder: Path, quiet: bool, **options: Any) -> int:
    """Make a smaller model of SOURCE, a catalogue name or a path, in FOLDER; resumes where it was stopped.

    By the method gguf, FOLDER is the file to write, as llama.cpp would.
    """
    from ragate.progress import Progress
    from ragate.quantize import quantize

    refuse_unused(options["method"])
    settings = settings_of({key: options.pop(key) for key in ("testset", "device")})
    try:
        with Progress(console(stderr=True), quiet=quiet) as progress:
            quantize(source, folder, settings, progress.say, **options)
    except KeyboardInterrupt:
        again = shlex.join(["ragate", *click.get_current_context().obj])
        done = "nothing was written" if options["method"] == "gguf" else f"finished layers are in {folder}"
        click.echo(f"interrupted: {done}; run `{again}` again to go on", err=True)
        return EXIT_INTERRUPTED
    click.echo(folder)
    return 0


@models.command("advise")
@click.argument("model")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where [auto].")
@click.option("--context", type=int, help="Tokens of a request [4096].")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", help="[text].")
def models_advise(model: str, device: str, context: int | None, format_: str) -> int:
    """Which format of MODEL, a catalogue name or a path, fits this machine; how fast it is, what it loses."""
    from dataclasses import asdict

    from ragate.advise import advise
    from ragate.report.advice import print_advice

    advice = advise(model, device, context)
    if format_ == "json":
        click.echo(json.dumps(asdict(advice), indent=1))
    else:
        print_advice(console(), advice)
    return 0


cli.add_command(judge)


@cli.command()
@settings_options
def doctor(**flags: Any) -> int:
    """What device, model and versions there are, and what `ragate eval` would run."""
    from ragate.doctor import findings

    for line in findings(settings_of(flags)):
        click.echo(line)
    return 0


@cli.command()
@click.option("--yes", "-y", is_flag=True, help="Ask nothing: take the defaults.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def init(yes: bool, force: bool) -> int:
    """Write ragate.toml and the GitHub workflows that gate pull requests into this repository.

    Asks what differs from the defaults, unless there is no terminal to ask in.
    """
    from ragate.init import NEXT, QUESTIONS, default_answers, write_init

    answers = default_answers(Path.cwd())
    if not yes and sys.stdin.isatty():
        for key, question in QUESTIONS.items():
            answers[key] = click.prompt(question, default=answers[key])
    for path in write_init(Path.cwd(), answers, force=force):
        click.echo(f"wrote {path}")
    click.echo(NEXT)
    return 0


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; every error is one sentence unless --debug."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        # not cli.main: it ends with 1 when the reader of stdout has left, which would say FAIL
        with cli.make_context("ragate", list(arguments), obj=arguments) as context:
            result = cli.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return EXIT_USAGE
    except click.ClickException as e:
        click.echo(f"error: {_sentence_of(e)}", err=True)
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as e:
        if isinstance(e, BrokenPipeError) or isinstance(
            e.__context__, BrokenPipeError
        ):  # the latter is rich's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        # nobody else's exit code may pass for a verdict
        click.echo(f"error: unexpected exit with {e.code!r}", err=True)
        return EXIT_USAGE
    except Exception as e:
        if debug:
            traceback.print_exc()
        elif isinstance(e, RagateError) or type(e).__module__ == "ragate_engine.errors":
            click.echo(f"error: {plain(str(e))}", err=True)
        else:
            what = plain(f"{type(e).__name__}: {e}")
            click.echo(f"error: unexpected {what}; run again with --debug for the traceback", err=True)
        return e.exit_code if isinstance(e, RagateError) else EXIT_USAGE


def _sentence_of(error: click.ClickException) -> str:
    """click's message on one line, with where to look."""
    message = " ".join(error.format_message().split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or message.endswith("?"):  # it has suggested something itself
        return message
    return f"{message.rstrip('.')}; see `{context.command_path} --help`"


def main() -> None:
    """Entry point of the `ragate` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
