"""On the card: whole models, whose answers are the same bits in any company and under any setting.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card; a GGUF file is taken from RAGATE_TEST_MODEL.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from on_card import BF16, CARD, NEEDS_CARD

from ragate_engine import (
    Completion,
    Engine,
    EngineConfig,
    ModelConfig,
    OutOfMemoryError,
    PromptTooLongError,
    SamplingParams,
    Usage,
)

pytest.importorskip("triton")
pytestmark = NEEDS_CARD
MIB = 1 << 20
Asked = tuple[list[int], SamplingParams]


def requests(count: int, vocab: int) -> list[Asked]:
    """Prompts of 65 to 900 tokens behind three shared heads, 1 to 32 tokens to answer, each fifth one sampled."""
    lengths, tokens = random.Random(0), random.Random(1)

    def some(n: int) -> list[int]:
        return [tokens.randrange(100, vocab - 100) for _ in range(n)]

    heads = [some(n) for n in (300, 500, 64)]
    return [
        (
            [*heads[i % 3], *some(lengths.randint(1, 400))],
            SamplingParams(
                max_tokens=lengths.randint(1, 32),
                logprobs=2,
                temperature=0.0 if i % 5 else 0.7,
                top_p=0.9 if i % 2 else 1.0,
                seed=i,
                ignore_eos=True,
            ),
        )
        for i in range(count)
    ]


def answers(engine: Engine, asked: Sequence[Asked]) -> list[Completion]:
    """Everything is asked at once: the loop sees no request before it sees all."""
    with engine._wake:
        futures = [engine.submit(*request) for request in asked]
    return [future.result(timeout=300) for future in futures]


def bits(completions: Sequence[Completion]) -> list[object]:
    """What must not change: ids, logprobs, alternatives, text."""
    return [(c.text, c.tokens, c.finish) for c in completions]


def differing(one: Sequence[Completion], other: Sequence[Completion]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(bits(one), bits(other), strict=True)) if a != b]


# ---- random weights of SmolLM2-135M's shapes ----


def open_random(name: str):
    return pytest.importorskip("bench.random_model", reason="run from the root of the repository").open_model(
        name, "cuda"
    )


@functools.cache
def sixty() -> list[Asked]:
    return requests(60, 49152)


def token_bytes(model: ModelConfig, kv_bytes: int = 2) -> int:
    """K and V of one token."""
    return 2 * kv_bytes * model.num_layers * model.num_kv_heads * model.head_dim


SETTINGS = {
    "alone": dict(prefix_cache=False),
    "a batch of 256": {},
    "the same, cache warm": {},
    "chunks of 64": dict(max_step_tokens=64),
    "chunks of 2,048": dict(max_step_tokens=2048),
    "no CUDA graphs": dict(cuda_graphs=False),
    "each step read before the next": dict(overlap=False),
    "no prefix cache": dict(prefix_cache=False),
    "preempted by a small pool": {},
    "an 8-bit cache, alone": dict(kv_dtype="fp8_e4m3", prefix_cache=False),
    "an 8-bit cache, a batch of 256": dict(kv_dtype="fp8_e4m3"),
}


@functools.cache
def served(name: str) -> tuple[list[Completion], Usage]:
    """The sixty answers under a setting, and what they took."""
    checkpoint = open_random("135m")
    lengths = [len(prompt) + params.max_tokens for prompt, params in sixty()]
    slots = max(lengths) * 6 // 5 if "small pool" in name else sum(lengths) + 16 * len(lengths)
    config = EngineConfig(
        device="cuda",
        max_batch=256,
        max_len=max(lengths) + 16,
        kv_bytes=slots * token_bytes(checkpoint.config),
    )
    with Engine(checkpoint, replace(config, **SETTINGS[name])) as engine:
        assert engine.describe()["backend"] == import_module("ragate_engine.kernels.triton").NAME
        if "alone" in name:
            found = [engine.submit(*request).result(timeout=60) for request in sixty()]
        else:
            found = answers(engine, sixty())
        if "warm" in name:
            found = answers(engine, sixty())
        engine.check()
        return found, engine.usage()


@pytest.mark.parametrize("name", [name for name in SETTINGS if "alone" not in name and "8-bit" not in name])
def test_ids_and_logprobs_are_those_that_a_request_has_alone(name: str) -> None:
    alone, _ = served("alone")
    found, usage = served(name)
    assert all(len(c.tokens) == params.max_tokens for c, (_, params) in zip(alone, sixty(), strict=True))
    assert differing(found, alone) == []
    # and the setting did what it is there for
    cached = sum(c.cached_tokens for c in found)
    if "warm" in name:
        assert cached > 0.9 * sum((len(prompt) - 1) // 16 * 16 for prompt, _ in sixty())
    elif "no prefix cache" in name:
        assert cached == 0
    else:
        assert cached > 0
    assert usage.preemptions >= 5 if "small pool" in name else usage.preemptions == 0


def test_a_step_ahead_takes_hardly_more_steps() -> None:
    ahead, apart = (served(name)[1].steps for name in ("a batch of 256", "each step read before the next"))
    assert ahead <= apart + 4


def test_an_8_bit_cache_keeps_the_bits_in_company_and_the_answers_near() -> None:
    alone, together = served("an 8-bit cache, alone")[0], served("an 8-bit cache, a batch of 256")[0]
    assert differing(together, alone) == []
    wide, _ = served("alone")
    assert differing(alone, wide) != []
    first = [abs(a.tokens[0].top[0][1] - b.tokens[0].top[0][1]) for a, b in zip(alone, wide, strict=True)]
    assert sum(first) / len(first) < 0.1


def test_what_is_longer_than_the_pool_is_refused_and_what_just_fits_is_answered() -> None:
    checkpoint = open_random("135m")
    block = 16 * token_bytes(checkpoint.config)
    with Engine(checkpoint, EngineConfig(device="cuda", kv_bytes=20 * block)) as engine:
        assert engine.max_len == 320
        with pytest.raises(PromptTooLongError, match=r"320 tokens and the KV cache .* holds 320"):
            engine.submit([500] * 320)
        (fits,) = answers(engine, [([500] * 319, SamplingParams(max_tokens=9, ignore_eos=True))])
        assert (len(fits.tokens), fits.finish) == (1, "length")
        # two that fit alone and not together: one waits or falls, both are answered
        both = answers(engine, [([500 + i] * 200, SamplingParams(max_tokens=100)) for i in range(2)])
        assert [len(c.tokens) for c in both] == [100, 100]
        engine.check()
    with pytest.raises(OutOfMemoryError, match=r"room for 16 tokens .* kv_gib"):
        Engine(checkpoint, EngineConfig(device="cuda", kv_bytes=block))
    with pytest.raises(OutOfMemoryError, match=r"kv_gib asks for 1024\.0 GiB"):
        Engine(checkpoint, EngineConfig(device="cuda", kv_bytes=1 << 40))


def memory_in_use() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def test_a_closed_engine_gives_its_memory_back() -> None:
    checkpoint = open_random("135m")

    def serve() -> int:
        with Engine(checkpoint, EngineConfig(device="cuda", kv_bytes=1 << 29)) as engine:
            answers(engine, sixty())
            answers(engine, sixty())  # from graphs
            return memory_in_use()

    before = memory_in_use()
    during = serve()
    assert during - before > 700 * MIB  # weights and KV blocks
    assert memory_in_use() - before < 4 * MIB


# ---- steps without graphs, on the reference kernels ----


@pytest.mark.parametrize("overlap", [False, True])
def test_plain_steps_take_pending_tokens_from_the_pool_and_give_the_tokens_of_a_cpu(overlap: bool) -> None:
    from ragate_engine.steps import HostSteps

    bench = pytest.importorskip("bench.random_model", reason="run from the root of the repository")
    asked = requests(12, bench.TINY.vocab_size)
    found: dict[str, list[Completion]] = {}
    for device in ("cpu", "cuda"):
        # drawn on the CPU for both: a card draws other numbers
        config = EngineConfig(device=device, dtype="float32", kernels="reference", kv_bytes=64 * MIB)
        config = replace(config, overlap=overlap, max_step_tokens=256, max_batch=16)
        with Engine(bench.random_checkpoint(bench.TINY), config) as engine:
            assert isinstance(engine._runner.steps, HostSteps)
            found[device] = answers(engine, asked)
            engine.check()
    for mine, expected in zip(found["cuda"], found["cpu"], strict=True):
        assert [token.id for token in mine.tokens] == [token.id for token in expected.tokens]
        for a, b in zip(mine.tokens, expected.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


# ---- compiled ahead ----


def test_steps_launch_no_linear_kernel_that_was_not_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from ragate_engine.card import CardSteps, buckets_of
    from ragate_engine.kernels import triton as ops
    from ragate_engine.kernels.triton.ahead import AheadCompiler
    from ragate_engine.trial import run_steps

    linear = import_module("ragate_engine.kernels.triton.linear")
    kernels = [linear._skinny, linear._persistent]
    for kernel in kernels:  # forget what other tests have compiled
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    # a layer of Qwen2.5-1.5B: weights small enough to be asked for ahead of their turn, and larger ones
    model = ModelConfig("qwen2", 1024, 1536, 8960, 1, 12, 2, 128, 4096, qkv_bias=True)
    rows = (1, 40, 100, 200, 2000)
    AheadCompiler(model, BF16, BF16, buckets_of(max(rows)), 16)._thread.join()
    ahead = compiled()
    assert ahead >= 10
    config = EngineConfig(device="cuda", cuda_graphs=False)
    run_steps(
        model,
        ops,
        BF16,
        CARD,
        lambda decoder, kv, batch, most, length: CardSteps(decoder, kv, batch, most, length, config),
        rows,
    )
    assert compiled() == ahead


CHILDREN = """
import os, sys, threading, torch
from pathlib import Path
from ragate_engine.config import ModelConfig
from ragate_engine.kernels.triton.ahead import AheadCompiler, _jobs
from ragate_engine.card import buckets_of
folder = Path(os.environ["TRITON_CACHE_DIR"])
model = ModelConfig("qwen2", 1024, 1536, 8960, 1, 12, 2, 128, 4096, qkv_bias=True)
arguments = (model, torch.bfloat16, torch.bfloat16, buckets_of(2000), 16)
ahead = AheadCompiler.__new__(AheadCompiler)
ahead._arguments = arguments
children = ahead._children(torch.cuda.get_device_capability())
first, rest = _jobs(torch.device("cuda"), *arguments)
children.wait(range(len(first) + len(rest)), threading.Event())
children.close()
before = len(list(folder.glob("*/*.cubin")))
with torch.inference_mode():
    for job in [*first, *rest]:
        job()
