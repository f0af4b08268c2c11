"""How fast an adapter is trained: tokens a second, peak memory, and the minutes that 40,000 examples would take.

The examples are random tokens of the lengths that a judge is trained on: five kinds of call, each with a beginning of
500 to 900 tokens of its own, then 100 to 600 tokens, then an answer of 30 to 150, all of it trained. Tokens are counted
twice: as if each example stood alone, and as they were computed, beginnings once a pack. The first steps, in which
memory is taken and libraries choose, are left out of the figures.

MODEL is 0.5b, 1.5b, 135m, tiny (random weights; such as 1.5b-int4 for quantized ones) or a path.

usage: python bench/tune.py 0.5b --base dense --out bench/results/tune-h200-0.5b.json
       python bench/tune.py 1.5b --base packed
       python bench/tune.py tiny --device cpu --small
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench import result
from bench.random_model import open_model
from ragate_engine import Example, ModelConfig, TuneRecipe, TuneStep, tune_adapter
from ragate_engine.errors import EngineError
from ragate_engine.quantize.layer import LINEARS
from ragate_engine.training.state import LOG
from ragate_engine.weights import names

WHOLE = 40_000
"""Examples of the run that is projected."""
WARM = 3
"""Steps that are left out."""
KINDS = (500, 600, 700, 800, 900)
"""Fixed tokens of each kind of call."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--base", choices=("dense", "packed"), default="dense")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pass-tokens", type=int, default=TuneRecipe.pass_tokens)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--small", action="store_true", help="few and short: it runs, and shows no speed")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    if args.small:
        args.steps, args.batch = WARM + 2, 8
    if args.steps <= WARM:
        parser.error(f"--steps must be above {WARM}: the first ones are left out")
    try:
        found = result.header(args.device) | measured(args)
    except EngineError as error:
        raise SystemExit(str(error)) from error
    result.save(found, args.out)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps: what they took."""
    source = open_model(args.model, args.device)
    examples = synthetic(args.steps * args.batch, source.config.vocab_size, 10 if args.small else 1)
    recipe = TuneRecipe(
        base=args.base, batch=args.batch, pass_tokens=args.pass_tokens, checkpointing=args.checkpointing
    )
    with tempfile.TemporaryDirectory(prefix="ragate-tune-") as folder:
        report = tune_adapter(source, examples, Path(folder) / "adapter", recipe, args.device, _print)
        log = _steps(Path(folder) / "adapter")
    found = figures(log[WARM:], args.batch, linear_weights(source.config))
    found["peak_bytes"] = report.peak_bytes
    peak = "" if report.peak_bytes is None else f", {report.peak_bytes / 1e9:.1f} GB at most"
    print(
        f"{args.model} {args.base}: {found['tokens_per_second']:,.0f} tokens/s "
        f"({found['computed_tokens_per_second']:,.0f} computed){peak}, "
        f"{WHOLE:,} examples in {found['minutes_for_40000']:.1f} minutes"
    )
    settings = {"model": args.model, "device": args.device, "base": args.base, "batch": args.batch}
    settings |= {"pass_tokens": args.pass_tokens, "checkpointing": args.checkpointing, "small": args.small}
    return settings | {"adapter_weights": report.parameters} | found | {"log": log}


def figures(log: Sequence[dict[str, Any]], batch: int, weights: int) -> dict[str, Any]:
    """What the rows of the log add up to; `weights` are those that every computed token is multiplied with."""
    seconds = sum(row["seconds"] for row in log)
    tokens, computed = (sum(row[key] for row in log) for key in ("tokens", "computed_tokens"))
    return {
        "seconds_per_step": mean(row["seconds"] for row in log),
        "median_seconds_per_step": median(row["seconds"] for row in log),
        "tokens_per_second": tokens / seconds,
        "computed_tokens_per_second": computed / seconds,
        "computed_share": computed / tokens,
        # forward, and the gradient of the input: frozen weights have none
        "linear_tflops": 4 * weights * computed / seconds / 1e12,
        "minutes_for_40000": WHOLE / (batch * len(log)) * seconds / 60,
    }


def linear_weights(config: ModelConfig) -> int:
    """Weights of all linears of the layers."""
    shapes = names.expected(config)
    return sum(
        shapes[f"layers.{i}.{leaf}"][0] * shapes[f"layers.{i}.{leaf}"][1]
        for i in range(config.num_layers)
        for leaf in LINEARS
    )


def synthetic(count: int, vocab: int, shrink: int, seed: int = 0) -> list[Example]:
    """Random examples; every length is divided by `shrink`."""
    random = np.random.default_rng(seed)

    def tokens(size: int) -> tuple[int, ...]:
        return tuple(random.integers(3, vocab, size // shrink).tolist())

    heads = [tokens(size) for size in KINDS]
    found = []
    for _ in range(count):
        head = heads[random.integers(len(heads))]
        answer = tokens(int(random.integers(30, 151)))
        found.append(Example(head + tokens(int(random.integers(100, 601))), answer, (1.0,) * len(answer)))
    return found


def _steps(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / LOG).read_text())["steps"]
    return rows


def _print(step: TuneStep) -> None:
    print(
        f"step {step.step} of {step.steps}: loss {step.loss:.3f}, {step.tokens_per_second:,.0f} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
