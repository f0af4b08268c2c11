"""The same 200 requests in every company: are token ids and logprobs of each the same, bit for bit?

Greedy and sampled requests of mixed lengths behind shared heads run together in a batch of 256 first; then alone, in
chunks of 64 and of 2,048, from a cold and a warm cache and without one, with and without CUDA graphs, and from a pool
so small that requests are preempted. Printed: each setting and how many requests differ; exit code 1 where any does,
or where a setting did not do what it is there for.

usage: python bench/invariance.py 135m|1.5b|8b|MODEL_PATH [--out JSON]      (under a minute on a card)
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bench import result
from bench.random_model import SHAPES, open_model
from ragate_engine import Engine, EngineConfig, SamplingParams, Usage
from ragate_engine.config import BLOCK_SIZE, ModelConfig
from ragate_engine.weights import Checkpoint

Asked = tuple[list[int], SamplingParams]
Answer = tuple[object, ...]
KvDtype = Literal["auto", "fp8_e4m3", "fp8_e5m2"]
Weights = Literal["auto", "packed", "dense"]


@dataclass(frozen=True)
class Setting:
    """One company to run in."""

    name: str
    max_batch: int = 256
    max_step_tokens: int = 2048
    prefix_cache: bool = True
    cuda_graphs: bool = True
    overlap: bool | None = None
    """Launch a step before the last one is read; `None` is the engine's own choice."""
    small_pool: bool = False
    warm: bool = False
    """Ask everything twice in one engine, and take the second answers."""


