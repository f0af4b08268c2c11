"""The runner and its steps on a CPU, with tiny models: settings, counters, grammars and aborts a step ahead."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_gguf import write_tiny

import ragate_engine.runner as runner_module
from bench.random_model import LLAMA_8B, TINY, random_checkpoint
from ragate_engine import (
    Completion,
    ConfigError,
    Engine,
    EngineConfig,
    OutOfMemoryError,
    SamplingParams,
    forms_of,
)
from ragate_engine.devices import Card
from ragate_engine.kernels.fallback import FAMILIES, Checked
from ragate_engine.layers import Kept
from ragate_engine.runner import Runner
from ragate_engine.weights import Checkpoint
from ragate_engine.weights.stream import Joined

VERDICT = json.dumps(
    {
        "type": "object",
        "properties": {"why": {"type": "string", "pattern": "^[a-z]{3,9}$"}, "verdict": {"enum": [0, 1]}},
        "required": ["why", "verdict"],
        "additionalProperties": False,
    }
)


def serve(**settings) -> Engine:
    """A model of 512 tokens and random weights."""
    return Engine(random_checkpoint(TINY), EngineConfig(device="cpu", **({"kv_bytes": 1 << 20} | settings)))


def answer(engine: Engine, prompt: list[int], tokens: int = 1, **params) -> Completion:
    asked = SamplingParams(max_tokens=tokens, ignore_eos=True, **params)
    return engine.submit(prompt, asked).result(timeout=60)


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_an_8_bit_cache_is_refused_on_a_cpu_before_a_weight_is_read(kv_dtype) -> None:
    def read() -> None:
        raise AssertionError("a weight was read")

    checkpoint = replace(random_checkpoint(TINY), tensors=dict.fromkeys(random_checkpoint(TINY).names, read))
    with pytest.raises(ConfigError) as refused:
        Engine(checkpoint, EngineConfig(device="cpu", kv_dtype=kv_dtype))
    assert str(refused.value) == f"kv_dtype {kv_dtype} needs an NVIDIA card: leave it out on a CPU"


def test_an_8_bit_cache_is_refused_where_keys_have_a_bias() -> None:
    checkpoint = random_checkpoint(replace(TINY, arch="qwen2", qkv_bias=True))
    with pytest.raises(ConfigError, match="keys of a model whose k has a bias"):
        Engine(checkpoint, EngineConfig(device="cpu", kv_dtype="fp8_e4m3"))


def test_a_cache_that_was_reset_knows_no_prefix_and_changes_no_answer() -> None:
    prompt = list(range(100, 140))
    with serve() as engine:
        cold = answer(engine, prompt, 4, logprobs=1)
        warm = answer(engine, prompt, 4, logprobs=1)
        engine.reset_prefix_cache()
        reset = answer(engine, prompt, 4, logprobs=1)
        again = answer(engine, prompt, 4, logprobs=1)
        engine.check()
    assert [c.cached_tokens for c in (cold, warm, reset, again)] == [0, 32, 0, 32]
    assert cold.tokens == warm.tokens == reset.tokens == again.tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_slots_of_a_single_request_are_counted_step_by_step(overlap: bool) -> None:
    with serve(overlap=overlap) as engine:
        answer(engine, list(range(100, 140)), 9)
        usage = engine.usage()
    # nine steps, after which 40, 41, ..., 48 tokens are in three blocks, where another would reserve 49 slots
    assert (usage.steps, usage.rows) == (9, 48)
    assert (usage.kv_slots_held, usage.kv_slots_unused) == (9 * 48, sum(48 - n for n in range(40, 49)))
    assert usage.kv_slots_contiguous == 9 * 49
    assert usage.kv_slots_contiguous_unused == sum(49 - n for n in range(40, 49))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shared", [0, 48])
def test_slots_in_use_are_the_same_however_they_are_allocated_but_for_those_that_are_shared(
    shared: int, overlap: bool
) -> None:
    head = list(range(100, 100 + shared))
    with serve(overlap=overlap) as engine:
        answer(engine, [*head, 99])
        before = engine.usage()
        asked = SamplingParams(max_tokens=30, ignore_eos=True)
        prompts = [[*head, *range(200 + 20 * i, 207 + 23 * i)] for i in range(6)]
        futures = [engine.submit(prompt, asked) for prompt in prompts]
        assert all(len(future.result(timeout=60).tokens) == 30 for future in futures)
        engine.check()
        after = engine.usage()
    found = {
        name: getattr(after, name) - getattr(before, name)
        for name in vars(after)
        if name.startswith("kv_slots")
    }
    paged = found["kv_slots_held"] - found["kv_slots_unused"]
    contiguous = found["kv_slots_contiguous"] - found["kv_slots_contiguous_unused"]
    assert 0 < found["kv_slots_unused"] < found["kv_slots_held"]
    assert 0 < found["kv_slots_contiguous_unused"] < found["kv_slots_contiguous"]
    assert after.prompt_tokens_cached == 6 * shared
    assert paged < contiguous if shared else paged == contiguous


def test_a_step_ahead_takes_no_more_steps_when_all_is_asked_at_once() -> None:
    steps, answers = [], []
    for overlap in (False, True):
        with serve(overlap=overlap, max_batch=8) as engine:
            with engine._wake:  # the loop sees none before it sees all
                asked = [SamplingParams(max_tokens=3 + i % 7, ignore_eos=True, logprobs=1) for i in range(20)]
                futures = [engine.submit([5 + i] * (1 + 9 * i), a) for i, a in enumerate(asked)]
            answers.append([future.result(timeout=60).tokens for future in futures])
            steps.append(engine.usage().steps)
    assert answers[0] == answers[1]
    assert steps[1] <= steps[0] + 8  # a place is free one step later, for each of the eight


def test_a_step_ahead_with_grammars_and_aborts_in_flight_leaves_no_block_and_changes_no_answer(
    tmp_path: Path,
) -> None:
    write_tiny(tmp_path / "m.gguf")

    def run(overlap: bool, abort: bool) -> list[Completion]:
        config = EngineConfig(device="cpu", kv_bytes=1 << 20, overlap=overlap, max_batch=8)
        with Engine.load(tmp_path / "m.gguf", config) as engine:
            kept, dropped = [], []
            for i in range(12):
                prompt = [3 + i, *range(20, 30 + i)]
                bound = SamplingParams(max_tokens=60, schema=VERDICT, logprobs=2, seed=i)
                free = SamplingParams(
                    max_tokens=5 + i, ignore_eos=True, logprobs=2, temperature=0.8 * (i % 2), seed=i
                )
                kept.append(engine.submit(prompt, bound if i % 3 == 0 else free))
                endless = replace(bound if i % 4 == 0 else free, max_tokens=90)
                dropped.append(engine.submit([*prompt, 7], endless))
            for i, future in enumerate(kept):
                future.result(timeout=60)
                if abort and i % 2:  # others are in flight
                    dropped[i // 2].cancel()
            for future in dropped:
                if abort:
                    future.cancel()
            assert not wait(dropped, timeout=60).not_done
            assert not abort or any(future.cancelled() for future in dropped)
            engine.check()
            pool = engine._scheduler.pool
            assert pool.free_blocks == pool.num_blocks
            return [future.result() for future in kept]

    plain = run(overlap=False, abort=False)
    assert run(overlap=True, abort=True) == plain
    verdicts = [json.loads(c.text) for c in plain[::3]]
    assert all(set(verdict) == {"why", "verdict"} for verdict in verdicts)


def test_buckets_grow_to_the_step_size_and_no_further() -> None:
    pytest.importorskip("triton")
    from ragate_engine.card import buckets_of

    assert buckets_of(8) == [8]
    assert buckets_of(64) == [8, 16, 64]
    assert buckets_of(65) == [8, 16, 64, 128]
    assert buckets_of(8192) == [8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert buckets_of(50_000)[-2:] == [32768, 50_000]


def test_the_cards_modules_are_imported_where_there_is_no_card() -> None:
    pytest.importorskip("triton")
    names = "card", "kernels.triton.ahead", "kernels.triton.pick_reference"
    code = "; ".join(f"import ragate_engine.{name}" for name in names)
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plain["CUDA_VISIBLE_DEVICES"] = ""
    ended = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


class Loaded:
    """Stands for weights on a card: how they were kept, and under which longest sequence."""

    def __init__(self, runner: Runner) -> None:
        self.how = runner.keep, runner.max_len, hasattr(runner.kernels, "pack_quantized")

    def kept(self) -> list[Kept]:
        return []


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Opens a model on a made-up card whose kernels of `fell` do not compile; returns how weights were loaded."""
    triton = pytest.importorskip("ragate_engine.kernels.triton")

    def load(checkpoint: Checkpoint, free: int, fell: dict[str, str], weights: str = "packed") -> list[Any]:
        loads: list[Any] = []

        def decoder(runner: Runner, *_: object) -> Loaded:
            loads.append(Loaded(runner))
            return loads[-1]

        ops = ModuleType("ops")
        ops.__dict__.update({name: getattr(triton, name) for name in triton.__all__})
        for family in fell:
            for name in FAMILIES[family]:
                ops.__dict__.pop(name, None)
        monkeypatch.setattr(runner_module, "pick_device", lambda wanted: torch.device("cuda"))
        monkeypatch.setattr(runner_module, "card", lambda: Card("NVIDIA X", (9, 0), free + (600 << 20), free))
        monkeypatch.setattr(runner_module, "choose", lambda device, wanted: (triton, triton.NAME))
        monkeypatch.setattr(runner_module, "checked", lambda *_, **__: Checked(ops, "triton-3 (some)", fell))
        monkeypatch.setattr(runner_module, "KVCache", lambda model, blocks, *_: loads.append(blocks))
        monkeypatch.setattr(Runner, "_decoder_on_card", decoder)
        monkeypatch.setattr(Runner, "_steps", lambda *_: None)
        monkeypatch.setattr("ragate_engine.kernels.triton.ahead.AheadCompiler", Compiler)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        config = EngineConfig(device="cuda", weights=weights, max_batch=16, max_step_tokens=512)  # type: ignore[arg-type]
        Runner(checkpoint, config)
        return [load.how if isinstance(load, Loaded) else load for load in loads]

    return load


