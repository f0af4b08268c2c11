"""What a format costs in quality: perplexity, divergence from the reference, agreement of tokens and of verdicts.

The reference is a model as it lies on disk, its weights unpacked; each format is made from it, in a temporary folder,
or is a file that is already there. All are run by the engine's own kernels over the same windows of held-out text
(pages of WiCE in --data, cut from one long row of tokens at even distances), then asked about the same items of
RAGTruth. Those that look at activations are calibrated on what a judge is asked about --calibration, as
`ragate models quantize` does: none of it is in --data. Papers calibrate on text of the kind that they score, as
`--calibration text` does: on windows of the same pages, none of which is scored.

formats: rtn4-g128, gptq4-g128, awq4-g64 (method, bits, group); gptq4-g128-sym (no zero points), gptq4-g128-act (groups
         in the order of activations);
         a mix of GGUF (Q2_K, Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0); a .gguf file or a folder; `reference` itself.
         On a card each may be followed by how it is run: +packed (its codes are kept), +int8 (products of int8),
         +fp8_e4m3 (the KV cache).

usage: python bench/quality.py smollm2-135m --device cpu --formats rtn4-g64 gptq4-g64 awq4-g64 Q4_K_M Q8_0 --out JSON
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import result
from bench.logits import Head, states_of
from bench.verdicts import LABELLED, Item, Verdict, agreement, load_items, verdicts_of
from ragate.catalog import resolve_judge
from ragate.config import Settings
from ragate.errors import RagateError
from ragate.quantize import calibration_of
from ragate_engine import EngineConfig, merge_adapter
from ragate_engine.errors import EngineError
from ragate_engine.quantize import quantize
from ragate_engine.weights import Checkpoint, open_checkpoint
from ragate_engine.weights.gguf_write import MIXES, write_gguf
from ragate_engine.weights.tokenizer import Tokenizer

ROOT = result.RESULTS.parent.parent
DATA = ROOT.parent / "shared" / "data"
TEXT = "wice_dev.jsonl"
"""Pages of the web, as the evidence for claims of Wikipedia."""
ROWS = 128
"""Positions that are compared at a time: of 152,000 float32 each."""

_MADE = re.compile(r"(rtn|gptq|awq)(\d)-g(\d+)(-sym)?(-act)?")
_RUNS = {"packed": "weights", "int8": "weights", "fp8_e4m3": "kv_dtype", "fp8_e5m2": "kv_dtype"}
"""What may follow a format's name, and the field of `EngineConfig` that it is a value of."""