SETTINGS = (
    Setting("batch of 256, chunks of 2,048"),
    Setting("the same, cache warm", warm=True),
    Setting("batch of 256, no prefix cache", prefix_cache=False),
    Setting("alone", max_batch=1),
    Setting("alone, no prefix cache", max_batch=1, prefix_cache=False),
    Setting("batch of 64, chunks of 64", max_batch=64, max_step_tokens=64),
    Setting("chunks of 8,192", max_step_tokens=8192),
    Setting("no CUDA graphs", cuda_graphs=False),
    Setting("no CUDA graphs, chunks of 64, batch of 8", max_batch=8, max_step_tokens=64, cuda_graphs=False),
    Setting("each step read before the next", overlap=False),
    Setting("preempted by a small pool", small_pool=True),
)
"""The first is what the others are held against."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help=f"one of {', '.join(SHAPES)} (random weights), or a path")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kv-dtype", choices=get_args(KvDtype), default="auto")
    parser.add_argument("--weights", choices=get_args(Weights), default="auto")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    checkpoint = open_model(args.model, args.device)
    if not checkpoint.files:
        checkpoint = _kept(checkpoint)
    asked = requests(checkpoint.config, args.requests)
    bare: list[Answer] = []
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        started = time.perf_counter()
        answers, usage, cached = _run(checkpoint, setting, asked, args.device, args.kv_dtype, args.weights)
        bare = bare or answers
        different = [i for i, pair in enumerate(zip(bare, answers, strict=True)) if pair[0] != pair[1]]
        rows.append(
            {
                "setting": setting.name,
                "differ": len(different),
                "first_different": different[:5],
                "preemptions": usage.preemptions,
                "rows_a_step": usage.rows / max(1, usage.steps),
                "prompt_tokens_cached": cached,
                "seconds": time.perf_counter() - started,
                "problem": _problem(setting, usage, cached, asked),
            }
        )
        print(_line(rows[-1], len(asked)), flush=True)
    found = result.header(args.device) | {
        "model": args.model,
        "kv_dtype": args.kv_dtype,
        "weights": args.weights,
        "requests": len(asked),
        "tokens": sum(params.max_tokens for _, params in asked),
        "settings": rows,
        "answers_sha256": hashlib.sha256(repr(bare).encode()).hexdigest(),
    }
    result.save(found, args.out)
    return int(any(row["differ"] or row["problem"] for row in rows))


def requests(config: ModelConfig, count: int = 200) -> list[Asked]:
    """Prompts of 65 to 900 tokens behind three shared heads, 1 to 24 tokens to answer, each fifth one sampled."""
    rng = random.Random(0)
    top = config.vocab_size - 100

    def tokens(n: int) -> list[int]:
        return [rng.randrange(100, top) for _ in range(n)]

    heads = [tokens(n) for n in (300, 500, 64)]
    return [
        (
            [*heads[i % 3], *tokens(rng.randrange(1, 400))],
            SamplingParams(
                max_tokens=rng.randrange(1, 25),
                logprobs=2,
                temperature=0.0 if i % 5 else 0.7,
                seed=i,
                ignore_eos=True,
            ),
        )
        for i in range(count)
    ]


def _run(
    checkpoint: Checkpoint,
    setting: Setting,
    asked: list[Asked],
    device: str,
    kv_dtype: KvDtype,
    weights: Weights,
) -> tuple[list[Answer], Usage, int]:
    """Answers, counters, and the prompt tokens that came from the prefix cache in the last pass."""
    lengths = [len(prompt) + params.max_tokens for prompt, params in asked]
    slots = 3 * max(lengths) if setting.small_pool else sum(lengths) + BLOCK_SIZE * len(asked)
    config = EngineConfig(
        device="cuda" if device == "cuda" else "cpu",
        max_len=max(lengths) + BLOCK_SIZE,
        max_batch=setting.max_batch,
        max_step_tokens=setting.max_step_tokens,
        prefix_cache=setting.prefix_cache,
        cuda_graphs=setting.cuda_graphs,
        overlap=setting.overlap,
        kv_dtype=kv_dtype,
        weights=weights,
        kv_bytes=slots * token_bytes(checkpoint.config, device, kv_dtype),
    )
    with Engine(checkpoint, config) as engine:
        for _ in range(1 + setting.warm):
            futures = [engine.submit(*request) for request in asked]
            completions = [future.result(timeout=600) for future in futures]
        engine.check()
        usage = engine.usage()
    del engine
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    answers: list[Answer] = [(c.text, c.tokens, c.finish) for c in completions]
    return answers, usage, sum(c.cached_tokens for c in completions)


def token_bytes(config: ModelConfig, device: str, kv_dtype: str) -> int:
    """Bytes of K and V of one token: a value takes four on a CPU, two on a card, or one in an 8-bit cache."""
    size = 4 if device == "cpu" else 1 if "fp8" in kv_dtype else 2
    return size * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _problem(setting: Setting, usage: Usage, cached: int, asked: list[Asked]) -> str:
    """What a setting was there for and did not do; empty where it did."""
    whole_blocks = sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt, _ in asked)
    if setting.warm and cached < 0.9 * whole_blocks:
        return "the prefix cache was not warm"
    if setting.small_pool and not usage.preemptions:
        return "nothing was preempted"
    if setting.prefix_cache != (cached > 0):
        return "the prefix cache was used" if cached else "the prefix cache was not used"
    return ""


def _line(row: dict[str, Any], count: int) -> str:
    verdict = "same bits" if not row["differ"] else f"{row['differ']} of {count} DIFFER"
    notes = [f"{row['rows_a_step']:.0f} rows a step", f"{row['seconds']:.1f} s"]
    if row["preemptions"]:
        notes.append(f"{row['preemptions']} preemptions")
    if row["problem"]:
        notes.append(row["problem"].upper())
    return f"{row['setting']:42} {verdict:16} {', '.join(notes)}"


def _kept(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, drawing each tensor once: many engines start from it."""
    loaders = {name: lru_cache(maxsize=None)(load) for name, load in checkpoint.tensors.items()}
    return Checkpoint(
        checkpoint.path,
        checkpoint.config,
        checkpoint.tokenizer,
        loaders,
        checkpoint.quantization,
        checkpoint.files,
    )


if __name__ == "__main__":
    sys.exit(main())