class Compiler:
    """Compiles nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def wait_for_first(self) -> None:
        pass


def int4_model() -> Checkpoint:
    """Llama-3-8B as AWQ stores it, of which only the header is there."""
    forms = forms_of(LLAMA_8B, "int4 g128")
    tensors = {name: Joined({}, lambda parts: torch.empty(0), form) for name, form in forms.items()}
    return Checkpoint(Path("made"), LLAMA_8B, None, tensors, "AWQ int4 g128", files=())


def test_packed_weights_whose_kernel_does_not_compile_are_unpacked_where_there_is_room(on_card) -> None:
    packed, unpacked, blocks = on_card(
        int4_model(), int(16.6 * 2**30), {"quantized": "CompilationError: no such layout"}
    )
    assert packed == ("packed", 8192, True)
    # there is less room for KV: a window longer than that is cut to it
    assert unpacked[0] == "dense" and unpacked[1] < 8192 and not unpacked[2]
    assert blocks * 16 >= unpacked[1]


def test_packed_weights_that_would_not_fit_unpacked_are_refused_before_they_are_read_again(on_card) -> None:
    with pytest.raises(OutOfMemoryError) as refused:
        on_card(int4_model(), 12 << 30, {"quantized": "CompilationError: no such layout"})
    assert str(refused.value) == (
        "the kernel for weights = packed does not run on NVIDIA X (CompilationError: no such layout), and unpacked the "
        "weights need 15.0 GiB and 12.0 GiB are free on NVIDIA X (3.9 GiB are missing): a model of up to 6.0 billion "
        "weights fits; or use device cpu"
    )


def test_other_kernels_that_do_not_compile_leave_weights_packed(on_card) -> None:
    first, second, _ = on_card(
        int4_model(), 12 << 30, {"attention": "CompilationError: no", "pick": "with it"}
    )
    assert first == second == ("packed", 8192, True)


def test_int8_weights_have_the_same_way_back(on_card) -> None:
    first, second, _ = on_card(int4_model(), 20 << 30, {"int8": "CompilationError: no"}, "int8")
    assert (first[0], second[0]) == ("int8", "dense")
    with pytest.raises(
        OutOfMemoryError, match=r"the kernel for weights = int8 does not run .* unpacked the weights"
    ):
        on_card(int4_model(), 12 << 30, {"int8": "CompilationError: no"}, "int8")


def test_a_request_that_ends_a_step_ahead_leaves_its_neighbours_tokens_alone() -> None:
    """The step in flight still samples for it: that token has no place to go, least of all another's."""
    rng = random.Random(1)
    second = [rng.randrange(512) for _ in range(20)]
    asked = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=1)
    end = None
    with serve(overlap=False) as engine:
        alone = engine.submit(second, asked).result(timeout=60).tokens
        while end is None:  # a prompt whose answer brings something new after a while
            first = [rng.randrange(512) for _ in range(20)]
            ids = [token.id for token in engine.submit(first, asked).result(timeout=60).tokens]
            end = next((token for i, token in enumerate(ids) if i >= 3 and token not in ids[:i]), None)
    with serve(overlap=True, max_batch=2, prefix_cache=False) as engine:
        # two at once and of unequal length first, so that their places are given out in another order
        wait([engine.submit(p, replace(asked, max_tokens=n)) for p, n in ((first, 3), (second, 8))])
        engine._end_tokens = frozenset({end})
        for one, other in ((second, first), (first, second)):
            futures = {
                tuple(p): engine.submit(p, replace(asked, ignore_eos=p is second)) for p in (one, other)
            }
            assert futures[tuple(second)].result(timeout=60).tokens == alone
            assert len(futures[tuple(first)].result(timeout=60).tokens) < 24


@pytest.mark.parametrize(
    ("field", "value"),
    [("kv_dtype", "fp8"), ("device", "gpu"), ("dtype", "half"), ("kernels", "fast")],
)
def test_a_setting_that_is_not_known_is_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be one of auto, .*, got '{value}'"):
        EngineConfig(**{field: value})
