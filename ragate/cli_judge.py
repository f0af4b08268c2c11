"""`ragate judge`: how far a judge can be believed. Attached to the command line in ragate.cli."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ragate.errors import EXIT_FAIL, EXIT_INTERRUPTED, EXIT_PASS
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from ragate.judging.calibrate import Statements
    from ragate.judging.labelled import Subject

JUDGE = click.option(
    "--judge", "judge_", help="auto, a catalogue name (`ragate models list`), a .gguf path or an http URL."
)
DEVICE = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the judge runs [auto]."
)
OUT = click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for what is written [in .ragate/judge]."
)
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Only so many items.")
MAX_BATCH = click.option(
    "--max-batch", type=int, help="Requests that the engine runs at once [64; 1024 on a card]."
)
THREADS = click.option("--threads", type=int, help="CPU threads of the engine.")
FORMAT = click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="What goes to stdout."
)
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress.")


@click.group()
def judge() -> None:
    """How far a judge can be believed: held against labels of people, and against itself."""


@judge.command("calibrate")
@click.argument("data", type=click.Path(path_type=Path))
@JUDGE
@click.option(
    "--calls",
    "subject",
    type=click.Choice(["faithfulness", "relevance"]),
    default="faithfulness",
    help="What is labelled: answers (faithful) or contexts (context_relevant) [faithfulness].",
)
@click.option(
    "--statements",
    type=click.Choice(["sentences", "judge"]),
    default="sentences",
    help="An answer's sentences, or statements made by the judge as in ragas [sentences].",
)
@DEVICE
@LIMIT
@MAX_BATCH
@THREADS
@OUT
@FORMAT
@QUIET
def judge_calibrate(
    data: Path,
    judge_: str | None,
    subject: Subject,
    statements: Statements,
    limit: int | None,
    out: Path | None,
    format_: str,
    quiet: bool,
    **flags: Any,
) -> int:
    """Measure a judge on DATA, answers that people labelled (.jsonl), and fit its soft scores. Resumes by itself."""
    from ragate.cli import console, prints_to_stderr, settings_of
    from ragate.judging.calibrate import calibrate
    from ragate.progress import Progress
    from ragate.report.calibration import print_quality

    settings = settings_of(flags | {"judge": judge_})
    try:
        with prints_to_stderr(), Progress(console(stderr=True), quiet=quiet) as progress:
            found = calibrate(
                settings,
                data,
                subject,
                statements,
                progress.say,
                progress.on_event,
                limit=limit,
                out=out,
            )
    except KeyboardInterrupt:
        again = shlex.join(["ragate", *click.get_current_context().obj])
        click.echo(f"interrupted: what was judged is safe; run `{again}` again to go on", err=True)
        return EXIT_INTERRUPTED
    if format_ == "json":
        click.echo(found.quality.model_dump_json(indent=1))
        return EXIT_PASS
    print_quality(console(), found.quality)
    for path in found.written:
        click.echo(f"wrote {plain(str(path))}")
    return EXIT_PASS


@judge.command("selftest")
@JUDGE
@click.option("--testset", help="File, folder or datasets:NAME with stored answers [that of ragate.toml].")
@DEVICE
@LIMIT
@THREADS
@OUT
@FORMAT
@QUIET
def judge_selftest(
    judge_: str | None, limit: int | None, out: Path | None, format_: str, quiet: bool, **flags: Any
) -> int:
    """What moves the verdicts of a judge: the same run again, order, batch size; rewrites that change no meaning.

    Exit code: 0; 1 where a repetition, another order or batch size moved anything.
    """
    from ragate.cli import console, prints_to_stderr, settings_of
    from ragate.judging.selftest import selftest
    from ragate.progress import Progress
    from ragate.report.calibration import print_selftest

    settings = settings_of(flags | {"judge": judge_})
    with prints_to_stderr(), Progress(console(stderr=True), quiet=quiet) as progress:
        found, path = selftest(settings, progress.say, limit=limit, out=out)
    if format_ == "json":
        click.echo(found.model_dump_json(indent=1))
    else:
        print_selftest(console(), found)
        click.echo(f"wrote {plain(str(path))}")
    return EXIT_PASS if found.steady else EXIT_FAIL