@dataclass(frozen=True)
class Format:
    """A format of the weights, and how they are run."""

    name: str
    base: str
    """`name` without the run: what is made of the reference, or a path."""
    run: tuple[str, ...] = ()

    @classmethod
    def parse(cls, name: str) -> Format:
        """Raises SystemExit for what is neither a format nor a path."""
        base, *run = name.split("+")
        if unknown := [word for word in run if word not in _RUNS]:
            raise SystemExit(f"{name}: {unknown[0]} is no way to run a format: take {', '.join(_RUNS)}")
        if len({_RUNS[word] for word in run}) < len(run):
            raise SystemExit(f"{name}: {' and '.join(run)} cannot be had at once")
        if (
            base != "reference"
            and base not in MIXES
            and not _MADE.fullmatch(base)
            and not Path(base).exists()
        ):
            raise SystemExit(
                f"{base} is neither a path nor a format: take reference, {', '.join(MIXES)}, or such as gptq4-g128"
            )
        return cls(name, base, tuple(run))

    def config(self, device: str) -> EngineConfig:
        """How the engine runs it. Raises SystemExit where the device cannot."""
        if self.run and device == "cpu":
            raise SystemExit(f"{self.name}: +{self.run[0]} needs a card: leave it out, or take --device cuda")
        return EngineConfig(**{"device": device} | {_RUNS[word]: word for word in self.run})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Window:
    """Sums over the positions of one window that predict a token of it."""

    positions: int
    loss: float
    """Of minus the natural log of the probability of the token that follows."""
    divergence: float
    """Of KL(reference || format), in nats."""
    agreeing: int
    """Positions where both have the same likeliest token."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("reference", help="a name of the catalogue, a .gguf file or a folder")
    parser.add_argument("--formats", nargs="+", required=True, metavar="FORMAT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--windows", type=int, default=64, help="how many windows of text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--items", type=int, default=100, help="questions to the judge; 0 asks none")
    parser.add_argument("--sequences", type=int, default=128, help="of 512 tokens, to calibrate on")
    parser.add_argument(
        "--calibration", type=Path, default=ROOT / "testsets" / "llm-serving", help="a test set, or `text`"
    )
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {TEXT} and {LABELLED}")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    if args.windows < 2 or args.length < 2:
        parser.error("there must be two windows or more, of two tokens or more")
    formats = [Format.parse(name) for name in args.formats]
    try:
        configs = [each.config(args.device) for each in formats]
        head = result.header(args.device)  # of what runs: the files may change meanwhile
        found = head | _measured(args, formats, configs)
    except (EngineError, RagateError) as error:
        raise SystemExit(str(error)) from error
    result.save(found, args.out)


def _measured(
    args: argparse.Namespace, formats: Sequence[Format], configs: Sequence[EngineConfig]
) -> dict[str, Any]:
    choice = resolve_judge(args.reference)
    reference = open_checkpoint(choice.path)
    if choice.adapter is not None:  # what it costs to quantize again what an adapter was added to
        reference = merge_adapter(reference, choice.adapter)
    if reference.tokenizer is None:
        raise SystemExit(f"{reference.path} has no tokenizer: add its tokenizer.json")
    pages = load_texts(args.data)
    windows = cut(reference.tokenizer, pages, args.windows, args.length)
    items = load_items(args.data, args.items) if args.items else []
    calibration: list[list[int]] = []
    if any(each.base.startswith(("gptq", "awq")) for each in formats):
        if args.calibration == Path("text"):
            seen = set(map(tuple, windows))
            more = cut(reference.tokenizer, pages, args.windows + args.sequences, args.length)
            calibration = [window for window in more if tuple(window) not in seen][: args.sequences]
        else:
            calibration = calibrated_on(reference.tokenizer, args.calibration, args.sequences)

    plain = EngineConfig(device=args.device)
    head, states = states_of(reference, windows, plain)
    kept = list(states)
    said = verdicts_of(reference, items, plain)
    base = list(compare(windows, head, kept, head, kept))
    rows = [row("reference", reference, base, base, said, said, items)]
    print(_line(rows[0]), flush=True)
    with tempfile.TemporaryDirectory(prefix="ragate-quality-") as folder:
        made: dict[str, tuple[Path, float]] = {}
        for each, config in zip(formats, configs, strict=True):
            if each.base not in made:
                start = time.perf_counter()
                path = make(each, reference, Path(folder), calibration, args.device)
                made[each.base] = path, time.perf_counter() - start
            path, seconds = made[each.base]
            checkpoint = open_checkpoint(path)
            _require_same_tokens(reference, checkpoint)
            own_head, own = states_of(checkpoint, windows, config)
            compared = list(compare(windows, head, kept, own_head, own))
            del own_head
            verdicts = verdicts_of(checkpoint, items, config)
            rows.append(row(each.name, checkpoint, compared, base, verdicts, said, items))
            rows[-1]["made_s"] = seconds
            print(_line(rows[-1]), flush=True)
    return {
        "model": args.reference,
        "device": args.device,
        "reference": {"quantization": reference.quantization, "weights": reference.identity},
        "text": {
            "file": TEXT,
            "windows": len(windows),
            "length": args.length,
            "positions": sum(each.positions for each in base),
            "sha256": _digest(windows),
        },
        "judge": {"file": LABELLED, "items": len(items)},
        "calibration": {
            "testset": args.calibration.name,
            "sequences": len(calibration),
            "tokens": sum(map(len, calibration)),
            "sha256": _digest(calibration),
        },
        "formats": rows,
    }


# --- text -----------------------------------------------------------------------------------------------


def load_texts(folder: Path) -> list[str]:
    """The distinct pages of held-out text, in the file's order. Raises SystemExit where it is not there."""
    path = folder / TEXT
    if not path.is_file():
        raise SystemExit(f"{path} is not there: name the folder of labelled data with --data")
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys("\n".join(json.loads(line)["context_sentences"]) for line in lines))


