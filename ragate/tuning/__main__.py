"""`python -m ragate.tuning DATA`: make the lessons, show what they are made of, write them to carry to a card."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ragate.errors import ConfigError, RagateError
from ragate_engine import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate.tuning.lessons import Lesson
    from ragate_engine import Example

PART = 10_000
"""Examples in one file: a few tens of megabytes."""


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--size", type=click.IntRange(min=100), default=40_000, show_default=True, help="Lessons to make."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--held-out", is_flag=True, help="From the clusters that training leaves out.")
@click.option(
    "--halueval",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with HaluEval's files; otherwise they come from the package registry.",
)
@click.option(
    "--mix", is_flag=True, help="Show how many verdicts of each call, source, kind and label there are."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the lessons: FILE.jsonl.gz."
)
@click.option(
    "--tokens",
    nargs=2,
    multiple=True,
    metavar="MODEL PREFIX",
    help="Write token ids for the tokenizer of a model, a name of the catalogue or a path: PREFIX-00.npz, ...",
)
def main(
    data: Path,
    size: int,
    seed: int,
    held_out: bool,
    halueval: Path | None,
    mix: bool,
    out: Path | None,
    tokens: tuple[tuple[str, str], ...],
) -> None:
    """Make lessons for a judge from the labelled data in the folder DATA."""
    try:
        from ragate import catalog
        from ragate.tuning.recipe import build

        # making lessons takes minutes: a mistyped model is to be found out before
        models = [(catalog.resolve_judge(model).path, Path(prefix)) for model, prefix in tokens]
        made = build(seed, size, data, halueval=halueval, held_out=held_out)
        click.echo(f"{len(made):,} lessons: " + _counts(Counter(lesson.call for lesson in made)))
        if mix:
            _show_mix(made)
        if out is not None:
            from ragate.tuning.examples import save_lessons

            save_lessons(made, out)
            click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        for model, prefix in models:
            _write_tokens(made, model, prefix)
    except (RagateError, EngineError) as e:
        raise click.ClickException(str(e)) from None
    except OSError as e:
        raise click.ClickException(f"{e.filename}: {e.strerror}; name another place to write to") from None


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _show_mix(made: Sequence[Lesson]) -> None:
    from ragate.tuning.recipe import mix

    rows: dict[tuple[str, str, str], dict[str, int]] = {}
    for (call, source, kind, label), count in sorted(mix(made).items()):
        rows.setdefault((call, source, kind), {})[label] = count
    click.echo(f"{'call':<11} {'source':<23} {'kind':<52} {'0':>7} {'1':>7}")
    for (call, source, kind), labels in rows.items():
        zero, one = labels.get("0", 0), labels.get("1", 0) + labels.get("-", 0)
        click.echo(f"{call:<11} {source:<23} {kind:<52} {zero:>7} {one:>7}")


def _write_tokens(made: Sequence[Lesson], model: Path, prefix: Path) -> None:
    from ragate.tuning.examples import examples_of, save_examples
    from ragate_engine import open_checkpoint

    tokenizer = open_checkpoint(model).tokenizer
    if tokenizer is None:
        raise ConfigError(f"{model}: has no tokenizer; name a .gguf file or a folder with a tokenizer.json")
    examples: list[Example] = examples_of(made, tokenizer)
    for number, start in enumerate(range(0, len(examples), PART)):
        path = prefix.with_name(f"{prefix.name}-{number:02}.npz")
        save_examples(examples[start : start + PART], path)
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    total = sum(len(e.prompt) + len(e.answer) for e in examples)
    click.echo(f"{len(examples):,} of {len(made):,} lessons fit, {total:,} tokens")


if __name__ == "__main__":
    main()