torch.cuda.synchronize()
print(len(children._done), len(first) + len(rest), before, len(list(folder.glob("*/*.cubin"))))
"""


def test_what_children_compile_is_what_the_card_is_asked_to_launch(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", CHILDREN],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    done, jobs, before, after = map(int, ended.stdout.split())
    assert done == jobs
    assert before == after > 15


# ---- a real model ----


@pytest.fixture(scope="module")
def model_file() -> str:
    path = os.environ.get("RAGATE_TEST_MODEL")
    if not path:
        pytest.skip("RAGATE_TEST_MODEL names no GGUF file")
    return path


REAL_SETTINGS = {
    "batch 256": dict(max_batch=256, max_step_tokens=2048),
    "alone": dict(max_batch=1, max_step_tokens=2048),
    "chunks of 64": dict(max_batch=64, max_step_tokens=64),
    "no cache": dict(max_batch=256, max_step_tokens=1024, prefix_cache=False),
    "graphs off": dict(max_batch=256, max_step_tokens=2048, cuda_graphs=False),
    "a step ahead off": dict(max_batch=256, max_step_tokens=2048, overlap=False),
}


def test_bits_of_200_requests_to_a_real_model_do_not_depend_on_their_company(model_file: str) -> None:
    seen: dict[str, list[Completion]] = {}
    for name, settings in REAL_SETTINGS.items():
        with Engine.load(model_file, EngineConfig(device="cuda", kv_bytes=4 << 30, **settings)) as engine:
            asked = requests(200, engine._runner.vocab_size)
            seen[name] = answers(engine, asked)
            if name == "batch 256":
                assert differing(answers(engine, asked), seen[name]) == []  # the cache is warm now
            engine.check()
    different = {name: differing(found, seen["batch 256"]) for name, found in seen.items()}
    assert different == {name: [] for name in REAL_SETTINGS}


TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 12 times 11?\nA:",
    "The three laws of thermodynamics state that",
    "In 1969, humans first",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8,",
]


def test_a_real_model_goes_on_as_the_reference_kernels_do_but_where_two_tokens_are_nearly_equal(
    model_file: str,
) -> None:
    found: dict[str, list[Completion]] = {}
    for kernels in ("auto", "reference"):
        with Engine.load(
            model_file, EngineConfig(device="cuda", kernels=kernels, kv_bytes=1 << 28)
        ) as engine:
            params = SamplingParams(max_tokens=24, logprobs=2, ignore_eos=True)
            found[kernels] = answers(engine, [(engine.tokenizer.encode(text), params) for text in TEXTS])
    for ours, theirs in zip(found["auto"], found["reference"], strict=True):
        pairs = list(zip(ours.tokens, theirs.tokens, strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a.id != b.id), None)
        if first is not None:
            (_, best), (_, second) = theirs.tokens[first].top
            assert best - second < 0.05, (first, ours.text, theirs.text)
        assert ours.tokens[0].top[0][1] == pytest.approx(theirs.tokens[0].top[0][1], abs=0.1)


def test_answers_bound_by_a_schema_follow_it_and_are_the_same_bits_alone(model_file: str) -> None:
    if importlib.util.find_spec("llguidance") is None:
        pytest.skip("llguidance is not installed")
    fields = {"why": {"type": "string", "pattern": "^[a-z ]{3,30}$"}, "verdict": {"enum": [0, 1]}}
    schema = json.dumps(
        {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    )
    asked: list[Asked] = []
    for prompt, params in requests(40, 20_000):
        bound = replace(params, max_tokens=60, schema=schema, ignore_eos=False)
        asked.append((prompt, bound if len(asked) % 3 else params))  # free ones beside them
    with Engine.load(model_file, EngineConfig(device="cuda", kv_bytes=1 << 30)) as engine:
        together = answers(engine, asked)
        alone = [engine.submit(*request).result(timeout=60) for request in asked]
        engine.check()
    assert differing(alone, together) == []
    bound_answers = [json.loads(c.text) for i, c in enumerate(together) if i % 3]
    assert all(set(answer) == set(fields) and answer["verdict"] in (0, 1) for answer in bound_answers)