def cut(tokenizer: Tokenizer, texts: Iterable[str], count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens at even distances of the texts in a row; each begins with the model's BOS
    where it wants one. Raises SystemExit where there is less text.
    """
    start = tokenizer.encode("", bos=tokenizer.add_bos)
    stream = [token for text in texts for token in tokenizer.encode(f"{text}\n\n", special=False)]
    size = length - len(start)
    pieces = len(stream) // size
    if pieces < count:
        raise SystemExit(
            f"there is text for {pieces} windows of {length} tokens: ask for no more with --windows"
        )
    places = [i * pieces // count * size for i in range(count)]
    return [[*start, *stream[at : at + size]] for at in places]


def calibrated_on(tokenizer: Tokenizer, testset: Path, count: int) -> list[list[int]]:
    """At most `count` of the sequences that `ragate models quantize` calibrates on, evenly spaced."""
    found = calibration_of(tokenizer, Settings.model_validate({"testset": str(testset)}), None)
    wanted = min(count, len(found))
    return [found[i * len(found) // wanted] for i in range(wanted)]


def _digest(sequences: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()


# --- formats --------------------------------------------------------------------------------------------


def make(
    wanted: Format, reference: Checkpoint, folder: Path, calibration: list[list[int]], device: str
) -> Path:
    """The model in that format: made in `folder`, or where it is already. Raises what the makers raise."""
    if wanted.base == "reference":
        return reference.path
    if wanted.base in MIXES:
        path = folder / f"{wanted.base}.gguf"
        write_gguf(reference, path, wanted.base, lambda done, total: None, device)
        return path
    if (made := _MADE.fullmatch(wanted.base)) is None:
        return Path(wanted.base)
    path = folder / wanted.base
    method, bits, group, symmetric, act = made.groups()
    switches = {"symmetric": symmetric is not None, "desc_act": act is not None}
    quantize(reference, path, method, int(bits), int(group), calibration, device, **switches)
    return path


def _require_same_tokens(reference: Checkpoint, other: Checkpoint) -> None:
    if other.config.vocab_size != reference.config.vocab_size:
        raise SystemExit(
            f"{other.path} has {other.config.vocab_size} tokens, the reference {reference.config.vocab_size}: "
            "it is no format of the same model"
        )


# --- figures --------------------------------------------------------------------------------------------


def compare(
    windows: Sequence[Sequence[int]],
    reference: Head,
    expected: Iterable[torch.Tensor],
    head: Head,
    found: Iterable[torch.Tensor],
) -> Iterator[Window]:
    """How a format does on each window; `expected` and `found` are what goes into the heads, [n, hidden] each.

    Logits are made a few positions at a time. The last position predicts no token of the window and is left out.
    """
    for window, one, other in zip(windows, expected, found, strict=True):
        parts = [
            compare_logits(
                reference.logits(one[at : at + ROWS]),
                head.logits(other[at : at + ROWS]),
                torch.tensor(window[at + 1 : at + 1 + ROWS], device=other.device),
            )
            for at in range(0, len(window) - 1, ROWS)
        ]
        yield Window(
            sum(part.positions for part in parts),
            math.fsum(part.loss for part in parts),
            math.fsum(part.divergence for part in parts),
            sum(part.agreeing for part in parts),
        )


def compare_logits(expected: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> Window:
    """Two models' logits [n or n + 1, vocab] before the tokens `following`, int64 [n]."""
    n = len(following)
    p, q = (torch.log_softmax(logits[:n].float(), -1) for logits in (expected, found))
    loss = -q.gather(1, following[:, None]).double().sum()
    divergence = (p.exp() * (p - q)).sum(-1).double().sum()
    agreeing = (p.argmax(-1) == q.argmax(-1)).sum()
    return Window(n, float(loss), float(divergence), int(agreeing))


def row(
    name: str,
    checkpoint: Checkpoint,
    windows: Sequence[Window],
    base: Sequence[Window],
    said: Sequence[Verdict | None],
    reference: Sequence[Verdict | None],
    items: Sequence[Item],
) -> dict[str, Any]:
    """A format's figures. `nats_over` is the mean loss beyond the reference's; `_se` is a standard error, from how
    windows differ.
    """
    positions = sum(each.positions for each in windows)
    mean = partial(_mean, positions)
    over = [one.loss - other.loss for one, other in zip(windows, base, strict=True)]
    divergences = [each.divergence for each in windows]
    size = sum(file.stat().st_size for file in checkpoint.files)
    return {
        "name": name,
        "quantization": checkpoint.quantization,
        "bytes": size,
        "bits_a_weight": 8 * size / checkpoint.parameters,
        "perplexity": math.exp(mean([each.loss for each in windows])),
        "nats_over": mean(over),
        "nats_over_se": _error(over, positions),
        "kl": mean(divergences),
        "kl_se": _error(divergences, positions),
        "same_top": sum(each.agreeing for each in windows) / positions,
        "judge": agreement(said, reference, items) if items else None,
    }


def _mean(positions: int, sums: Sequence[float]) -> float:
    return math.fsum(sums) / positions


def _error(sums: Sequence[float], positions: int) -> float:
    """Standard error of the mean over positions, of windows that are alike in length."""
    return statistics.stdev(sums) * len(sums) / positions / math.sqrt(len(sums))


def _line(found: dict[str, Any]) -> str:
    judge = found["judge"]
    verdicts = f", verdicts {judge['as_reference']} of {judge['items']}" if judge else ""
    return (
        f"{found['name']:24} {found['bytes'] / 1e6:8.1f} MB  perplexity {found['perplexity']:8.3f}  "
        f"KL {found['kl']:.5f} +- {found['kl_se']:.5f}  same token {found['same_top']:.1%}{verdicts}"
    )


if __name__ == "__main__":
    main()
