"""On the card: weights arrive whole and with the bits that a CPU makes of them, and loading takes little beside them.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ragate_engine.quant.formats import FORMATS, Kind, decode
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.weights import open_checkpoint
from ragate_engine.weights.stream import Source, Stored, Uploader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")]
CARD = torch.device("cuda")


def same_bits(card: torch.Tensor, host: torch.Tensor) -> bool:
    words = {4: torch.int32, 2: torch.int16}[host.element_size()]
    back = card.cpu()
    return bool(((back.view(words) == host.view(words)) | (back.isnan() & host.isnan())).all())


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_any_block_has_the_bits_on_the_card_that_it_has_on_a_cpu(kind: Kind) -> None:
    form = FORMATS[kind]
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (64, 4096 // form.block_weights * form.block_bytes), dtype=torch.uint8)
    card, host = decode(kind, raw.to(CARD)), decode(kind, raw)
    assert isinstance(card, QuantTensor) and isinstance(host, QuantTensor)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_bits(card.dequantize(dtype), host.dequantize(dtype)), dtype


def plain(data: torch.Tensor) -> torch.Tensor:
    return data


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """Tensors of many sizes in one file of random bytes."""
    path = tmp_path_factory.mktemp("weights") / "w.bin"
    torch.manual_seed(0)
    data = torch.randint(0, 256, (150 << 20,), dtype=torch.uint8)
    data.numpy().tofile(path)
    rng = random.Random(0)
    source, tensors, at = Source.of(path), {}, 0
    while at < len(data):
        size = min(len(data) - at, rng.choice([7, 1152, 65536, 3_000_001, 20 << 20]))
        tensors[f"t{len(tensors)}"] = Stored(source, at, size, plain)
        at += size
    return tensors


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("chunk", [65536, 8 << 20])
def test_every_byte_arrives_while_the_caller_computes(stored, threads: int, chunk: int) -> None:
    expected = {name: loader() for name, loader in stored.items()}
    order = list(stored)
    with Uploader(stored, order, CARD, threads=threads, chunk_bytes=chunk, ahead_bytes=30 << 20) as uploader:
        for i, name in enumerate(order):
            busy = torch.randn(2000, 2000, device=CARD)
            del busy  # its memory goes to the next tensor while it may still be written
            data = uploader.load(name)
            # read on the caller's stream at once: the copies must have been waited for
            assert torch.equal(data.clone().cpu(), expected[name]), (i, name)


def test_loading_takes_what_is_read_ahead_and_no_more(stored) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ahead = 32 << 20
    with Uploader(stored, list(stored), CARD, ahead_bytes=ahead) as uploader:
        kept = [uploader.load(name) for name in stored]
    held = torch.cuda.memory_allocated() - before
    assert held >= sum(len(data) for data in kept)
    assert torch.cuda.max_memory_allocated() - before <= held + ahead + (21 << 20)


def test_a_quantized_file_streams_to_the_bits_of_a_cpu() -> None:
    path = os.environ.get("RAGATE_TEST_MODEL")
    if not path:
        pytest.skip("RAGATE_TEST_MODEL names no GGUF file")
    checkpoint = open_checkpoint(path)
    some = [
        name for name in checkpoint.names if not name.startswith("layers.") or ".0." in name or ".7." in name
    ]
    with checkpoint.stream(CARD) as load:
        for name in some:
            card, host = load(name), checkpoint.load(name)
            if isinstance(host, QuantTensor):
                assert isinstance(card, QuantTensor)
                card, host = card.dequantize(torch.bfloat16), host.dequantize(torch.bfloat16)
            assert isinstance(card, torch.Tensor)
            assert same_bits(card, host), name


LOSE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tiny_gguf import write_tiny
from ragate_engine import Engine, EngineConfig, EngineError, SamplingParams
write_tiny(sys.argv[2])
with Engine.load(sys.argv[2], EngineConfig(device="cuda", kv_bytes=1 << 24)) as engine:
    engine.submit([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).result(timeout=120)
    steps = engine._runner.steps
    launch, count = steps.launch, 0
    def lose(plan):
        global count
        count += 1
        if count == 3:
            torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")].sum()  # an assertion on the card
        return launch(plan)
    steps.launch = lose
    futures = [engine.submit([i], SamplingParams(max_tokens=50, ignore_eos=True)) for i in range(1, 9)]
    for future in futures:
        try:
            future.result(timeout=120)
        except EngineError as error:
            print(type(error).__name__, error)
"""


def test_a_card_lost_in_mid_run_fails_every_request_in_one_sentence_and_the_process_ends_by_itself(
    tmp_path: Path,
) -> None:
    tests = Path(__file__).parent.parent / "engine"
    run = partial(subprocess.run, capture_output=True, text=True, timeout=300, check=False)
    ended = run([sys.executable, "-c", LOSE, str(tests), str(tmp_path / "m.gguf")])
    lines = ended.stdout.splitlines()
    assert len(lines) == 8, ended
    assert all(
        line.startswith("DeviceError ") and "was lost in mid-run (CUDA error" in line for line in lines
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
