"""How long a model takes to quantize, layer by layer, with the peak of memory.

Calibrated on 128 sequences of 512 tokens, as `ragate models quantize` is: random ones, since their number alone counts.
The parts of a layer are read, quantized and written as the command does it.

usage: python bench/quantize.py 8b --method gptq --out bench/results/quantize-h200-8b-gptq.json
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import result
from bench.random_model import SHAPES, open_model
from ragate_engine.quantize import quantize

SEQUENCES, LENGTH = 128, 512


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help=f"one of {', '.join(SHAPES)} (random weights), or a path")
    parser.add_argument("--method", choices=("rtn", "gptq", "awq"), default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--folder", type=Path, help="where the model is left; without it, it is removed again"
    )
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    found = result.header(args.device)
    source = open_model(args.model, args.device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(source.config.vocab_size, (SEQUENCES, LENGTH), generator=generator).tolist()
    layers = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ragate-quantize-") as temporary:

        def progress(done: int, total: int) -> None:
            layers.append(time.perf_counter() - start)
            print(f"layer {done} of {total}: {layers[-1]:.1f} s", flush=True)

        path = args.folder or Path(temporary) / "model"
        quantize(source, path, args.method, args.bits, args.group, drawn, args.device, progress)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in path.iterdir())
    found |= {
        "model": args.model,
        "method": args.method,
        "bits": args.bits,
        "group": args.group,
        "tokens": SEQUENCES * LENGTH,
        "layers": len(layers),
        "seconds": seconds,
        "bytes": size,
        "peak_bytes": torch.cuda.max_memory_allocated()
        if args.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(
        f"{args.model} {args.method}: {seconds:.1f} s, {size / 1e9:.2f} GB, peak {found['peak_bytes'] / 1e9:.1f} GB"
    )
    result.save(found, args.out)
    return found


if __name__ == "__main__":
    main()
