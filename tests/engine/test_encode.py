"""Blocks that we write: ggml's own bytes, and what the `gguf` package reads back from them."""

from __future__ import annotations

from typing import Any

import ggml
import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragate_engine.quant.encode import WRITTEN, encode
from ragate_engine.quant.formats import DENSE, Kind

BLOCKS = [kind for kind in WRITTEN if kind not in DENSE]
IN_NUMPY = [Kind.Q4_0, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
"""Block formats that the `gguf` package quantizes too."""
CLOSE = {
    Kind.Q4_0: 0.1, Kind.Q5_0: 0.05, Kind.Q5_1: 0.05, Kind.Q8_0: 0.006, Kind.Q2_K: 0.35, Kind.Q3_K: 0.2,
    Kind.Q4_K: 0.09, Kind.Q5_K: 0.045, Kind.Q6_K: 0.022,
}  # fmt: skip
"""Relative error (of the 2-norm) that normally distributed weights may have."""


def _samples() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    shape = (48, 512)
    normal = rng.standard_normal(shape) * 0.02
    wide = np.exp(np.repeat(rng.uniform(-12, 3, (48, 16)), 32, axis=1))
    return {
        "normal": normal,
        "heavy tails": rng.standard_t(2, shape) * 0.05,
        "mostly zero": np.where(rng.random(shape) < 0.03, normal, 0.0),
        "ties": rng.integers(-3, 4, shape),
        "all positive": rng.random(shape) + 1,
        "all negative": -rng.random(shape) - 1,
        "groups of unlike size": rng.standard_normal(shape) * wide,
        "zero": np.zeros(shape),
        "constant": np.full(shape, -0.25),
    }


SAMPLES = {name: rows.astype(np.float32) for name, rows in _samples().items()}


def read(kind: Kind, blocks: torch.Tensor) -> np.ndarray[Any, Any]:
    """The weights, as the `gguf` package reads them."""
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(int(kind)))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_bytes_are_those_of_ggml(kind: Kind, name: str) -> None:
    rows = SAMPLES[name]
    np.testing.assert_array_equal(encode(kind, torch.from_numpy(rows)).numpy(), ggml.quantize(kind, rows))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("kind", IN_NUMPY, ids=lambda kind: kind.name)
def test_bytes_are_those_of_the_gguf_package(kind: Kind, name: str) -> None:
    rows = SAMPLES[name]
    wanted = gguf.quants.quantize(rows, gguf.GGMLQuantizationType(int(kind)))
    np.testing.assert_array_equal(encode(kind, torch.from_numpy(rows)).numpy(), wanted)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_normal_weights_keep_their_value_within_the_width_of_a_code(kind: Kind) -> None:
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    wrong = read(kind, encode(kind, rows)) - rows.numpy()
    assert np.linalg.norm(wrong) < CLOSE[kind] * float(rows.norm())


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_tensor_that_takes_several_chunks_is_the_sum_of_its_rows(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.from_numpy(SAMPLES["normal"])
    whole = encode(kind, rows)
    monkeypatch.setattr("ragate_engine.quant.encode._CHUNK_WEIGHTS", {"cpu": 3 * 256})
    assert torch.equal(encode(kind, rows), whole)
    assert torch.equal(encode(kind, rows[5:6]), whole[5:6])


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-44, 4), spread=st.integers(0, 12))
def test_no_block_is_worse_than_a_coarse_code(kind: Kind, seed: int, exponent: int, spread: int) -> None:
    """From weights that no float16 scale can hold to large ones: finite, and off by less than the block's span."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(256) * 10.0 ** rng.uniform(exponent - spread, exponent, 256)).astype(np.float32)
    x = np.clip(x, -65504, 65504)
    w = read(kind, encode(kind, torch.from_numpy(x).view(1, -1)))[0]
    assert np.isfinite(w).all()
    assert np.abs(w - x).max() <= np.abs(x).max() * 1.01 + 1e-4


def test_dense_kinds_are_casts() -> None:
    rows = torch.tensor([[1.0, 1 / 3, -2.5e-3, 7.0]])
    assert encode(Kind.F32, rows).numpy().view(np.float32).tolist() == rows.tolist()
    assert encode(Kind.F16, rows).numpy().view(np.float16).tolist() == rows.half().tolist()
    assert encode(Kind.BF16, rows).view(torch.bfloat16).tolist() == rows.bfloat16().tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_weights_that_no_scale_can_hold_are_refused(bad: float) -> None:
    rows = torch.zeros(2, 256)
    rows[1, 77] = bad
    with pytest.raises(ValueError, match="not finite, or larger than 65504"):
        encode(Kind.Q4_K, rows)


def test_what_is_not_written_is_refused() -> None:
    with pytest.raises(ValueError, match="Q8_K is not written: take one of Q4_0,"):
        encode(Kind.Q8_K, torch.zeros(1, 256))
    with pytest.raises(ValueError, match="rows of 96 weights do not divide into Q6_K blocks of 256"):
        encode(Kind.Q6_K, torch.zeros(1, 96))
