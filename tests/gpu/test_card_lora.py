"""On the card: LoRA adapters beside a base, whose answers have the same bits in any company, and near those merged.

Run with `pytest -m gpu tests/gpu/test_card_lora.py`. Needs an NVIDIA card.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from on_card import BF16, CARD, NEEDS_CARD

from ragate_engine import Completion, Engine, EngineConfig, ModelConfig, SamplingParams, write_adapter

pytest.importorskip("triton")
bench = pytest.importorskip("bench.random_model", reason="run from the root of the repository")
pytestmark = NEEDS_CARD

NAMES = ("eights", "sixteens", "some")
BASES = {"dense": "135m", "packed": "135m-q4_k_m", "int8": "135m"}
PARAMS = SamplingParams(max_tokens=8, logprobs=2, ignore_eos=True)
Asked = tuple[list[int], SamplingParams, str | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of SmolLM2-135M's shapes: ranks 8, 16 and 20, the last one of some leaves."""
    model, folder = bench.SMOL_135M, tmp_path_factory.mktemp("adapters")
    made = [
        bench.random_adapter(model, "eights", 8, 1),
        bench.random_adapter(model, "sixteens", 16, 2),
        bench.random_adapter(model, "some", 20, 3, ("q", "v", "down")),
    ]
    for adapter in made:
        write_adapter(folder / adapter.name, adapter, "random", {})
    return [folder / adapter.name for adapter in made]


@functools.cache
def asked() -> list[Asked]:
    """Prompts of 9 to 300 tokens, each for the base and for each of three adapters."""
    prompts = [[(7 * i * i + 3 * k) % 40000 for i in range(n)] for k, n in enumerate((300, 140, 70, 9))]
    return [(prompt, PARAMS, name) for prompt in prompts for name in (None, *NAMES)]


def serve(base: str, adapters: Sequence[Path], **settings: object) -> Engine:
    config = dict(
        device="cuda", weights=base, kv_bytes=1 << 27, max_batch=64, max_len=512, max_step_tokens=512
    )
    checkpoint = bench.open_model(BASES[base], "cuda")
    return Engine(checkpoint, EngineConfig(**(config | {"adapters": tuple(adapters)} | settings)))


def answers(engine: Engine, requests: Sequence[Asked]) -> list[Completion]:
    with engine._wake:  # the loop sees no request before it sees all
        futures = [engine.submit(*request) for request in requests]
    return [future.result(timeout=120) for future in futures]


def bits(completions: Sequence[Completion]) -> list[object]:
    return [(c.tokens, c.finish) for c in completions]


@pytest.mark.parametrize("base", BASES)
def test_a_batch_of_three_adapters_and_the_base_has_the_bits_of_each_alone(
    base: str, folders: list[Path]
) -> None:
    with serve(base, folders, prefix_cache=False) as engine:
        alone = [found for request in asked() for found in answers(engine, [request])]
        assert engine.describe()["backend"] == import_module("ragate_engine.kernels.triton").NAME
    assert len({tuple(token.id for token in c.tokens) for c in alone}) > len(alone) // 2
    with serve(base, folders) as engine:
        for state in ("cold and eager", "warm", "warm, from graphs"):
            found = answers(engine, asked())
            assert bits(found) == bits(alone), state
        assert sum(c.cached_tokens for c in found) >= 4 * (288 + 128 + 64)
        engine.check()
    with serve(
        base, folders[::-1], cuda_graphs=False, max_step_tokens=64
    ) as engine:  # other columns, chunks of 64
        assert bits(answers(engine, asked())) == bits(alone)
        engine.check()


def test_an_adapter_has_the_bits_of_an_engine_that_has_no_other(folders: list[Path]) -> None:
    with serve("dense", folders) as engine:
        together = answers(engine, asked())
    for folder in folders:
        own = [i for i, request in enumerate(asked()) if request[2] == folder.name]
        with serve("dense", [folder]) as engine:
            alone = answers(engine, [asked()[i] for i in own])
        assert bits(alone) == bits([together[i] for i in own]), folder.name


def test_the_base_beside_adapters_keeps_the_bits_it_has_without(folders: list[Path]) -> None:
    """Its gate and up are another product there, of the same sums: activated in float32 and rounded once, too."""
    requests = [request for request in asked() if request[2] is None]
    with serve("dense", []) as engine:
        expected = answers(engine, requests)
    with serve("dense", folders) as engine:
        assert bits(answers(engine, requests)) == bits(expected)


def test_an_adapter_beside_the_base_answers_nearly_as_it_does_merged(folders: list[Path]) -> None:
    prompt = asked()[0][0]
    with serve("dense", folders) as engine:
        beside = [engine.submit(prompt, PARAMS, name).result(60).tokens[0].top[0][1] for name in NAMES]
    for folder, logprob in zip(folders, beside, strict=True):
        with serve("dense", [], merge_adapter=folder) as engine:
            merged = engine.submit(prompt, PARAMS).result(60).tokens[0].top[0][1]
        assert logprob == pytest.approx(merged, abs=0.15), folder.name


@pytest.mark.parametrize("base", BASES)
def test_what_others_make_torchs_default_type_changes_no_bit(base: str, folders: list[Path]) -> None:
    requests = [request for request in asked() if request[2] in (None, "some")]
    with serve(base, folders) as engine:
        expected = bits(answers(engine, requests))
    torch.set_default_dtype(torch.float64)
    try:
        with serve(base, folders) as engine:
            assert bits(answers(engine, requests)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_steps_with_adapters_launch_no_linear_kernel_that_was_not_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ragate_engine.card import CardSteps, buckets_of
    from ragate_engine.kernels import triton as ops
    from ragate_engine.kernels.triton.ahead import AheadCompiler
    from ragate_engine.lora import product_shapes
    from ragate_engine.trial import run_steps

    linear = import_module("ragate_engine.kernels.triton.linear")
    kernels = [linear._skinny, linear._persistent]
    for kernel in kernels:  # forget what other tests have compiled
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    model = ModelConfig("qwen2", 1024, 1536, 8960, 1, 12, 2, 128, 4096, qkv_bias=True)
    adapters = [bench.random_adapter(model, "a", 16, 0), bench.random_adapter(model, "b", 8, 1)]
    rows = (1, 40, 100, 200, 2000)
    AheadCompiler(
        model, BF16, BF16, buckets_of(max(rows)), 16, None, frozenset(product_shapes(adapters, model))
    )._thread.join()
    ahead = compiled()
    config = EngineConfig(device="cuda", cuda_graphs=False)
    run_steps(
        model,
        ops,
        BF16,
        CARD,
        lambda decoder, kv, batch, most, length: CardSteps(decoder, kv, batch, most, length, config),
        rows,
        adapters,
    )
    torch.cuda.synchronize()
    assert compiled() == ahead
